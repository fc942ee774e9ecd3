/* The C interface of pyfasa for C and C++; the declarations themselves are in fasa.cdef.h. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "fasa.cdef.h"

#ifdef __cplusplus
}
#endif
