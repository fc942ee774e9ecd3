// What the sessions did, as JSON. Names are those of llm.fasa.counters and llm.fasa.timings in Python.
#pragma once

#include <string>

#include "sessions.h"

namespace fasa::plugin {

void add(const fasa_counters & more, fasa_counters * to);
void add(const fasa_timings & more, fasa_timings * to);

std::string to_json(const Totals & totals, const Settings & settings, const ProfileFile & profile);

// Written beside and renamed: a reader finds the old text or the new one. A sentence when that fails, else empty.
std::string write_file(const std::string & path, const std::string & text);

} // namespace fasa::plugin
