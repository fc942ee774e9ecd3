// select, written once over a vector type V.
//
// Exact top-k without a sort. A block's peaks are the maxima of 8 disjoint groups of 8 cells, so the k-th largest peak
// is a lower bound of the k-th largest score: (1) find it by bisection over counts, 1/8 of the data; (2) one pass
// keeps the cells that reach it, typically 1.2 k of them; (3) bisection among these gives the exact k-th score.

// Floats as integers of the same order, so that bisection halves the number of candidate values, not a range.
static inline int32_t order_key(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

static inline float order_value(int32_t key) {
    const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
    float         x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

static int64_t count_at_least(const float * x, int64_t n, float t) {
    int64_t count = 0;
    int64_t i     = 0;
    for (const typename V::F tv = V::set(t); i + V::W <= n; i += V::W) {
        count += __builtin_popcount(V::at_least(V::load(x + i), tv));
    }
    for (; i < n; ++i) {
        count += x[i] >= t ? 1 : 0;
    }
    return count;
}

// The k-th largest of n values, 1 <= k <= n. NaN counts as smaller than everything. Stops early at a value that
// exactly k reach: as good as the k-th largest for both uses here.
static float kth_largest(const float * x, int64_t n, int64_t k) {
    float lo = kHidden;
    float hi = kHidden;
    for (int64_t i = 0; i < n; ++i) {
        hi = x[i] > hi ? x[i] : hi;
    }
    // At least k values reach lo; fewer than k reach anything above hi.
    int64_t a = order_key(lo);
    int64_t b = order_key(hi);
    while (a < b) {
        const int64_t middle = a + (b - a + 1) / 2;
        const float   t      = order_value(static_cast<int32_t>(middle));
        const int64_t count  = count_at_least(x, n, t);
        if (count == k) {
            return t;
        }
        if (count > k) {
            a = middle;
        } else {
            b = middle - 1;
        }
    }
    return order_value(static_cast<int32_t>(a));
}

static int64_t select(const float * scores, const float * peaks, int64_t n_block, int64_t budget, float * scratch,
                      int32_t * cells) {
    const int64_t n_cell = n_block * FASA_BLOCK_CELLS;
    const int64_t n_peak = n_block * FASA_PEAKS;
    // The smallest float above -inf lets every visible cell through.
    const float   visible = -std::numeric_limits<float>::max();
    const float   floor   = budget < n_peak ? std::max(visible, kth_largest(peaks, n_peak, budget)) : visible;
    const int64_t n       = V::collect(scores, n_cell, floor, scratch, cells);
    if (n <= budget) {
        return n;
    }
    const float t       = kth_largest(scratch, n, budget);
    int64_t     n_above = 0;
    for (int64_t i = 0; i < n; ++i) {
        n_above += scratch[i] > t ? 1 : 0;
    }
    int64_t ties = budget - n_above;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
        const bool tie = scratch[i] == t && ties > 0;
        cells[kept]    = cells[i];
        kept += scratch[i] > t || tie ? 1 : 0;
        ties -= tie ? 1 : 0;
    }
    return kept;
}
