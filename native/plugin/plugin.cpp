#include "plugin.h"

#include <cstdio>

#include "../status.h"
#include "statistics.h"

namespace fasa {
void self_test();
}

namespace fasa::plugin {

void print_line(const std::string & sentence) { std::fprintf(stderr, "pyfasa: %s\n", sentence.c_str()); }

Plugin::Plugin(const Environment & get) : settings_(read_settings(get)) {
    if (settings_.profile.empty()) {
        if (!settings_.stats.empty()) {
            fail(FASA_STATUS_ARGUMENT, "PYFASA_STATS is set and PYFASA_PROFILE is not, so there is nothing to count; "
                                       "set both: pyfasa env MODEL prints the lines.");
        }
        return;
    }
    profile_  = std::make_unique<ProfileFile>(settings_.profile);
    sessions_ = std::make_unique<Sessions>(settings_, *profile_, [this](const std::string & difference) {
        tell("a model here is not '" + profile_->name + "' of " + settings_.profile + ": " + difference +
             ". It is decoded densely; give its own profile, or none.");
    });
}

// ---- serving -----------------------------------------------------------------------------------------------

void Plugin::serve() {
    if (!wanted() || ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) == nullptr) {
        return;
    }
    if (!proved_) {
        self_test();
        proved_ = true;
        log("FASA for '" + profile_->name + "', profile " + settings_.profile + ", budget " +
            std::to_string(settings_.config.budget) + ", from " + std::to_string(settings_.config.min_ctx) +
            " visible cells on");
    }
    static Sessions *          sessions = nullptr;
    static const SessionSource source   = {
        [](ggml_backend_dev_t device) { return sessions->of_new_backend(device); },
        [](Session * session) { sessions->backend_freed(session); },
    };
    sessions = sessions_.get();
    serve_all(&source);
}

// ---- telling -----------------------------------------------------------------------------------------------

void Plugin::tell(const std::string & sentence) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (told_.insert(sentence).second) {
        print_line(sentence);
    }
}

void Plugin::log(const std::string & sentence) const {
    if (settings_.log) {
        print_line(sentence);
    }
}

void Plugin::write_statistics() {
    if (!writes_statistics()) {
        return;
    }
    const std::string problem = write_file(settings_.stats, to_json(sessions_->totals(), settings_, *profile_));
    if (!problem.empty()) {
        tell(problem);
    }
}

void Plugin::say_goodbye() {
    if (!wanted() || !settings_.log) {
        return;
    }
    const Totals        t = sessions_->totals();
    const fasa_counters c = t.counters;
    std::string         text =
        std::to_string(t.n_sessions) + " sessions, " + std::to_string(c.graphs) + " graphs; attention nodes:";
    for (int i = 0; i < FASA_REASON_COUNT; ++i) {
        if (c.nodes[i] != 0) {
            text += " " + std::string(fasa_reason_name(i)) + " " + std::to_string(c.nodes[i]);
        }
    }
    log(text + "; cells attended " + std::to_string(c.cells_attended) + " of " + std::to_string(c.cells_visible));
}

} // namespace fasa::plugin
