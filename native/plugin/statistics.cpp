#include "statistics.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <iterator>

namespace fasa::plugin {

namespace {

template <typename Struct> struct Field {
    const char * name;
    int64_t Struct::* field;
};

const Field<fasa_counters> kCounters[] = {
    {"graphs", &fasa_counters::graphs},
    {"cells_visible", &fasa_counters::cells_visible},
    {"cells_attended", &fasa_counters::cells_attended},
    {"cells_indexed", &fasa_counters::cells_indexed},
    {"cells_verified", &fasa_counters::cells_verified},
    {"verify_failures", &fasa_counters::verify_failures},
    {"stale_events", &fasa_counters::stale_events},
    {"index_bytes", &fasa_counters::index_bytes},
    {"kv_bytes", &fasa_counters::kv_bytes},
    {"bytes_scored", &fasa_counters::bytes_scored},
    {"bytes_attended", &fasa_counters::bytes_attended},
    {"head_starts", &fasa_counters::head_starts},
    {"head_starts_undone", &fasa_counters::head_starts_undone},
};

const Field<fasa_timings> kTimings[] = {
    {"index", &fasa_timings::index},   {"score", &fasa_timings::score}, {"select", &fasa_timings::select},
    {"attend", &fasa_timings::attend}, {"wait", &fasa_timings::wait},   {"plan", &fasa_timings::plan},
    {"total", &fasa_timings::total},
};

// A struct that grows must grow its table here: all fields are int64_t, so sizes tell.
static_assert(sizeof(fasa_counters) == (std::size(kCounters) + FASA_REASON_COUNT) * sizeof(int64_t));
static_assert(sizeof(fasa_timings) == std::size(kTimings) * sizeof(int64_t));

std::string quoted(const std::string & text) {
    std::string out = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if (static_cast<unsigned char>(c) < 0x20) {
            char code[8];
            std::snprintf(code, sizeof(code), "\\u%04x", static_cast<unsigned>(c));
            out += code;
        } else {
            out += c;
        }
    }
    return out + '"';
}

class Object {
  public:
    explicit Object(int indent) : indent_(indent, ' ') {}

    void put(const std::string & name, const std::string & json) {
        text_ += (text_.empty() ? "" : ",") + std::string("\n") + indent_ + "  " + quoted(name) + ": " + json;
    }
    void put(const std::string & name, int64_t number) { put(name, std::to_string(number)); }

    std::string text() const { return "{" + text_ + "\n" + indent_ + "}"; }

  private:
    std::string indent_, text_;
};

} // namespace

void add(const fasa_counters & more, fasa_counters * to) {
    for (const auto & f : kCounters) {
        to->*f.field += more.*f.field;
    }
    for (int i = 0; i < FASA_REASON_COUNT; ++i) {
        to->nodes[i] += more.nodes[i];
    }
}

void add(const fasa_timings & more, fasa_timings * to) {
    for (const auto & f : kTimings) {
        to->*f.field += more.*f.field;
    }
}

std::string to_json(const Totals & totals, const Settings & settings, const ProfileFile & profile) {
    const fasa_config & c = settings.config;
    Object              used(2);
    used.put("budget", c.budget);
    used.put("n_fc", c.n_fc != 0 ? c.n_fc : profile.n_fc);
    used.put("index_bits", c.bits); // 0: the profile's own
    used.put("min_ctx", c.min_ctx);
    used.put("max_rows", c.max_rows);
    used.put("sinks", c.sinks);
    used.put("recent", c.recent);
    used.put("n_threads", c.n_threads); // 0: all of the tool's
    used.put("verify", c.verify);

    Object nodes(4);
    for (int i = 0; i < FASA_REASON_COUNT; ++i) {
        nodes.put(fasa_reason_name(i), totals.counters.nodes[i]);
    }
    Object counters(2);
    for (const auto & f : kCounters) {
        counters.put(f.name, totals.counters.*f.field);
        if (f.field == &fasa_counters::graphs) {
            counters.put("nodes", nodes.text());
        }
    }
    Object timings(2);
    for (const auto & f : kTimings) {
        timings.put(f.name, totals.timings.*f.field);
    }
    Object all(0);
    all.put("pid", getpid());
    all.put("ggml", quoted(fasa_ggml_loaded()));
    all.put("profile", quoted(settings.profile));
    all.put("model", quoted(profile.name));
    all.put("settings", used.text());
    all.put("sessions", totals.n_sessions);
    all.put("sessions_alive", totals.n_alive);
    all.put("counters", counters.text());
    all.put("timings", timings.text());
    return all.text() + "\n";
}

std::string write_file(const std::string & path, const std::string & text) {
    const std::string beside = path + "." + std::to_string(getpid()) + ".tmp";
    std::FILE *       file   = std::fopen(beside.c_str(), "w");
    bool              ok     = file != nullptr && std::fwrite(text.data(), 1, text.size(), file) == text.size();
    ok                       = file != nullptr && std::fclose(file) == 0 && ok;
    if (ok && std::rename(beside.c_str(), path.c_str()) == 0) {
        return "";
    }
    const std::string why = std::strerror(errno);
    std::remove(beside.c_str());
    return "PYFASA_STATS is '" + path + "', which cannot be written: " + why + "; give a file in a folder that can.";
}

} // namespace fasa::plugin
