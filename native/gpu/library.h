// Finds libpyfasa_cuda.so beside this library and loads it, once, when ggml has a CUDA device.
#pragma once

#include <ggml-backend.h>

#include "../cuda/api.h"

namespace fasa::gpu {

// nullptr: no CUDA device of ggml, or no usable library; why() says which.
const Api * api();

// A sentence, for doctor.
const char * why();

bool is_cuda(ggml_backend_dev_t device);

} // namespace fasa::gpu
