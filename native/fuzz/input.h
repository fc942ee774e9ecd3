// A fuzzer's bytes as numbers and arrays: ordinary ones, and those that break careless code.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "fasa.h"

namespace fasa_fuzz {

// Prints what went wrong and ends the process, so that libFuzzer keeps the input.
[[noreturn]] inline void finding(const char * what) {
    std::fprintf(stderr, "FINDING: %s; last error: %s\n", what, fasa_last_error());
    std::abort();
}

inline void expect(bool ok, const char * what) {
    if (!ok) {
        finding(what);
    }
}

// What every call promises: success, or a status with a sentence. Returns whether it was success.
inline bool called(fasa_status status) {
    if (status == FASA_STATUS_OK) {
        return true;
    }
    const char * sentence = fasa_last_error();
    const size_t length   = std::strlen(sentence);
    expect(status == FASA_STATUS_ARGUMENT || status == FASA_STATUS_STATE, "a status that hostile values cannot cause");
    expect(length > 10 && sentence[length - 1] == '.', "a failure without a sentence");
    return false;
}

// On the heap with no byte to spare: a sanitizer sees every access beyond.
template <typename T> using Array = std::unique_ptr<T[]>;

class Input {
  public:
    Input(const uint8_t * data, size_t size) : at_(data), end_(data + size) {}

    template <typename T> T raw() {
        T            value = 0;
        const size_t n     = std::min<size_t>(sizeof(T), static_cast<size_t>(end_ - at_));
        std::memcpy(&value, at_, n);
        at_ += n;
        return value;
    }
    // False when no bytes are left: then all is ordinary.
    bool chance(int one_in) { return raw<uint8_t>() % one_in == one_in - 1; }
    // `low` when there is nothing between.
    int64_t within(int64_t low, int64_t high) {
        const uint64_t span = static_cast<uint64_t>(high) - static_cast<uint64_t>(low) + 1;
        return high <= low ? low : low + static_cast<int64_t>(raw<uint16_t>() % span);
    }

    // Mostly low to high, now and then just outside, at the ends of the type, or anything.
    template <typename T> T number(int64_t low, int64_t high) {
        using Limits = std::numeric_limits<T>;
        if (!chance(8)) {
            return static_cast<T>(within(low, high));
        }
        const T odd[] = {static_cast<T>(static_cast<uint64_t>(low) - 1),
                         static_cast<T>(static_cast<uint64_t>(high) + 1),
                         0,
                         1,
                         static_cast<T>(-1),
                         Limits::min(),
                         Limits::max(),
                         static_cast<T>(1LL << 30),
                         static_cast<T>(1LL << 40),
                         raw<T>()};
        return odd[raw<uint8_t>() % (sizeof(odd) / sizeof(T))];
    }

    // Of moderate size; with `hostile` also NaN, infinities, huge, tiny and any bits.
    float real(bool hostile) {
        if (hostile && chance(8)) {
            using Limits      = std::numeric_limits<float>;
            const float odd[] = {Limits::quiet_NaN(),
                                 Limits::infinity(),
                                 -Limits::infinity(),
                                 Limits::max(),
                                 Limits::lowest(),
                                 Limits::denorm_min(),
                                 -0.0f,
                                 raw<float>()};
            return odd[raw<uint8_t>() % (sizeof(odd) / sizeof(float))];
        }
        return static_cast<float>(raw<int16_t>()) / 4096.0f;
    }

    Array<float> reals(int64_t n, bool hostile) {
        Array<float> x(new float[n]);
        for (int64_t i = 0; i < n; ++i) {
            x[i] = left() > 0 ? real(hostile) : std::sin(static_cast<float>(i * i % 1009));
        }
        return x;
    }
    template <typename T> Array<T> bytes(int64_t n) {
        Array<T> x(new T[n]);
        for (int64_t i = 0; i < n; ++i) {
            x[i] = left() > 0 ? raw<T>() : static_cast<T>(i * 2654435761u);
        }
        return x;
    }
    size_t left() const { return static_cast<size_t>(end_ - at_); }

  private:
    const uint8_t * at_;
    const uint8_t * end_;
};

} // namespace fasa_fuzz
