// 32 small integers in one register, for both x86 vector files; included inside their namespaces.
struct Codes256 {
    using Codes = __m256i;

    static Codes nibbles(const uint8_t * p) {
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(packed, 4), packed), _mm256_set1_epi8(15));
    }
    static Codes minus(Codes c, int n) { return _mm256_sub_epi8(c, _mm256_set1_epi8(static_cast<char>(n))); }
    // Bit i of the word becomes bit 4 of code i: each byte gets the byte of the word that holds its bit.
    static Codes fifth_bits(Codes c, const uint8_t * word) {
        int32_t bits;
        std::memcpy(&bits, word, sizeof(bits));
        const __m256i from  = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i mine  = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
        const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), from);
        const __m256i on    = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, mine), mine);
        return _mm256_or_si256(c, _mm256_and_si256(on, _mm256_set1_epi8(16)));
    }
    static Codes lookup(Codes c, const int8_t * table) {
        const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), c);
    }
};
