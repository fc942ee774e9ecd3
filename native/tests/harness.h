// A small test harness: TEST registers a function, CHECK fails it and prints the case that was running.
#pragma once

#include <cstdint>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace fasa_test {

struct Test {
    const char * name;
    void (*run)();
};

std::vector<Test> & tests();

struct Registered {
    Registered(const char * name, void (*run)()) { tests().push_back({name, run}); }
};

struct CheckFailed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Says which row of a table is running; printed when a check fails inside its scope.
class Case {
  public:
    explicit Case(std::string text);
    ~Case();
    Case(const Case &)             = delete;
    Case & operator=(const Case &) = delete;
};

[[noreturn]] void fail_check(const char * file, int line, const std::string & what);

void check_equal(double actual, double expected, const char * text, const char * file, int line);
void check_at_most(double value, double limit, const char * text, const char * file, int line);

// Values differ from run to run; main() prints the seed, FASA_TEST_SEED repeats it.
uint32_t     run_seed();
std::mt19937 fresh_rng();

std::vector<float> gaussian(std::mt19937 & rng, size_t n, float deviation = 1.0f);

// sum of squared differences / sum of squares of `expected`; infinite when a value is no number.
double nmse(const std::vector<float> & actual, const std::vector<float> & expected);

// Instruction sets that this CPU can run, the reference included.
std::vector<int32_t> usable_isas();

} // namespace fasa_test

#define TEST(name)                                                                                                     \
    static void                        name();                                                                         \
    static const fasa_test::Registered registered_##name(#name, name);                                                 \
    static void                        name()

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fasa_test::fail_check(__FILE__, __LINE__, #condition);                                                     \
        }                                                                                                              \
    } while (false)

#define CHECK_EQUAL(actual, expected)                                                                                  \
    fasa_test::check_equal(static_cast<double>(actual), static_cast<double>(expected), #actual, __FILE__, __LINE__)

#define CHECK_AT_MOST(value, limit)                                                                                    \
    fasa_test::check_at_most(static_cast<double>(value), static_cast<double>(limit), #value, __FILE__, __LINE__)
