// select, written once over a vector type V.
//
// Exact top-k without a sort. A block's peaks are the maxima of 8 disjoint groups of 8 cells, so the k-th largest peak
// is a lower bound of the k-th largest score: (1) find it by bisection over counts, 1/8 of the data; (2) one pass
// keeps the cells that reach it, typically 1.2 k of them; (3) bisection among these gives the exact k-th score.

// Floats as integers of the same order: bisection over them ends after 32 steps whatever the values.
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
    if (n >= 4 * V::W) {
        const typename V::F tv = V::set(t);
        typename V::Count   c  = V::count_zero();
        for (; i + 4 * V::W <= n; i += 4 * V::W) {
            for (int j = 0; j < 4; ++j) {
                c = V::count_add(c, V::load(x + i + j * V::W), tv);
            }
        }
        count = V::count_sum(c);
    }
    for (; i < n; ++i) {
        count += x[i] >= t ? 1 : 0;
    }
    return count;
}

// Values that bracket the k-th largest with near certainty, from a sample; the caller checks both.
static void guess_bracket(const float * x, int64_t n, int64_t k, float * lo, float * hi) {
    constexpr int64_t kSample = 64;
    float             sample[kSample];
    for (int64_t i = 0; i < kSample; ++i) {
        sample[i] = x[i * n / kSample];
    }
    for (int64_t i = 1; i < kSample; ++i) { // insertion sort, largest first; NaN stays where it is
        const float value = sample[i];
        int64_t     at    = i;
        for (; at > 0 && sample[at - 1] < value; --at) {
            sample[at] = sample[at - 1];
        }
        sample[at] = value;
    }
    const int64_t rank = k * kSample / n;
    // Three standard deviations of the rank of a sampled quantile.
    const auto slack =
        static_cast<int64_t>(3.0f * std::sqrt(static_cast<float>(rank * (kSample - rank)) / kSample)) + 2;
    *lo = sample[std::min(rank + slack, kSample - 1)];
    *hi = sample[std::max<int64_t>(rank - slack, 0)];
}

// The k-th largest of n values, 1 <= k <= n; NaN counts as smaller than everything. Stops early at a value that
// exactly k reach: as good as the k-th largest for both uses here.
static float kth_largest(const float * x, int64_t n, int64_t k) {
    // Invariant: at least k values reach lo, fewer than k reach anything above hi.
    int64_t    lo    = order_key(kHidden);
    int64_t    hi    = order_key(std::numeric_limits<float>::infinity());
    const auto probe = [&](float t) { // true: t is an answer
        const int64_t count = count_at_least(x, n, t);
        if (count >= k) {
            lo = std::max<int64_t>(lo, order_key(t));
        } else {
            hi = std::min<int64_t>(hi, order_key(t) - 1);
        }
        return count == k;
    };
    float low;
    float high;
    guess_bracket(x, n, k, &low, &high);
    for (const float t : {low, high}) {
        if (t > kHidden && probe(t)) {
            return t;
        }
    }
    for (int step = 0; lo < hi; ++step) {
        const float a      = order_value(static_cast<int32_t>(lo));
        const float b      = order_value(static_cast<int32_t>(hi));
        const float middle = 0.5f * a + 0.5f * b;
        // Halving the interval of values is quick for well-spread ones; halving the keys bounds the rest.
        const bool  spread = step < 12 && middle > a && middle < b;
        const float t      = spread ? middle : order_value(static_cast<int32_t>(lo + (hi - lo + 1) / 2));
        if (probe(t)) {
            return t;
        }
    }
    return order_value(static_cast<int32_t>(lo));
}

static int64_t select(const float * scores, const float * peaks, int64_t n_block, int64_t budget, float * scratch,
                      int32_t * cells) {
    const int64_t n_peak = n_block * FASA_PEAKS;
    // The smallest float above -inf lets every visible cell through.
    const float visible = -std::numeric_limits<float>::max();
    const float floor   = budget < n_peak ? std::max(visible, kth_largest(peaks, n_peak, budget)) : visible;
    int64_t     n       = 0;
    for (int64_t b = 0; b < n_block; ++b) {
        if (count_at_least(peaks + b * FASA_PEAKS, FASA_PEAKS, floor) > 0) {
            n = V::collect(scores + b * FASA_BLOCK_CELLS, static_cast<int32_t>(b * FASA_BLOCK_CELLS), floor, n, scratch,
                           cells);
        }
    }
    if (n <= budget) {
        return n;
    }
    const float t    = kth_largest(scratch, n, budget);
    int64_t     kept = 0;
    if (count_at_least(scratch, n, t) == budget) {
        for (int64_t i = 0; i < n; ++i) { // no branch: a cell that goes is overwritten
            cells[kept] = cells[i];
            kept += scratch[i] >= t ? 1 : 0;
        }
        return kept;
    }
    int64_t equal = budget; // how many of the cells with exactly t may stay, the first ones
    for (int64_t i = 0; i < n; ++i) {
        equal -= scratch[i] > t ? 1 : 0;
    }
    for (int64_t i = 0; i < n; ++i) {
        const bool tie = scratch[i] == t && equal > 0;
        cells[kept]    = cells[i];
        kept += scratch[i] > t || tie ? 1 : 0;
        equal -= tie ? 1 : 0;
    }
    return kept;
}
