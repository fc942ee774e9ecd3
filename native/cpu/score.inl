// score, written once over a vector type V (see portable.cpp, avx2.cpp, avx512.cpp).
//
// A 32-bit lane is a cell. Per quad and 32 cells the codes are unpacked once and multiplied with NQ queries' quads;
// byte products accumulate in V::Acc and are widened before they could overflow. Work is 1 multiply-accumulate
// instruction (2 on AVX2) per 4 * V::W code bytes and query; reads are block_bytes / 64 per cell, once per query tile.

// Codes of quad j for the cells of a half block. With 1 bit, quads 2i and 2i + 1 share their bytes.
template <int BITS> static inline void unpack(const uint8_t * quads, int j, int half, typename V::Bytes * codes) {
    constexpr int   NG   = 16 / V::W; // vectors per group of 16 cells
    const uint8_t * quad = quads + (BITS == 1 ? j / 2 * 64 : j * FASA_BLOCK_CELLS * 4 * BITS / 8);
    if constexpr (BITS == 8) {
        for (int v = 0; v < 2 * NG; ++v) {
            codes[v] = V::load_bytes(quad + 128 * half + 4 * V::W * v);
        }
    } else {
        constexpr int kMask = (1 << BITS) - 1;
        const int     shift = BITS == 4 ? 0 : BITS == 2 ? 4 * half : 4 * (j % 2) + 2 * half;
        const auto *  raw   = quad + (BITS == 4 ? 64 * half : 0);
        for (int v = 0; v < NG; ++v) {
            const typename V::Bytes bytes = V::load_bytes(raw + 4 * V::W * v);
            codes[v]                      = V::field(bytes, shift, kMask);
            codes[NG + v]                 = V::field(bytes, shift + BITS, kMask);
        }
    }
}

// Adds one segment's scores of 32 cells to out[NQ][NV].
template <int BITS, int NQ>
static inline void score_half(const Segment & segment, int s, const uint8_t * block, int half,
                              const ScoreQuery * const * queries, typename V::F (*out)[32 / V::W]) {
    constexpr int   NV    = 32 / V::W;
    const uint8_t * steps = block + segment.offset;
    const uint8_t * quads = steps + kStepsBytes;
    const int8_t *  q_codes[NQ];
    typename V::F   q_step[NQ];
    typename V::F   bias[NQ];
    for (int q = 0; q < NQ; ++q) {
        q_codes[q] = queries[q]->codes + segment.slot;
        q_step[q]  = V::set(queries[q]->step[s]);
        bias[q]    = V::set(queries[q]->bias[s]);
    }
    for (int first = 0; first < segment.n_quad;) {
        const int       end = std::min(segment.n_quad, first + V::max_macs(BITS));
        typename V::Acc acc[NQ][NV];
        for (int q = 0; q < NQ; ++q) {
            for (int v = 0; v < NV; ++v) {
                acc[q][v] = V::acc_zero();
            }
        }
        for (int j = first; j < end; ++j) {
            typename V::Bytes codes[NV];
            unpack<BITS>(quads, j, half, codes);
            for (int q = 0; q < NQ; ++q) {
                const typename V::Bytes four = V::quad(q_codes[q] + 4 * j);
                for (int v = 0; v < NV; ++v) {
                    acc[q][v] = V::mac(acc[q][v], codes[v], four);
                }
            }
        }
        for (int v = 0; v < NV; ++v) {
            const typename V::F step = V::load_steps(steps + 32 * half + V::W * v);
            for (int q = 0; q < NQ; ++q) {
                out[q][v] = V::fma(step, V::fms(V::total(acc[q][v]), q_step[q], bias[q]), out[q][v]);
            }
        }
        first = end;
        for (int q = 0; q < NQ; ++q) {
            bias[q] = V::set(0.0f); // taken off once
        }
    }
}

template <int NQ>
static void score_block(const Layout & layout, const uint8_t * block, uint64_t visible,
                        const ScoreQuery * const * queries, float * const * scores, float * const * peaks) {
    constexpr int NV = 32 / V::W;
    typename V::F peak[NQ];
    for (int q = 0; q < NQ; ++q) {
        peak[q] = V::set(kHidden);
    }
    for (int half = 0; half < 2; ++half) {
        typename V::F out[NQ][NV];
        for (int q = 0; q < NQ; ++q) {
            for (int v = 0; v < NV; ++v) {
                out[q][v] = V::set(0.0f);
            }
        }
        for (int s = 0; s < static_cast<int>(layout.segments.size()); ++s) {
            const Segment & segment = layout.segments[s];
            switch (segment.bits) {
                case 1: score_half<1, NQ>(segment, s, block, half, queries, out); break;
                case 2: score_half<2, NQ>(segment, s, block, half, queries, out); break;
                case 4: score_half<4, NQ>(segment, s, block, half, queries, out); break;
                default: score_half<8, NQ>(segment, s, block, half, queries, out); break;
            }
        }
        for (int v = 0; v < NV; ++v) {
            const int      first = 32 * half + V::W * v;
            const uint32_t bits  = static_cast<uint32_t>(visible >> first) & V::kLanes;
            for (int q = 0; q < NQ; ++q) {
                const typename V::F x = bits == V::kLanes ? out[q][v] : V::keep(bits, out[q][v], kHidden);
                V::store(scores[q] + first, x);
                peak[q] = V::max(x, peak[q]); // this order keeps the peak when x is NaN
            }
        }
    }
    for (int q = 0; q < NQ; ++q) {
        V::store_peaks(peaks[q], peak[q]);
    }
}

// Blocks that are on their way to the first-level cache while one is scored. Processors fetch ahead by themselves, but
// not across pages: without this, two threads scored 16,384 cells of eight heads in 160 us instead of 97.
static constexpr int64_t kAheadBlocks = 3;

static void score(const Layout & layout, const float * q, int32_t n_q, const uint8_t * index, const uint64_t * visible,
                  int64_t n_block, int64_t b0, int64_t b1, float * scores, float * peaks) {
    ScoreQuery ready[FASA_MAX_GROUP];
    for (int32_t h = 0; h < n_q; ++h) {
        ready[h].prepare(layout, q + h * layout.head_dim);
    }
    // All heads of a tile of blocks before the next tile: the tile's index bytes stay in the first-level cache.
    for (int64_t b = b0; b < b1; ++b) {
        if (b + kAheadBlocks < b1) {
            prefetch<3>(index + (b + kAheadBlocks) * layout.block_bytes, layout.block_bytes);
        }
        for (int32_t h = 0; h < n_q;) {
            const ScoreQuery * tile[V::kQueries];
            float *            out[V::kQueries];
            float *            top[V::kQueries];
            const int32_t      n = std::min<int32_t>(V::kQueries, n_q - h);
            for (int32_t i = 0; i < n; ++i) {
                tile[i] = &ready[h + i];
                out[i]  = scores + ((h + i) * n_block + b) * FASA_BLOCK_CELLS;
                top[i]  = peaks + ((h + i) * n_block + b) * FASA_PEAKS;
            }
            const uint8_t * block = index + b * layout.block_bytes;
            if (n == V::kQueries) {
                score_block<V::kQueries>(layout, block, visible[b], tile, out, top);
                h += V::kQueries;
            } else {
                score_block<1>(layout, block, visible[b], tile, out, top);
                h += 1;
            }
        }
    }
}
