#include "library.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

namespace fasa::gpu {

namespace {

constexpr char kName[] = "libpyfasa_cuda.so";

struct Library {
    const Api * api       = nullptr;
    char        text[512] = "";
};

template <typename... Args> void say(Library & l, const char * format, Args... args) {
    std::snprintf(l.text, sizeof(l.text), format, args...);
}

bool has_cuda_device() {
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        if (is_cuda(ggml_backend_dev_get(i))) {
            return true;
        }
    }
    return false;
}

Library load() {
    Library l;
    if (!has_cuda_device()) {
        say(l, "llama.cpp has no CUDA device here; nothing was loaded.");
        return l;
    }
    const char * asked = std::getenv("PYFASA_CUDA");
    if (asked != nullptr && std::strcmp(asked, "0") == 0) {
        say(l, "The CUDA kernels are switched off by PYFASA_CUDA=0; decoding on CUDA devices stays dense.");
        return l;
    }
    Dl_info     self = {};
    std::string path = kName;
    if (dladdr(reinterpret_cast<const void *>(&api), &self) != 0 && self.dli_fname != nullptr) {
        path = self.dli_fname;
        path = path.substr(0, path.find_last_of('/') + 1) + kName;
    }
    void * handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        say(l,
            "%s could not be loaded (%s); decoding on CUDA devices stays dense. Reinstall pyfasa with nvcc on the "
            "PATH.",
            kName, dlerror());
        return l;
    }
    const auto  function = reinterpret_cast<ApiFunction>(dlsym(handle, kApiSymbol));
    const Api * found    = function != nullptr ? function() : nullptr;
    if (found == nullptr || found->version != kApiVersion || found->node_bytes != static_cast<int32_t>(sizeof(Node))) {
        say(l, "%s belongs to another version of pyfasa; reinstall pyfasa.", kName);
        return l;
    }
    if (found->device_count() == 0) {
        say(l, "%s is there, but the CUDA driver shows it no device.", kName);
        return l;
    }
    say(l, "CUDA kernels for compute capability %s, %d device(s).", found->architectures(), found->device_count());
    l.api = found;
    return l;
}

const Library & library() {
    static const Library l = load();
    return l;
}

} // namespace

bool is_cuda(ggml_backend_dev_t device) {
    return std::strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)), "CUDA") == 0;
}

const Api * api() { return library().api; }

const char * why() { return library().text; }

} // namespace fasa::gpu

int32_t fasa_cuda_usable(void) { return fasa::gpu::api() != nullptr ? 1 : 0; }

const char * fasa_cuda_text(void) { return fasa::gpu::why(); }
