// What the core needs of POSIX' <dlfcn.h>, on Windows, which has none: CMake adds this folder there only.
#pragma once

#ifndef NOMINMAX
#define NOMINMAX
#endif
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#include <windows.h>

#include <cstdio>

#define RTLD_LOCAL 0
#define RTLD_NOW 0

struct Dl_info {
    const char * dli_fname; // until the next call on this thread; with slashes, as elsewhere
};

inline int dladdr(const void * address, Dl_info * info) {
    static thread_local char name[4096];
    HMODULE                  module = nullptr;
    if (GetModuleHandleExA(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT,
                           static_cast<LPCSTR>(address), &module) == 0) {
        return 0;
    }
    const DWORD n = GetModuleFileNameA(module, name, sizeof(name));
    if (n == 0 || n >= sizeof(name)) {
        return 0;
    }
    for (char & c : name) {
        c = c == '\\' ? '/' : c;
    }
    info->dli_fname = name;
    return 1;
}

inline void * dlopen(const char * path, int) { return reinterpret_cast<void *>(LoadLibraryA(path)); }

inline void * dlsym(void * library, const char * name) {
    return reinterpret_cast<void *>(GetProcAddress(static_cast<HMODULE>(library), name));
}

inline const char * dlerror() {
    static thread_local char text[48];
    std::snprintf(text, sizeof(text), "error %lu", GetLastError());
    return text;
}
