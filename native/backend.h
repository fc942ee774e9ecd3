// The decorator: puts Session::compute in front of the CPU backend's graph_compute, and watches the buffers in which
// K caches live. Everything is undone when its session ends.
#pragma once

#include <ggml-backend.h>

namespace fasa {

class Session;

// The CPU device is decorated while at least one session is registered.
void register_session(Session * session);
void unregister_session(Session * session); // undecorates its backends and buffers

// Backends that this thread creates from now on belong to the session; nullptr ends it.
void arm(Session * session);

int backends_of(const Session * session);
// False when another session watches the buffer already: its writes would go unnoticed here.
bool watch_buffer(ggml_backend_buffer_t buffer, Session * session);

// Fails with a sentence when the structs behind the CPU device are not those of seam.h.
void check_seam();

} // namespace fasa
