#include "sessions.h"

#include <algorithm>
#include <exception>

#include "../status.h"
#include "statistics.h"

namespace fasa::plugin {

Sessions::Sessions(const Settings & settings, const ProfileFile & profile, Tell tell)
    : settings_(settings), profile_(profile), tell_(std::move(tell)) {
    make(nullptr); // what is wrong with profile or settings is told now, not when a model is loaded
}

std::unique_ptr<Session> Sessions::make(ggml_backend_dev_t first) const {
    fasa_config config = settings_.config;
    if (config.n_fc > profile_.profile.n_ranked) {
        fail(FASA_STATUS_ARGUMENT, "PYFASA_N_FC is %d; the profile ranks %d chunks.", config.n_fc,
             profile_.profile.n_ranked);
    }
    config.n_fc = config.n_fc != 0 ? config.n_fc : profile_.n_fc;
    if (!settings_.min_ctx_is_given && first != nullptr &&
        ggml_backend_dev_type(first) != GGML_BACKEND_DEVICE_TYPE_CPU) {
        const fasa_model & model = profile_.model;
        const int64_t      n     = pays_from_cuda(FASA_KV_F16, model.n_head / model.n_head_kv); // the most it could be
        config.min_ctx           = static_cast<int32_t>(std::min<int64_t>(n * config.budget, INT32_MAX));
    }
    auto session = std::make_unique<Session>(&profile_.profile, config);
    session->check_model(profile_.model, tell_);
    return session;
}

Session * Sessions::of_new_backend(ggml_backend_dev_t device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool                        last = ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
    // Only where asked for: kernels of a device have not been run inside a tool.
    if (!last && !settings_.cuda) {
        return nullptr;
    }
    const auto begun   = open_.find(std::this_thread::get_id());
    Session *  session = begun != open_.end() ? begun->second : nullptr;
    try {
        if (session == nullptr) {
            auto made = make(device);
            session   = made.get();
            register_session(session);
            sessions_[session] = std::move(made);
            ++gone_.n_sessions;
        }
        if (last) {
            open_.erase(std::this_thread::get_id());
        } else {
            open_[std::this_thread::get_id()] = session;
        }
    } catch (const std::exception & e) {
        tell_(e.what());
        return nullptr;
    }
    return session;
}

void Sessions::backend_freed(Session * session) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto                        it = sessions_.find(session);
    if (it == sessions_.end() || backends_of(session) > 0) {
        return;
    }
    for (auto open = open_.begin(); open != open_.end();) {
        open = open->second == session ? open_.erase(open) : std::next(open);
    }
    add(session->counters(), &gone_.counters);
    add(session->timings(), &gone_.timings);
    unregister_session(session);
    sessions_.erase(it);
}

Totals Sessions::totals() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    Totals                            t = gone_;
    t.n_alive                           = static_cast<int64_t>(sessions_.size());
    for (const auto & entry : sessions_) {
        add(entry.first->counters(), &t.counters);
        add(entry.first->timings(), &t.timings);
    }
    return t;
}

} // namespace fasa::plugin
