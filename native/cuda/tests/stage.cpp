#include "stage.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "hadamard.h"
#include "kv_type.h"

extern "C" const fasa::gpu::Api * fasa_cuda_api();

namespace fasa_test {

const Api * cuda_api() { return fasa_cuda_api(); }

std::shared_ptr<Stream> cuda_stream() {
    static const auto stream = std::make_shared<Stream>(cuda_api(), nullptr);
    return stream;
}

std::string StageShape::text() const {
    return "head_dim " + std::to_string(head_dim) + ", heads " + std::to_string(n_head) + "/" +
           std::to_string(n_head_kv) + ", n_kv " + std::to_string(n_kv) + ", rows " + std::to_string(n_rows) +
           ", streams " + std::to_string(n_stream) + ", k " + ggml_type_name(k_type) + ", v " + ggml_type_name(v_type) +
           ", bits " + std::to_string(bits) + ", n_fc " + std::to_string(n_fc) + ", budget " + std::to_string(budget) +
           ", rotation " + std::to_string(rotation);
}

Stage::Stage(std::mt19937 & rng, const StageShape & s) : shape(s) {
    for (int32_t h = 0; h < s.n_head_kv; ++h) {
        std::vector<uint16_t> fc(s.head_dim / 2);
        std::iota(fc.begin(), fc.end(), 0);
        std::shuffle(fc.begin(), fc.end(), rng);
        // Heads of one layer may keep different numbers of chunks.
        const int32_t        n = std::max(1, std::min(s.n_fc, s.head_dim / 2) - h % 2);
        std::vector<uint8_t> widths(n);
        for (uint8_t & w : widths) {
            w = static_cast<uint8_t>(s.bits != 0 ? s.bits : 2 << rng() % 3);
        }
        auto center = gaussian(rng, s.head_dim, 0.1f);
        auto scale  = gaussian(rng, s.head_dim);
        std::transform(scale.begin(), scale.end(), scale.begin(), [](float x) { return 0.5f + std::fabs(x); });
        layouts.emplace_back(s.head_dim, s.head_dim, FASA_ROPE_NORM, n, fc.data(), widths.data(), center.data(),
                             scale.data());
    }
    n_cell            = s.n_kv + 70; // the view ends before the cache does
    n_block           = fasa::gpu::n_blocks(s.n_kv);
    blocks_per_stream = fasa::gpu::n_blocks(n_cell);
    first_stream      = s.small ? 0 : 1;
    cache_streams     = s.n_stream + 2 * first_stream; // one before the node's, one after

    const auto padded = [](int64_t bytes) { return (bytes + 127) / 128 * 128; }; // as ggml does
    k.host.resize(padded(cache_streams * n_cell * s.n_head_kv * row_bytes(s.k_type)));
    v.host.resize(padded(cache_streams * n_cell * s.n_head_kv * row_bytes(s.v_type)));
    for (int64_t c = 0; c < cache_streams * n_cell; ++c) {
        constexpr int64_t kDifferent = 1021;
        if (!s.small || c < kDifferent) {
            write_random_rows(rng, c);
            continue;
        }
        for (auto [cache, row] : {std::pair{&k, row_bytes(s.k_type)}, std::pair{&v, row_bytes(s.v_type)}}) {
            std::memcpy(cache->host.data() + c * s.n_head_kv * row,
                        cache->host.data() + c % kDifferent * s.n_head_kv * row, s.n_head_kv * row);
        }
    }
    k.to_device();
    v.to_device();
    heads.host = fasa::gpu::head_layouts(layouts, s.n_head_kv, cache_streams * blocks_per_stream);
    heads.to_device();
    int64_t index_bytes = 0;
    for (const auto & l : layouts) {
        index_bytes += cache_streams * blocks_per_stream * l.block_bytes;
    }
    index.poison(index_bytes);
    q.host     = gaussian(rng, n_query() * s.head_dim, 2.0f);
    sinks.host = gaussian(rng, s.n_head, 3.0f);
    q.to_device();
    sinks.to_device();
    mask.host.assign(s.n_kv * s.n_rows * s.n_stream, 0);
    for (int64_t row = 0; row < s.n_rows * s.n_stream; ++row) {
        // The second row sees few cells; all rows end before the view does, and have holes unless they are only timed.
        const int64_t seen = row == 1 ? s.n_kv / 9 : s.n_kv - 3 - row;
        for (int64_t c = 0; c < s.n_kv; ++c) {
            mask.host[row * s.n_kv + c] = c >= seen || (!s.small && c > 0 && rng() % 16 == 0) ? fasa::kHalfMinusInf : 0;
        }
    }
    mask.to_device();
    // New cells in all streams of the node, two of them neighbours in one word of the index.
    for (int64_t stream = 0; stream < s.n_stream; ++stream) {
        for (const int64_t c : {int64_t{0}, int64_t{16}, s.n_kv / 2, s.n_kv - 1, n_cell - 1}) {
            new_cells.host.push_back((first_stream + stream) * n_cell + c);
        }
    }
    new_cells.to_device();

    const int64_t cells_of_query = n_block * FASA_BLOCK_CELLS;
    const int32_t max_selected   = std::max(s.budget, s.min_ctx);
    const int32_t n_split        = fasa::gpu::n_splits(s.budget, n_query());
    codes.poison(n_query() * fasa::gpu::kMaxSlots);
    levels.poison(n_query() * 2 * fasa::gpu::kSegments);
    norms.poison(n_query());
    thresholds.poison(n_query());
    filters.host.assign(n_query(), {fasa::gpu::kNoFilter, fasa::gpu::kNoFilter});
    filters.to_device();
    marks.poison(n_query() * cells_of_query / 32);
    scores.poison(n_query() * cells_of_query);
    peaks.poison(n_query() * cells_of_query / fasa::gpu::kPeak);
    n_visible.poison(s.n_rows * s.n_stream);
    windows.poison(s.n_rows * s.n_stream);
    cells.poison(n_query() * max_selected);
    n_selected.poison(n_query());
    parts.poison(n_query() * n_split * (2 + s.head_dim));
    out.poison(n_query() * (s.head_dim + 8)); // a gap after each head must stay as it is
    arrived.host.assign(n_query(), 0);
    totals.host.assign(4, 0);
    arrived.to_device();
    totals.to_device();

    const int64_t k_row = row_bytes(s.k_type), v_row = row_bytes(s.v_type), dim = 4 * s.head_dim;
    node              = {};
    node.q            = q.device.get(); // [head_dim, n_rows, n_head, n_stream]
    node.q_row        = dim;
    node.q_head       = dim * s.n_rows;
    node.q_stream     = dim * s.n_rows * s.n_head;
    node.k            = {k.device.get() + first_stream * n_cell * s.n_head_kv * k_row,
                         s.n_head_kv * k_row,
                         k_row,
                         n_cell * s.n_head_kv * k_row,
                         s.k_type,
                         s.head_dim};
    node.v            = {v.device.get() + first_stream * n_cell * s.n_head_kv * v_row,
                         s.n_head_kv * v_row,
                         v_row,
                         n_cell * s.n_head_kv * v_row,
                         s.v_type,
                         s.head_dim};
    node.mask         = reinterpret_cast<const uint8_t *>(mask.device.get());
    node.mask_row     = 2 * s.n_kv;
    node.mask_stream  = 2 * s.n_kv * s.n_rows;
    node.sinks        = s.sinks ? sinks.device.get() : nullptr;
    node.out          = out.device.get();
    node.out_head     = dim + 32;
    node.out_row      = (dim + 32) * s.n_head;
    node.out_stream   = (dim + 32) * s.n_head * s.n_rows;
    node.n_kv         = static_cast<int32_t>(s.n_kv);
    node.n_rows       = static_cast<int32_t>(s.n_rows);
    node.n_stream     = static_cast<int32_t>(s.n_stream);
    node.n_head       = s.n_head;
    node.n_head_kv    = s.n_head_kv;
    node.group        = s.n_head / s.n_head_kv;
    node.scale        = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
    node.softcap      = s.softcap;
    node.index        = {index.device.get(),
                         heads.device.get(),
                         blocks_per_stream,
                         first_stream,
                         n_cell,
                         cache_streams,
                         s.rotation,
                         fasa::gpu::common_bits(heads.host)};
    node.new_cells    = new_cells.device.get();
    node.n_new        = static_cast<int32_t>(new_cells.host.size());
    node.budget       = s.budget;
    node.min_ctx      = s.min_ctx;
    node.n_first      = s.n_first;
    node.n_last       = s.n_last;
    node.max_selected = max_selected;
    node.n_split      = n_split;
    node.filters      = filters.device.get();
    node.scratch      = {codes.device.get(),  levels.device.get(),     norms.device.get(),     thresholds.device.get(),
                         scores.device.get(), peaks.device.get(),      n_visible.device.get(), windows.device.get(),
                         cells.device.get(),  n_selected.device.get(), parts.device.get(),     arrived.device.get(),
                         marks.device.get(),  totals.device.get()};
}

void Stage::write_random_rows(std::mt19937 & rng, int64_t cache_cell) {
    for (const auto & [cache, type] : {std::pair{&k, shape.k_type}, std::pair{&v, shape.v_type}}) {
        const int64_t n   = static_cast<int64_t>(shape.head_dim) * shape.n_head_kv;
        const auto    row = gaussian(rng, n);
        ggml_quantize_chunk(type, row.data(), cache->host.data() + cache_cell * shape.n_head_kv * row_bytes(type), 0, 1,
                            n, nullptr);
    }
}

bool Stage::visible(int64_t stream, int64_t row, int64_t cell) const {
    return mask.host[(stream * shape.n_rows + row) * shape.n_kv + cell] != fasa::kHalfMinusInf;
}

std::vector<float> Stage::key(int64_t stream, int32_t head, int64_t cell) const {
    std::vector<float> key(shape.head_dim);
    const int64_t      row = ((first_stream + stream) * n_cell + cell) * shape.n_head_kv + head;
    fasa::kv_to_float(shape.k_type, k.host.data() + row * row_bytes(shape.k_type), shape.head_dim, key.data());
    fasa::undo_rotation(key.data(), shape.head_dim, shape.rotation);
    return key;
}

uint8_t * Stage::block(std::vector<uint8_t> & bytes, int64_t stream, int32_t head, int64_t b) const {
    return bytes.data() + heads.host[head].first +
           ((first_stream + stream) * blocks_per_stream + b) * layouts[head].block_bytes;
}

} // namespace fasa_test
