// Blocks are as in ggml-common.h: an f16 step, for the _1 types an f16 minimum, for 5 bits a word of fifth bits, then
// the codes. Code i of 4 bits is the low nibble of byte i, code 16 + i its high nibble.
#include "kv_type.h"

#include <cstring>

#include "half.h"

namespace fasa {

namespace {

float half_at(const uint8_t * p) {
    uint16_t h;
    std::memcpy(&h, p, sizeof(h));
    return half_to_float(h);
}

int32_t nibble(const uint8_t * codes, int i) { return i < 16 ? codes[i] & 15 : codes[i - 16] >> 4; }

int32_t fifth(const uint8_t * word, int i) {
    uint32_t bits;
    std::memcpy(&bits, word, sizeof(bits));
    return static_cast<int32_t>(bits >> i & 1u) << 4;
}

void from_f32(const uint8_t * block, float * out) { std::memcpy(out, block, sizeof(float) * kKvBlock); }

void from_f16(const uint8_t * block, float * out) {
    for (int i = 0; i < kKvBlock; ++i) {
        out[i] = half_at(block + 2 * i);
    }
}

void from_bf16(const uint8_t * block, float * out) {
    for (int i = 0; i < kKvBlock; ++i) {
        const uint32_t bits = static_cast<uint32_t>(block[2 * i]) << 16 | static_cast<uint32_t>(block[2 * i + 1]) << 24;
        std::memcpy(out + i, &bits, sizeof(float));
    }
}

template <typename Code> void from_codes(float step, float low, float * out, Code && code) {
    for (int i = 0; i < kKvBlock; ++i) {
        out[i] = step * static_cast<float>(code(i)) + low;
    }
}

void from_q8_0(const uint8_t * b, float * out) {
    from_codes(half_at(b), 0.0f, out, [=](int i) { return static_cast<int8_t>(b[2 + i]); });
}

void from_q4_0(const uint8_t * b, float * out) {
    from_codes(half_at(b), 0.0f, out, [=](int i) { return nibble(b + 2, i) - 8; });
}

void from_q4_1(const uint8_t * b, float * out) {
    from_codes(half_at(b), half_at(b + 2), out, [=](int i) { return nibble(b + 4, i); });
}

void from_q5_0(const uint8_t * b, float * out) {
    from_codes(half_at(b), 0.0f, out, [=](int i) { return (nibble(b + 6, i) | fifth(b + 2, i)) - 16; });
}

void from_q5_1(const uint8_t * b, float * out) {
    from_codes(half_at(b), half_at(b + 2), out, [=](int i) { return nibble(b + 8, i) | fifth(b + 4, i); });
}

void from_iq4_nl(const uint8_t * b, float * out) {
    from_codes(half_at(b), 0.0f, out, [=](int i) { return kIq4Values[nibble(b + 2, i)]; });
}

const KvType kTypes[] = {
    {FASA_KV_F32, 128, from_f32},  {FASA_KV_F16, 64, from_f16},   {FASA_KV_BF16, 64, from_bf16},
    {FASA_KV_Q8_0, 34, from_q8_0}, {FASA_KV_Q4_0, 18, from_q4_0}, {FASA_KV_Q4_1, 20, from_q4_1},
    {FASA_KV_Q5_0, 22, from_q5_0}, {FASA_KV_Q5_1, 24, from_q5_1}, {FASA_KV_IQ4_NL, 18, from_iq4_nl},
};

} // namespace

const KvType * kv_type(int32_t id) {
    for (const KvType & type : kTypes) {
        if (type.id == id) {
            return &type;
        }
    }
    return nullptr;
}

int64_t kv_row_bytes(int32_t type, int64_t n) {
    const KvType * t = kv_type(type);
    return t != nullptr ? n / kKvBlock * t->block_bytes : 0;
}

void kv_to_float(int32_t type, const void * row, int32_t n, float * out) {
    const KvType * t = kv_type(type);
    const auto *   p = static_cast<const uint8_t *>(row);
    for (int32_t b = 0; b < n / kKvBlock; ++b) {
        t->block_to_float(p + static_cast<int64_t>(b) * t->block_bytes, out + static_cast<int64_t>(b) * kKvBlock);
    }
}

} // namespace fasa
