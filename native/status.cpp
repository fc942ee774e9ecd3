#include "status.h"

#include <cstdarg>
#include <cstdio>

namespace fasa {

namespace {
// Fixed storage: reporting "out of memory" must not allocate.
thread_local char last_error[512] = "";
} // namespace

void set_last_error(const char * sentence) { std::snprintf(last_error, sizeof(last_error), "%s", sentence); }

void fail(fasa_status status, const char * format, ...) {
    char    sentence[sizeof(last_error)];
    va_list args;
    va_start(args, format);
    std::vsnprintf(sentence, sizeof(sentence), format, args);
    va_end(args);
    throw Failure(status, sentence);
}

} // namespace fasa

const char * fasa_last_error(void) { return fasa::last_error; }
