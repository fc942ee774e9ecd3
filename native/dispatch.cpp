// Which instruction set runs: the best that this CPU has and this build contains, or the one asked for.
#include "kernels.h"
#include "status.h"

namespace fasa {

const Kernels & kernels_of(int32_t isa) {
    if (isa == FASA_ISA_AUTO) {
        isa = fasa_isa_best();
    }
    if (isa < 0 || isa >= FASA_ISA_COUNT) {
        fail(FASA_STATUS_ARGUMENT, "Instruction set %d is unknown; ids go from 0 to %d.", isa, FASA_ISA_COUNT - 1);
    }
    if (fasa_isa_usable(isa) == 0) {
        fail(FASA_STATUS_ARGUMENT, "This CPU cannot run %s kernels; its best is %s.", fasa_isa_name(isa),
             fasa_isa_name(fasa_isa_best()));
    }
    switch (isa) {
        case FASA_ISA_REFERENCE: return kReference;
#if defined(__x86_64__)
        case FASA_ISA_AVX2: return kAvx2;
        case FASA_ISA_AVX512: return kAvx512;
#endif
        default: return kPortable;
    }
}

} // namespace fasa

const char * fasa_isa_name(int32_t isa) {
    switch (isa) {
        case FASA_ISA_REFERENCE: return "reference";
        case FASA_ISA_PORTABLE: return "portable";
        case FASA_ISA_AVX2: return "AVX2";
        case FASA_ISA_AVX512: return "AVX-512 VNNI";
        case FASA_ISA_AUTO: return "auto";
        default: return "unknown";
    }
}

int32_t fasa_isa_usable(int32_t isa) {
    switch (isa) {
        case FASA_ISA_REFERENCE:
        case FASA_ISA_PORTABLE: return 1;
#if defined(__x86_64__)
        case FASA_ISA_AVX2:
            return __builtin_cpu_supports("avx2") &&
                   __builtin_cpu_supports("fma"); // every CPU with AVX2 has F16C; clang 14 does not know the name
        case FASA_ISA_AVX512:
            return fasa_isa_usable(FASA_ISA_AVX2) && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
        default: return 0;
    }
}

int32_t fasa_isa_best(void) {
    for (int32_t isa = FASA_ISA_COUNT - 1; isa > FASA_ISA_PORTABLE; --isa) {
        if (fasa_isa_usable(isa) != 0) {
            return isa;
        }
    }
    return FASA_ISA_PORTABLE;
}
