// Memory that is called into a cache before its turn.

// LEVEL 3 is the first-level cache; 2 the second, which has many more lines on their way at once.
template <int LEVEL> static inline void prefetch(const uint8_t * at, int64_t bytes) {
    constexpr int kRead = 0;
    for (int64_t i = 0; i < bytes; i += 64) {
        __builtin_prefetch(at + i, kRead, LEVEL);
    }
    if (bytes % 64 != 0) { // what does not start on a cache line reaches into one more
        __builtin_prefetch(at + bytes - 1, kRead, LEVEL);
    }
}
