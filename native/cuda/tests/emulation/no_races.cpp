// In the place of races.cpp: nobody looks for races.
#include <cstddef>

namespace emulation {

void note(const void *, size_t, bool, bool) {}

} // namespace emulation
