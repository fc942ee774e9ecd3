#include "settings.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>

#include "session.h"
#include "status.h"

namespace fasa::plugin {

namespace {

// Settings of fasa_config that are plain numbers, with what they are when nobody says. check_config() knows more
// limits, and tells them by the names of fasa_config, which are those of the variables.
struct Number {
    const char * name;
    int32_t fasa_config::* field;
    int32_t                otherwise, low, high;
};

const Number kNumbers[] = {
    {"PYFASA_BUDGET", &fasa_config::budget, FASA_DEFAULT_BUDGET, 1, INT32_MAX},
    {"PYFASA_N_FC", &fasa_config::n_fc, 0, 1, FASA_MAX_HEAD_DIM / 2},
    {"PYFASA_BITS", &fasa_config::bits, 0, 1, 8},
    {"PYFASA_MIN_CTX", &fasa_config::min_ctx, -1, 0, INT32_MAX},
    {"PYFASA_MAX_ROWS", &fasa_config::max_rows, FASA_DEFAULT_MAX_ROWS, 0, FASA_MAX_ROWS},
    {"PYFASA_SINKS", &fasa_config::sinks, FASA_DEFAULT_SINKS, 0, INT32_MAX},
    {"PYFASA_RECENT", &fasa_config::recent, FASA_DEFAULT_RECENT, 0, INT32_MAX},
    {"PYFASA_HEAD_START", &fasa_config::head_start, 1, 0, 1},
    {"PYFASA_THREADS", &fasa_config::n_threads, 0, 0, 4096},
    {"PYFASA_VERIFY", &fasa_config::verify, 0, 0, 1},
};

std::string text(const Environment & get, const char * name) {
    const char * value = get(name);
    return value != nullptr ? value : "";
}

int32_t number(const Environment & get, const char * name, int32_t otherwise, int32_t low, int32_t high) {
    const std::string value = text(get, name);
    if (value.empty()) {
        return otherwise;
    }
    char * end         = nullptr;
    errno              = 0;
    const long long x  = std::strtoll(value.c_str(), &end, 10);
    const bool      ok = *end == '\0' && errno == 0 && x >= low && x <= high;
    if (!ok) {
        fail(FASA_STATUS_ARGUMENT, "%s is '%s'; it must be a whole number from %d to %d, or unset.", name,
             value.substr(0, 40).c_str(), low, high);
    }
    return static_cast<int32_t>(x);
}

} // namespace

Settings read_settings(const Environment & get) {
    Settings s;
    s.profile        = text(get, "PYFASA_PROFILE");
    s.stats          = text(get, "PYFASA_STATS");
    s.log            = number(get, "PYFASA_LOG", 0, 0, 1) != 0;
    s.cuda           = text(get, "PYFASA_CUDA") == "1"; // other values are the core's to read
    s.config.enabled = 1;
    s.config.isa     = FASA_ISA_AUTO;
    for (const Number & n : kNumbers) {
        s.config.*n.field = number(get, n.name, n.otherwise, n.low, n.high);
    }
    s.min_ctx_is_given = s.config.min_ctx >= 0;
    if (!s.min_ctx_is_given) {
        s.config.min_ctx =
            static_cast<int32_t>(std::min<int64_t>(int64_t{FASA_PAYS_FROM} * s.config.budget, INT32_MAX));
    }
    check_config(s.config);
    return s;
}

} // namespace fasa::plugin
