// In which order the cells of a cache were written: the first and last tokens of a sequence are wherever llama.cpp
// found room for them. Tokens of a sequence are written in the order of their positions, and a K-shift keeps that
// order.
#pragma once

#include <ggml.h>

#include <cstdint>
#include <vector>

namespace fasa {

// Calls touch(cell) for the cells, of n that begin at `cache` and have `row` bytes each, that a range of memory
// overlaps.
template <typename Touch>
void for_cells_in(const void * cache, int64_t row, int64_t n, const void * first, size_t size, Touch && touch) {
    const int64_t begin = static_cast<const char *>(first) - static_cast<const char *>(cache);
    const int64_t end   = begin + static_cast<int64_t>(size);
    for (int64_t c = begin > 0 ? begin / row : 0; c < n && c * row < end; ++c) {
        touch(c);
    }
}

// A cache tensor by where it lies and how. An rpc-server makes new ggml_tensors for each graph that it receives, so
// their own addresses tell nothing; the memory goes only with its buffer, which is watched.
struct CacheTensor {
    const void * data;
    int64_t      n_cell, n_stream, row_bytes;
    int32_t      type;

    explicit CacheTensor(const ggml_tensor & root)
        : data(root.data), n_cell(root.ne[1]), n_stream(root.ne[2]), row_bytes(static_cast<int64_t>(root.nb[1])),
          type(root.type) {}

    bool operator==(const CacheTensor & other) const {
        return data == other.data && n_cell == other.n_cell && n_stream == other.n_stream &&
               row_bytes == other.row_bytes && type == other.type;
    }
};

class WriteOrder {
  public:
    using Words = std::vector<uint64_t>; // bit c of word b: cell 64 b + c

    // Of the cache that `root` belongs to. A cell that was never seen to be written is older than all others.
    explicit WriteOrder(const ggml_tensor * root);

    // All layers are written alike: one of them is followed.
    bool follows(const ggml_tensor & root) const { return root_ == CacheTensor(root); }

    void cell_written(int64_t cell); // as SET_ROWS numbers them, through all streams
    void bytes_written(const void * first, size_t size);

    // Appends up to n of the visible cells of a stream: the first or the last written.
    void first(int64_t stream, int32_t n, const Words & visible, std::vector<int32_t> * out) const;
    void last(int64_t stream, int32_t n, const Words & visible, std::vector<int32_t> * out) const;

  private:
    struct Log {                     // of one stream
        std::vector<int32_t> cells;  // oldest first; an entry counts when it is its cell's last one
        std::vector<int32_t> latest; // by cell: where its last entry is; -1: none
        size_t               begin;  // no entry before it counts
        Words                known;  // cells that have an entry

        bool counts(size_t i, const Words & visible) const;
    };

    static void forget_old_entries(Log & log);

    CacheTensor      root_;
    std::vector<Log> logs_;
};

} // namespace fasa
