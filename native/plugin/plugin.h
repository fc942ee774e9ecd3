// The plugin of a process: settings, profile, sessions, and what is told to whom.
#pragma once

#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "../profile_file.h"
#include "sessions.h"
#include "settings.h"

namespace fasa::plugin {

class Plugin {
  public:
    // Reads settings and profile and proves that this ggml can be decorated. Throws a Failure.
    explicit Plugin(const Environment & get);

    bool wanted() const { return profile_ != nullptr; } // a profile was asked for
    bool writes_statistics() const { return wanted() && !settings_.stats.empty(); }

    // Decorates devices that are there and were not before; without a CPU device it waits for one. Throws a Failure.
    void serve();

    void write_statistics();
    void say_goodbye(); // with PYFASA_LOG: what was done

    // One line on stderr; each sentence once.
    void tell(const std::string & sentence);

  private:
    void log(const std::string & sentence) const;

    Settings                     settings_;
    std::unique_ptr<ProfileFile> profile_;
    std::unique_ptr<Sessions>    sessions_;
    bool                         proved_ = false;
    std::mutex                   mutex_;
    std::set<std::string>        told_;
};

void print_line(const std::string & sentence); // pyfasa: <sentence>, on stderr

} // namespace fasa::plugin
