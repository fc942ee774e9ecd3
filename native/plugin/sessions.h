// Which sessions exist. Nothing tells a plugin of llama_contexts, but each creates its backends on one thread, those of
// the GPUs first and that of the CPU last: these share a session, which goes when the last of them is freed. An
// rpc-server has one backend per device, and so one session, for all clients; it serves them one after the other.
#pragma once

#include <ggml-backend.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "../backend.h"
#include "../profile_file.h"
#include "../session.h"
#include "settings.h"

namespace fasa::plugin {

// Sums over all sessions, those that are gone included.
struct Totals {
    int64_t       n_sessions = 0; // ever
    int64_t       n_alive    = 0;
    fasa_counters counters   = {};
    fasa_timings  timings    = {};
};

class Sessions {
  public:
    using Tell = std::function<void(const std::string & sentence)>;

    // The profile and `tell` must live as long. Every session has the settings' configuration.
    Sessions(const Settings & settings, const ProfileFile & profile, Tell tell);

    // As SessionSource has them. A failure is told, and the backend stays as it is.
    Session * of_new_backend(ggml_backend_dev_t device);
    void      backend_freed(Session * session);

    Totals totals() const;

  private:
    std::unique_ptr<Session> make(ggml_backend_dev_t first) const;

    const Settings &                              settings_;
    const ProfileFile &                           profile_;
    Tell                                          tell_;
    mutable std::mutex                            mutex_;
    std::map<Session *, std::unique_ptr<Session>> sessions_;
    std::map<std::thread::id, Session *>          open_; // waiting for the CPU backend of their context
    Totals                                        gone_;
};

} // namespace fasa::plugin
