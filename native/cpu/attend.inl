// attend, written once over a vector type V and the row traits of rows.inl.
//
// Tiles of 64 cells: logits with K rows read once, one rescale of the state per tile, then V rows in slices of 32 or
// 64 dims whose sums stay in registers. Rows are far apart in memory; each is prefetched kAhead cells before its turn.

static constexpr int kTile  = 64;
static constexpr int kAhead = 24;

// Into the second-level cache, which is twice as fast here.
static inline void prefetch_row(const uint8_t * row, int bytes) { prefetch<2>(row, bytes); }

// A query as the K pass wants it; low values of a block meet the sum of its 32 query values.
struct AttendQuery {
    const float * q;
    float         sums[FASA_MAX_HEAD_DIM / kKvBlock];
};

template <typename R> static inline float dot_row(const uint8_t * row, const AttendQuery & query, int n_block) {
    constexpr int NV  = kKvBlock / V::W;
    typename V::F acc = V::set(0.0f);
    float         low = 0.0f;
    for (int b = 0; b < n_block; ++b) {
        const R       block{row + b * R::kBytes};
        const float * q   = query.q + kKvBlock * b;
        typename V::F sum = V::mul(block.at(0), V::load(q));
        for (int i = 1; i < NV; ++i) {
            sum = V::fma(block.at(i), V::load(q + V::W * i), sum);
        }
        acc = V::fma(sum, V::set(block.step()), acc);
        if constexpr (R::kLow) {
            low += block.low() * query.sums[b];
        }
    }
    return V::sum(acc) + low;
}

// Dot products of a tile. `left` cells of the selection begin here: rows beyond the tile are prefetched too, as are
// the tile's own V rows. DIM: head size known when compiling, so that the loops over a row unroll; 0: any.
template <typename R, int DIM>
static void key_pass(const fasa_kv & kv, const AttendQuery & query, const int32_t * cells, int size, int64_t left,
                     const uint8_t * const * v_rows, int v_bytes, float * dots) {
    const auto * k       = static_cast<const uint8_t *>(kv.k);
    const int    n_block = (DIM != 0 ? DIM : kv.k_dim) / kKvBlock;
    for (int t = 0; t < size; ++t) {
        prefetch_row(v_rows[t], v_bytes);
        if (t + kAhead < left) {
            prefetch_row(k + cells[t + kAhead] * kv.k_stride, n_block * R::kBytes);
        }
        dots[t] = dot_row<R>(k + cells[t] * kv.k_stride, query, n_block);
    }
}

// o += sum over the tile of weight * V, for NB blocks of 32 dims starting at block b.
template <typename R, int NB>
static inline void add_slice(const uint8_t * const * rows, const float * weights, int n, int b, float * o) {
    constexpr int NV = kKvBlock / V::W;
    typename V::F acc[NB * NV];
    float         low[NB] = {};
    for (int i = 0; i < NB * NV; ++i) {
        acc[i] = V::load(o + kKvBlock * b + V::W * i);
    }
    for (int t = 0; t < n; ++t) {
        for (int j = 0; j < NB; ++j) {
            const R             block{rows[t] + (b + j) * R::kBytes};
            const typename V::F w = V::set(weights[t] * block.step());
            for (int i = 0; i < NV; ++i) {
                acc[j * NV + i] = V::fma(block.at(i), w, acc[j * NV + i]);
            }
            if constexpr (R::kLow) {
                low[j] += weights[t] * block.low();
            }
        }
    }
    for (int i = 0; i < NB * NV; ++i) {
        V::store(o + kKvBlock * b + V::W * i, R::kLow ? V::add(acc[i], V::set(low[i / NV])) : acc[i]);
    }
}

template <typename R, int DIM>
static void value_pass(const uint8_t * const * rows, const float * weights, int n, int v_dim, float * o) {
    const int n_block = (DIM != 0 ? DIM : v_dim) / kKvBlock;
    int       b       = 0;
    for (; b + 2 <= n_block; b += 2) {
        add_slice<R, 2>(rows, weights, n, b, o);
    }
    if (b < n_block) {
        add_slice<R, 1>(rows, weights, n, b, o);
    }
}

struct RowPasses {
    int32_t                          type;
    int32_t                          block_bytes;
    decltype(&key_pass<RowF16, 0>)   key[3]; // head size 64, 128, any other
    decltype(&value_pass<RowF16, 0>) value[3];
};

template <typename R> static constexpr RowPasses passes() {
    return {R::kType,
            R::kBytes,
            {key_pass<R, 64>, key_pass<R, 128>, key_pass<R, 0>},
            {value_pass<R, 64>, value_pass<R, 128>, value_pass<R, 0>}};
}

static constexpr RowPasses kPasses[] = {passes<RowF32>(), passes<RowF16>(), passes<RowBf16>(),
                                        passes<RowQ80>(), passes<RowQ40>(), passes<RowQ41>(),
                                        passes<RowQ50>(), passes<RowQ51>(), passes<RowIq4Nl>()};

static const RowPasses & passes_of(int32_t type) { // the caller has checked that it is there
    const RowPasses * p = kPasses;
    while (p->type != type) {
        ++p;
    }
    return *p;
}

static int dim_slot(int dim) { return dim == 64 ? 0 : dim == 128 ? 1 : 2; }

// Turns dot products into logits; the rest of the tile gets no weight.
static float tile_logits(const fasa_kv & kv, const int32_t * cells, int size, float top, float * x) {
    const float scale = kv.softcap != 0.0f ? kv.scale / kv.softcap : kv.scale;
    for (int t = 0; t < size; ++t) {
        float logit = scale * x[t];
        logit       = kv.softcap != 0.0f ? kv.softcap * std::tanh(logit) : logit;
        logit += kv.mask != nullptr ? V::half(kv.mask + cells[t]) : 0.0f;
        x[t] = logit;
        top  = std::max(top, logit);
    }
    std::fill(x + size, x + kTile, kHidden);
    return top;
}

static void attend(const fasa_kv & kv, const float * q, const int32_t * cells, int64_t n, float * m, float * d,
                   float * o) {
    const RowPasses & k_rows  = passes_of(kv.k_type);
    const RowPasses & v_rows  = passes_of(kv.v_type);
    const auto        key     = k_rows.key[dim_slot(kv.k_dim)];
    const auto        value   = v_rows.value[dim_slot(kv.v_dim)];
    const int         k_bytes = kv.k_dim / kKvBlock * k_rows.block_bytes;
    const int         v_bytes = kv.v_dim / kKvBlock * v_rows.block_bytes;
    const auto *      v       = static_cast<const uint8_t *>(kv.v);
    AttendQuery       query   = {q, {}};
    for (int i = 0; i < kv.k_dim; ++i) {
        query.sums[i / kKvBlock] += q[i];
    }
    for (int64_t i = 0; i < std::min<int64_t>(kAhead, n); ++i) {
        prefetch_row(static_cast<const uint8_t *>(kv.k) + cells[i] * kv.k_stride, k_bytes);
    }
    for (int64_t first = 0; first < n; first += kTile) {
        const int       size = static_cast<int>(std::min<int64_t>(kTile, n - first));
        float           weights[kTile];
        const uint8_t * rows[kTile];
        for (int t = 0; t < size; ++t) {
            rows[t] = v + cells[first + t] * kv.v_stride;
        }
        key(kv, query, cells + first, size, n - first, rows, v_bytes, weights);
        const float top = tile_logits(kv, cells + first, size, *m, weights);
        if (!(top > kHidden)) {
            continue; // nothing visible yet: exp(-inf - -inf) would be NaN
        }
        if (top > *m) {
            const float old = std::exp(*m - top);
            *m              = top;
            *d *= old;
            for (int i = 0; i < kv.v_dim; i += V::W) {
                V::store(o + i, V::mul(V::load(o + i), V::set(old)));
            }
        }
        typename V::F sum = V::set(0.0f);
        for (int t = 0; t < size; t += V::W) {
            const typename V::F w = V::exp(V::sub(V::load(weights + t), V::set(top)));
            V::store(weights + t, w);
            sum = V::add(sum, w);
        }
        *d += V::sum(sum);
        value(rows, weights, size, kv.v_dim, o);
    }
}
