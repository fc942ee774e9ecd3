// Runs all tests, or those whose name contains the first argument.
#include <chrono>
#include <cstdio>
#include <cstring>

#include "fasa.h"
#include "harness.h"

int main(int argc, char ** argv) {
    using namespace fasa_test;
    std::printf("FASA_TEST_SEED=%u; instruction sets:", run_seed());
    for (const int32_t isa : usable_isas()) {
        std::printf(" %s", fasa_isa_name(isa));
    }
    std::printf("\n");
    int passed = 0;
    int failed = 0;
    for (const Test & test : tests()) {
        if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) {
            continue;
        }
        const auto start = std::chrono::steady_clock::now();
        try {
            test.run();
            const std::chrono::duration<double, std::milli> ms = std::chrono::steady_clock::now() - start;
            std::printf("ok    %s (%.0f ms)\n", test.name, ms.count());
            ++passed;
        } catch (const std::exception & e) {
            std::printf("FAIL  %s\n  %s\n", test.name, e.what());
            ++failed;
        }
        std::fflush(stdout);
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}
