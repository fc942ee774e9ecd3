// How a failure travels: C++ code throws Failure, the C boundary turns it into a status and a sentence.
#pragma once

#include <new>
#include <stdexcept>
#include <string>

#include "fasa.h"

namespace fasa {

struct Failure : std::runtime_error {
    Failure(fasa_status status, const std::string & sentence) : std::runtime_error(sentence), status(status) {}
    fasa_status status;
};

// printf-style; the sentence names the value, the limit and the way out.
[[noreturn]] void fail(fasa_status status, const char * format, ...) __attribute__((format(printf, 2, 3)));

void set_last_error(const char * sentence);

// Runs f; nothing escapes into C.
template <typename F> fasa_status guarded(F && f) noexcept {
    try {
        f();
        return FASA_STATUS_OK;
    } catch (const Failure & e) {
        set_last_error(e.what());
        return e.status;
    } catch (const std::bad_alloc &) {
        set_last_error("Not enough memory for the side index or its work space; lower n_ctx or n_fc.");
        return FASA_STATUS_MEMORY;
    } catch (const std::exception & e) {
        set_last_error(e.what());
        return FASA_STATUS_STATE;
    }
}

} // namespace fasa
