#pragma once

#include "cuda_runtime.h"
#include "half.h"

struct __half {
    uint16_t bits;
};
struct __half2 {
    __half x, y;
};

inline float  __half2float(__half x) { return fasa::half_to_float(x.bits); }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
