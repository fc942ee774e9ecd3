// select, written once over a vector type V.
//
// Exact top-k without a sort: (1) a sample gives a floor that k scores reach almost surely, and not many more; (2) one
// pass over the blocks with such a peak keeps the cells that reach it; (3) counts among these close in on the exact
// k-th score, and the cells that reach that stay. Too high a floor shows in (2): the k-th largest peak replaces it.

// Floats as integers of the same order: bisection over them ends after 32 steps whatever the values.
static inline int32_t order_key(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

static inline float order_value(int64_t key) {
    const auto    narrow = static_cast<int32_t>(key);
    const int32_t bits   = narrow ^ ((narrow >> 31) & 0x7fffffff);
    float         x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

// The smallest float above -inf lets every visible cell through.
constexpr float kVisible = -std::numeric_limits<float>::max();

// Arrays to count in end in as many hidden values as whole steps of the loop need.
constexpr int64_t kStep = 4 * V::W;
static_assert(FASA_BLOCK_CELLS % kStep == 0, "what is kept of whole blocks fits with its end");

static int64_t pad(float * x, int64_t n) {
    for (; n % kStep != 0; ++n) {
        x[n] = kHidden;
    }
    return n;
}

static int64_t count_at_least(const float * x, int64_t n, float t) {
    const typename V::F tv = V::set(t);
    typename V::Count   c  = V::count_zero();
    for (int64_t i = 0; i < n; i += kStep) {
        for (int j = 0; j < 4; ++j) {
            c = V::count_add(c, V::load(x + i + j * V::W), tv);
        }
    }
    return V::count_sum(c);
}

struct Threshold {
    float   value;
    int64_t n; // how many reach it
};

constexpr int64_t kFew = 16;

// The k-th largest, when n_above < k reach `top`, and lo but not `top` is reached by at most kFew: these, sorted.
static Threshold kth_of_few(const float * x, int64_t n, int64_t k, float lo, float top, int64_t n_above) {
    float               few[kFew];
    int64_t             m     = 0;
    const typename V::F first = V::set(lo);
    const typename V::F last  = V::set(top);
    for (int64_t i = 0; i < n; i += V::W) {
        const typename V::F v = V::load(x + i);
        for (uint32_t bits = V::at_least(v, first) & ~V::at_least(v, last); bits != 0; bits &= bits - 1) {
            const float value = x[i + __builtin_ctz(bits)];
            int64_t     at    = m++;
            for (; at > 0 && few[at - 1] < value; --at) {
                few[at] = few[at - 1];
            }
            few[at] = value;
        }
    }
    int64_t rank = k - n_above;
    while (rank < m && few[rank] == few[rank - 1]) {
        ++rank;
    }
    return {few[rank - 1], n_above + rank};
}

// The k-th largest of n values, or `low`, which n_low reach, if that is larger; NaN counts as smaller than everything.
// Stops early at a value that exactly k reach: as good as the k-th largest here.
static Threshold kth_largest(const float * x, int64_t n, int64_t k, float low, int64_t n_low) {
    constexpr int kPivots = 8;
    // Invariant: n_lo >= k values reach lo, n_top < k reach top, the float after hi; nothing reaches NaN.
    int64_t lo    = order_key(low);
    int64_t hi    = order_key(std::numeric_limits<float>::infinity());
    int64_t n_lo  = n_low;
    float   top   = std::numeric_limits<float>::quiet_NaN();
    int64_t n_top = 0;
    int     pivot = 0;
    for (int step = 0; lo < hi && n_lo > k; ++step) {
        const float a = order_value(lo);
        const float b = order_value(hi);
        if (n_lo - n_top <= kFew) {
            return kth_of_few(x, n, k, a, top, n_top);
        }
        // Some of the values find the region, interpolation is quick where they are well spread, and halving the
        // keys bounds the rest.
        const auto inside = [&](float t) { return t > a && t < b; };
        float      t      = a;
        while (!inside(t) && pivot < kPivots) {
            t = x[(2 * pivot++ + 1) * n / (2 * kPivots)];
            t = t == a ? order_value(lo + 1) : t; // one of many equal ones?
        }
        if (!inside(t) && step % 4 != 3) {
            t = a + (b - a) * (static_cast<float>(n_lo - k) / static_cast<float>(n_lo - n_top));
        }
        if (!inside(t)) {
            t = order_value(lo + (hi - lo + 1) / 2);
        }
        const int64_t count = count_at_least(x, n, t);
        if (count >= k) {
            lo   = order_key(t);
            n_lo = count;
        } else {
            hi    = order_key(t) - 1;
            top   = t;
            n_top = count;
        }
    }
    return {order_value(lo), n_lo};
}

static float kth_largest_visible(const float * x, int64_t n, int64_t k) {
    return kth_largest(x, n, k, kVisible, count_at_least(x, n, kVisible)).value;
}

// A floor that k of n cells reach almost surely: three standard deviations below the k-th as a sample has it.
static float guess_floor(const float * scores, int64_t n, int64_t k) {
    constexpr int64_t kSample = 256;
    float             sample[kSample];
    for (int64_t i = 0; i < kSample; ++i) { // one of each of equal parts, at changing places
        sample[i] = scores[(i * kSample + i * 101 % kSample) * n / (kSample * kSample)];
    }
    const float share = static_cast<float>(k) / static_cast<float>(n);
    const float mean  = share * kSample;
    const auto  rank  = static_cast<int64_t>(mean + 3.0f * std::sqrt(mean * (1.0f - share)) + 3.0f);
    return kth_largest_visible(sample, kSample, rank);
}

static int64_t select(const float * scores, const float * peaks, int64_t n_block, int64_t budget, float * scratch,
                      int32_t * cells) {
    const int64_t n_cell  = n_block * FASA_BLOCK_CELLS;
    float         floor   = budget < n_cell ? guess_floor(scores, n_cell, budget) : kVisible;
    const auto    collect = [&] {
        int64_t n = 0;
        for (int64_t b = 0; b < n_block; ++b) {
            if (V::reached(peaks + b * FASA_PEAKS, floor)) {
                const int64_t first = b * FASA_BLOCK_CELLS;
                n                   = V::collect(scores + first, static_cast<int32_t>(first), floor, n, scratch, cells);
            }
        }
        return n;
    };
    int64_t n = collect();
    if (n < budget && floor > kVisible) { // guessed too high; the k-th largest peak never is
        const int64_t n_peak = n_block * FASA_PEAKS / kStep * kStep;
        floor                = budget < n_peak ? kth_largest_visible(peaks, n_peak, budget) : kVisible;
        n                    = collect();
    }
    if (n <= budget) {
        return n;
    }
    const int64_t       end = pad(scratch, n);
    const Threshold     kth = kth_largest(scratch, end, budget, floor, n);
    const typename V::F t   = V::set(kth.value);
    // Of the cells with exactly this score the first stay, as many as there is room for.
    const bool too_many = kth.n > budget;
    int64_t    room     = budget - kth.n;
    for (int64_t i = 0; too_many && i < end; i += V::W) {
        const typename V::F x = V::load(scratch + i);
        room += __builtin_popcount(V::at_least(x, t) & V::at_least(t, x));
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < end; i += V::W) {
        const typename V::F x    = V::load(scratch + i);
        uint32_t            bits = V::at_least(x, t);
        if (too_many) {
            uint32_t equal = bits & V::at_least(t, x);
            bits ^= equal;
            for (; equal != 0 && room > 0; equal &= equal - 1, --room) {
                bits |= equal & -equal;
            }
        }
        kept = V::pack(cells + i, bits, kept, cells);
    }
    return kept;
}
