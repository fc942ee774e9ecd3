// attend, written once over a vector type V and the traits of the cache types.
//
// Tiles of 64 cells: logits with K rows read once, one rescale of the state per tile, then V rows in slices of 32 or
// 64 dims whose sums stay in registers. Rows are far apart in memory; each is prefetched kAhead cells before its turn.

struct RowF16 {
    static constexpr int kBlock = 64; // bytes of 32 values
    struct Block {
        const uint8_t * p;
        typename V::F   at(int i) const { return V::load_f16(p + 2 * V::W * i); }
        float           step() const { return 1.0f; }
    };
};

struct RowQ80 {
    static constexpr int kBlock = 34; // an f16 step, then 32 signed bytes
    struct Block {
        const uint8_t * p;
        typename V::F   at(int i) const { return V::load_i8(p + 2 + V::W * i); }
        float           step() const { return V::half(p); }
    };
};

static constexpr int kTile  = 64;
static constexpr int kAhead = 12;

static inline void prefetch_row(const uint8_t * row, int bytes) {
    for (int i = 0; i < bytes; i += 64) {
        __builtin_prefetch(row + i);
    }
    if (bytes % 64 != 0) { // a row that does not start on a cache line reaches into one more
        __builtin_prefetch(row + bytes - 1);
    }
}

template <typename R> static inline float dot_row(const uint8_t * row, const float * q, int n_block) {
    constexpr int NV  = 32 / V::W;
    typename V::F acc = V::set(0.0f);
    for (int b = 0; b < n_block; ++b) {
        const typename R::Block block{row + b * R::kBlock};
        typename V::F           sum = V::mul(block.at(0), V::load(q + 32 * b));
        for (int i = 1; i < NV; ++i) {
            sum = V::fma(block.at(i), V::load(q + 32 * b + V::W * i), sum);
        }
        acc = V::fma(sum, V::set(block.step()), acc);
    }
    return V::sum(acc);
}

// o += sum over the tile of weight * V, for NB blocks of 32 dims starting at block b.
template <typename R, int NB>
static inline void add_slice(const uint8_t * const * rows, const float * weights, int n, int b, float * o) {
    constexpr int NV = 32 / V::W;
    typename V::F acc[NB * NV];
    for (int i = 0; i < NB * NV; ++i) {
        acc[i] = V::load(o + 32 * b + V::W * i);
    }
    for (int t = 0; t < n; ++t) {
        for (int j = 0; j < NB; ++j) {
            const typename R::Block block{rows[t] + (b + j) * R::kBlock};
            const typename V::F     w = V::set(weights[t] * block.step());
            for (int i = 0; i < NV; ++i) {
                acc[j * NV + i] = V::fma(block.at(i), w, acc[j * NV + i]);
            }
        }
    }
    for (int i = 0; i < NB * NV; ++i) {
        V::store(o + 32 * b + V::W * i, acc[i]);
    }
}

// DIM: head size of both K and V known when compiling, so that the loops over a row unroll; 0: any.
template <typename RK, typename RV, int DIM>
static void attend_dim(const fasa_kv & kv, const float * q, const int32_t * cells, int64_t n, float * m, float * d,
                       float * o) {
    const auto * k       = static_cast<const uint8_t *>(kv.k);
    const auto * v       = static_cast<const uint8_t *>(kv.v);
    const int    k_block = (DIM != 0 ? DIM : kv.k_dim) / 32;
    const int    v_block = (DIM != 0 ? DIM : kv.v_dim) / 32;
    const int    k_bytes = k_block * RK::kBlock;
    const int    v_bytes = v_block * RV::kBlock;
    const float  scale   = kv.softcap != 0.0f ? kv.scale / kv.softcap : kv.scale;
    for (int64_t first = 0; first < n; first += kTile) {
        const int       size = static_cast<int>(std::min<int64_t>(kTile, n - first));
        float           weights[kTile];
        const uint8_t * rows[kTile];
        float           top = *m;
        for (int t = 0; t < size; ++t) {
            const int64_t cell = cells[first + t];
            rows[t]            = v + cell * kv.v_stride;
            prefetch_row(rows[t], v_bytes);
            if (first + t + kAhead < n) {
                prefetch_row(k + cells[first + t + kAhead] * kv.k_stride, k_bytes);
            }
            float logit = scale * dot_row<RK>(k + cell * kv.k_stride, q, k_block);
            logit       = kv.softcap != 0.0f ? kv.softcap * std::tanh(logit) : logit;
            logit += kv.mask != nullptr ? V::half(kv.mask + cell) : 0.0f;
            weights[t] = logit;
            top        = std::max(top, logit);
        }
        if (!(top > kHidden)) {
            continue; // nothing visible yet: exp(-inf - -inf) would be NaN
        }
        if (top > *m) {
            const float old = std::exp(*m - top);
            *m              = top;
            *d *= old;
            for (int i = 0; i < 32 * v_block; i += V::W) {
                V::store(o + i, V::mul(V::load(o + i), V::set(old)));
            }
        }
        std::fill(weights + size, weights + kTile, kHidden);
        typename V::F sum = V::set(0.0f);
        for (int t = 0; t < size; t += V::W) {
            const typename V::F w = V::exp(V::sub(V::load(weights + t), V::set(top)));
            V::store(weights + t, w);
            sum = V::add(sum, w);
        }
        *d += V::sum(sum);
        int b = 0;
        for (; b + 2 <= v_block; b += 2) {
            add_slice<RV, 2>(rows, weights, size, b, o);
        }
        if (b < v_block) {
            add_slice<RV, 1>(rows, weights, size, b, o);
        }
    }
}

template <typename RK, typename RV>
static void attend_types(const fasa_kv & kv, const float * q, const int32_t * cells, int64_t n, float * m, float * d,
                         float * o) {
    if (kv.k_dim == 64 && kv.v_dim == 64) {
        attend_dim<RK, RV, 64>(kv, q, cells, n, m, d, o);
    } else if (kv.k_dim == 128 && kv.v_dim == 128) {
        attend_dim<RK, RV, 128>(kv, q, cells, n, m, d, o);
    } else {
        attend_dim<RK, RV, 0>(kv, q, cells, n, m, d, o);
    }
}

template <typename RK>
static void attend_k(const fasa_kv & kv, const float * q, const int32_t * cells, int64_t n, float * m, float * d,
                     float * o) {
    if (kv.v_type == FASA_KV_F16) {
        attend_types<RK, RowF16>(kv, q, cells, n, m, d, o);
    } else {
        attend_types<RK, RowQ80>(kv, q, cells, n, m, d, o);
    }
}

static void attend(const fasa_kv & kv, const float * q, const int32_t * cells, int64_t n, float * m, float * d,
                   float * o) {
    if (kv.k_type == FASA_KV_F16) {
        attend_k<RowF16>(kv, q, cells, n, m, d, o);
    } else {
        attend_k<RowQ80>(kv, q, cells, n, m, d, o);
    }
}
