// IEEE half precision on machines without F16C: the plain conversions used outside the hot kernels.
#pragma once

#include <cstdint>
#include <cstring>

namespace fasa {

constexpr uint16_t kHalfMinusInf = 0xfc00; // how a mask hides a cell

static inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t exp  = (h >> 10) & 0x1fu;
    const uint32_t man  = h & 0x3ffu;
    float          f;
    if (exp == 0) { // zero or subnormal: man * 2^-24
        f = static_cast<float>(man) * 5.9604644775390625e-8f;
        return sign != 0 ? -f : f;
    }
    const uint32_t bits = sign | (exp == 31 ? 0x7f800000u : (exp + 112) << 23) | (man << 13);
    std::memcpy(&f, &bits, sizeof(f));
    return f;
}

// Rounds to nearest even; values beyond the largest half become infinity.
static inline uint16_t float_to_half(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof(bits));
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t abs  = bits & 0x7fffffffu;
    if (abs > 0x7f800000u) {
        return static_cast<uint16_t>(sign | 0x7e00u);
    }
    if (abs >= 0x47800000u) {
        return static_cast<uint16_t>(sign | 0x7c00u);
    }
    if (abs < 0x38800000u) { // below 2^-14: adding 0.5 puts units of 2^-24 into the low mantissa bits, rounded
        float magnitude;
        std::memcpy(&magnitude, &abs, sizeof(magnitude));
        magnitude += 0.5f;
        uint32_t shifted;
        std::memcpy(&shifted, &magnitude, sizeof(shifted));
        return static_cast<uint16_t>(sign | (shifted - 0x3f000000u));
    }
    const uint32_t odd = (abs >> 13) & 1u;
    return static_cast<uint16_t>(sign | ((abs - 0x38000000u + 0xfffu + odd) >> 13));
}

} // namespace fasa
