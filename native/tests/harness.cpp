// What tests call; main.cpp runs them.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "fasa.h"
#include "harness.h"

namespace fasa_test {

namespace {

std::vector<std::string> & cases() {
    static std::vector<std::string> stack;
    return stack;
}

} // namespace

std::vector<Test> & tests() {
    static std::vector<Test> all;
    return all;
}

Case::Case(std::string text) { cases().push_back(std::move(text)); }

Case::~Case() { cases().pop_back(); }

void fail_check(const char * file, int line, const std::string & what) {
    std::string text = std::string(file) + ":" + std::to_string(line) + ": " + what;
    for (const std::string & c : cases()) {
        text += "\n    in " + c;
    }
    throw CheckFailed(text);
}

void check_equal(double actual, double expected, const char * text, const char * file, int line) {
    if (!(actual == expected)) {
        char buffer[256];
        std::snprintf(buffer, sizeof(buffer), "%s is %.9g, expected %.9g", text, actual, expected);
        fail_check(file, line, buffer);
    }
}

void check_at_most(double value, double limit, const char * text, const char * file, int line) {
    if (!(value <= limit)) { // fails for NaN too
        char buffer[256];
        std::snprintf(buffer, sizeof(buffer), "%s is %.6g, above %.6g", text, value, limit);
        fail_check(file, line, buffer);
    }
}

uint32_t run_seed() {
    static const uint32_t seed = [] {
        const char * text = std::getenv("FASA_TEST_SEED");
        return text != nullptr ? static_cast<uint32_t>(std::strtoul(text, nullptr, 10)) : std::random_device{}();
    }();
    return seed;
}

std::mt19937 fresh_rng() { return std::mt19937(run_seed()); }

std::vector<float> gaussian(std::mt19937 & rng, size_t n, float deviation) {
    std::normal_distribution<float> normal(0.0f, deviation);
    std::vector<float>              x(n);
    for (float & value : x) {
        value = normal(rng);
    }
    return x;
}

double nmse(const std::vector<float> & actual, const std::vector<float> & expected) {
    double error = 0;
    double power = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
        error += std::pow(static_cast<double>(actual[i]) - expected[i], 2);
        power += std::pow(static_cast<double>(expected[i]), 2);
    }
    const double result = error == 0 ? 0 : error / power;
    return actual.size() == expected.size() && std::isfinite(result) ? result : std::numeric_limits<double>::infinity();
}

std::vector<int32_t> usable_isas() {
    std::vector<int32_t> isas;
    for (int32_t isa = 0; isa < FASA_ISA_COUNT; ++isa) {
        if (fasa_isa_usable(isa) != 0) {
            isas.push_back(isa);
        }
    }
    return isas;
}

} // namespace fasa_test
