// What every instruction set's file includes before the .inl files, outside its namespace.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../half.h"
#include "../kernels.h"

namespace fasa {

// exp(x) = 2^n * p(r), r = x - n ln 2 in [-ln2/2, ln2/2]: Taylor of degree 6, error below 2e-7 relative. Inputs here
// are <= 0; below kExpMin the result is 0.
constexpr float kExpMin     = -87.0f;
constexpr float kLog2e      = 1.44269504f;
constexpr float kLn2High    = 0.693145752f; // 12 bits short, so that n * kLn2High is exact
constexpr float kLn2Low     = 1.42860677e-6f;
constexpr float kExpTerms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};

} // namespace fasa
