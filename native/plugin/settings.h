// What the plugin is told by the environment; docs/plugin.md lists the variables.
#pragma once

#include <functional>
#include <string>

#include "fasa.h"

namespace fasa::plugin {

struct Settings {
    std::string profile; // a file; empty: nothing is decorated
    std::string stats;   // a file; empty: none
    bool        log              = false;
    bool        cuda             = false; // serve CUDA devices too
    bool        min_ctx_is_given = false; // else it follows the budget
    fasa_config config           = {};    // n_fc 0: the profile's own
};

using Environment = std::function<const char *(const char * name)>; // nullptr: not set

// An empty variable is as one that is not set. Throws a Failure that names the variable, its value and its limit.
Settings read_settings(const Environment & get);

} // namespace fasa::plugin
