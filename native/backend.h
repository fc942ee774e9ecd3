// The decorator: puts Session::compute in front of the CPU backend's graph_compute, and watches the buffers in which
// K caches live. Everything is undone when its session ends.
#pragma once

#include <ggml-backend.h>

namespace fasa {

class Session;

// Where sessions come from in a process without Python: each backend that a served device creates asks for one.
struct SessionSource {
    Session * (*of_new_backend)(ggml_backend_dev_t device); // nullptr: the backend stays as it is
    void (*backend_freed)(Session * session);               // one that was given out above
};

// The CPU device is decorated while at least one session is registered.
void register_session(Session * session);
void unregister_session(Session * session); // undecorates its backends and buffers

// For the rest of the process; again to reach devices that were registered since. Needs a CPU device. nullptr ends it,
// for tests: devices are as they were once the last session is gone.
void serve_all(const SessionSource * source);

// Backends that this thread creates from now on belong to the session; nullptr ends it.
void arm(Session * session);

int backends_of(const Session * session);
// False when another session watches the buffer already: its writes would go unnoticed here.
bool watch_buffer(ggml_backend_buffer_t buffer, Session * session);

// Fails with a sentence when the structs behind the CPU device are not those of seam.h.
void check_seam();

} // namespace fasa
