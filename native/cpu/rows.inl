// How rows of K and V are read into registers, one traits struct per cache type over the vector type V.
//
//   kBytes        of a block of 32 values
//   at(i)         values W * i .. of the block, before step() and low()
//   step(), low() the value is step * at + low; kLow says whether low is anything but zero

struct RowF32 {
    static constexpr int  kType  = FASA_KV_F32;
    static constexpr int  kBytes = 128;
    static constexpr bool kLow   = false;
    const uint8_t *       p;
    typename V::F         at(int i) const { return V::load_f32(p + 4 * V::W * i); }
    float                 step() const { return 1.0f; }
};

struct RowF16 {
    static constexpr int  kType  = FASA_KV_F16;
    static constexpr int  kBytes = 64;
    static constexpr bool kLow   = false;
    const uint8_t *       p;
    typename V::F         at(int i) const { return V::load_f16(p + 2 * V::W * i); }
    float                 step() const { return 1.0f; }
};

struct RowBf16 {
    static constexpr int  kType  = FASA_KV_BF16;
    static constexpr int  kBytes = 64;
    static constexpr bool kLow   = false;
    const uint8_t *       p;
    typename V::F         at(int i) const { return V::load_bf16(p + 2 * V::W * i); }
    float                 step() const { return 1.0f; }
};

struct RowQ80 {
    static constexpr int  kType  = FASA_KV_Q8_0;
    static constexpr int  kBytes = 34;
    static constexpr bool kLow   = false;
    const uint8_t *       p;
    typename V::F         at(int i) const { return V::load_i8(p + 2 + V::W * i); }
    float                 step() const { return V::half(p); }
};

// The 4- and 5-bit types: 32 small integers are made first, then widened a register at a time.
struct RowQ40 {
    static constexpr int  kType  = FASA_KV_Q4_0;
    static constexpr int  kBytes = 18;
    static constexpr bool kLow   = false;
    const uint8_t *       p;
    typename V::Codes     codes = V::minus(V::nibbles(p + 2), 8);
    typename V::F         at(int i) const { return V::widen(codes, i); }
    float                 step() const { return V::half(p); }
};

struct RowQ41 {
    static constexpr int  kType  = FASA_KV_Q4_1;
    static constexpr int  kBytes = 20;
    static constexpr bool kLow   = true;
    const uint8_t *       p;
    typename V::Codes     codes = V::nibbles(p + 4);
    typename V::F         at(int i) const { return V::widen(codes, i); }
    float                 step() const { return V::half(p); }
    float                 low() const { return V::half(p + 2); }
};

struct RowQ50 {
    static constexpr int  kType  = FASA_KV_Q5_0;
    static constexpr int  kBytes = 22;
    static constexpr bool kLow   = false;
    const uint8_t *       p;
    typename V::Codes     codes = V::minus(V::fifth_bits(V::nibbles(p + 6), p + 2), 16);
    typename V::F         at(int i) const { return V::widen(codes, i); }
    float                 step() const { return V::half(p); }
};

struct RowQ51 {
    static constexpr int  kType  = FASA_KV_Q5_1;
    static constexpr int  kBytes = 24;
    static constexpr bool kLow   = true;
    const uint8_t *       p;
    typename V::Codes     codes = V::fifth_bits(V::nibbles(p + 8), p + 4);
    typename V::F         at(int i) const { return V::widen(codes, i); }
    float                 step() const { return V::half(p); }
    float                 low() const { return V::half(p + 2); }
};

struct RowIq4Nl {
    static constexpr int  kType  = FASA_KV_IQ4_NL;
    static constexpr int  kBytes = 18;
    static constexpr bool kLow   = false;
    const uint8_t *       p;
    typename V::Codes     codes = V::lookup(V::nibbles(p + 2), kIq4Values);
    typename V::F         at(int i) const { return V::widen(codes, i); }
    float                 step() const { return V::half(p); }
};
