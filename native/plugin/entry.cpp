// libpyfasa.so as llama.cpp loads it, when GGML_BACKEND_PATH names it: a backend without devices, which decorates those
// of others. Whatever goes wrong here, the tool runs on as without us, with one line on stderr.
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>

#include <cstdlib>
#include <mutex>
#include <string>
#include <thread>

#include "../seam.h"
#include "plugin.h"

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void);

namespace {

using fasa::plugin::Plugin;

Plugin * plugin = nullptr; // never freed: hooks and the watcher may run until the very end of the process
sem_t    asked;            // for statistics

void give_up(const std::string & sentence) { fasa::plugin::print_line(sentence + " Decoding is dense."); }

void serve() {
    static std::mutex                  mutex;
    static size_t                      n_devices = 0;
    const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    if (plugin == nullptr || !lock.owns_lock() || n_devices == ggml_backend_dev_count()) {
        return;
    }
    n_devices = ggml_backend_dev_count();
    try {
        plugin->serve();
    } catch (const std::exception & e) {
        plugin = nullptr;
        give_up(e.what());
    }
}

// ---- statistics on SIGUSR1 ---------------------------------------------------------------------------------

void on_signal(int) { sem_post(&asked); }

// A thread writes: a signal handler may do next to nothing. A tool that has a handler of its own keeps it.
void watch_signal() {
    struct sigaction before = {};
    if (sigaction(SIGUSR1, nullptr, &before) != 0 || before.sa_handler != SIG_DFL || sem_init(&asked, 0, 0) != 0) {
        return;
    }
    sigset_t all, old; // the tool's signals stay with the tool's threads
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &old);
    std::thread([writer = plugin] {
        for (;;) {
            if (sem_wait(&asked) == 0) {
                writer->write_statistics();
            }
        }
    }).detach();
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
    struct sigaction action = {};
    action.sa_handler       = on_signal;
    action.sa_flags         = SA_RESTART;
    sigaction(SIGUSR1, &action, nullptr);
}

// ---- the backend without devices ---------------------------------------------------------------------------

// llama.cpp asks these again and again; devices may have been registered since.
const char * get_name(ggml_backend_reg_t) {
    serve();
    return "PYFASA";
}
size_t get_device_count(ggml_backend_reg_t) {
    serve();
    return 0;
}
ggml_backend_dev_t get_device(ggml_backend_reg_t, size_t) { return nullptr; }

const void * library_of(const void * address) {
    Dl_info info = {};
    return dladdr(address, &info) != 0 ? info.dli_fbase : nullptr;
}

// In a Python process pyfasa.Llama decorates by itself, and two decorators of one device would be one too many.
bool python_is_here() {
    Dl_info info = {};
    if (dladdr(reinterpret_cast<const void *>(&python_is_here), &info) == 0 || info.dli_fname == nullptr) {
        return false;
    }
    const std::string self    = info.dli_fname;
    const std::string binding = self.substr(0, self.find_last_of('/') + 1) + "_native.abi3.so";
    void *            handle  = dlopen(binding.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (handle != nullptr) {
        dlclose(handle);
    }
    return handle != nullptr;
}

void load(const void * caller) {
    if (library_of(caller) != library_of(reinterpret_cast<const void *>(&ggml_backend_dev_count))) {
        give_up("This tool has ggml inside, so the libggml that this plugin found beside it decodes nothing; use a "
                "build of llama.cpp with shared libraries (-DBUILD_SHARED_LIBS=ON).");
        return;
    }
    if (python_is_here()) {
        return;
    }
    plugin = new Plugin([](const char * name) -> const char * { return std::getenv(name); });
    if (plugin->writes_statistics()) {
        watch_signal();
    }
    if (plugin->wanted()) {
        std::atexit([] {
            if (plugin != nullptr) {
                plugin->write_statistics();
                plugin->say_goodbye();
            }
        });
    }
    serve();
}

} // namespace

ggml_backend_reg_t ggml_backend_init(void) {
    static fasa::seam::Registration registration = {
        fasa::seam::kApiVersion, get_name, get_device_count, get_device, nullptr, nullptr};
    static bool tried = false; // tools load all backends more than once; what is wrong is told once
    if (!tried) {
        tried = true;
        try {
            load(__builtin_return_address(0));
        } catch (const std::exception & e) {
            give_up(e.what());
        }
    }
    return reinterpret_cast<ggml_backend_reg_t>(&registration);
}
