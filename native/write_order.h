// In which order the cells of a cache were written: the first and last tokens of a sequence are wherever llama.cpp
// found room for them. Tokens of a sequence are written in the order of their positions, and a K-shift keeps that
// order.
#pragma once

#include <ggml.h>

#include <cstdint>
#include <vector>

namespace fasa {

class WriteOrder {
  public:
    // Of the cache that `root` belongs to; its cells count as written before all others, in their own order.
    explicit WriteOrder(const ggml_tensor * root);

    const ggml_tensor * root() const { return root_; } // all layers are written alike: one of them is followed

    void cell_written(int64_t cell); // as SET_ROWS numbers them, through all streams
    void bytes_written(const void * first, size_t size);

    // Up to n cells of a stream for which visible(cell) holds: the first or the last written.
    template <typename Visible>
    void first(int64_t stream, int32_t n, Visible && visible, std::vector<int32_t> * out) const {
        const Log & log = logs_[stream];
        for (size_t i = 0; i < log.cells.size() && n > 0; ++i) {
            n -= take(log, i, visible, out);
        }
    }
    template <typename Visible>
    void last(int64_t stream, int32_t n, Visible && visible, std::vector<int32_t> * out) const {
        const Log & log = logs_[stream];
        for (size_t i = log.cells.size(); i > 0 && n > 0; --i) {
            n -= take(log, i - 1, visible, out);
        }
    }

  private:
    struct Log {                     // of one stream
        std::vector<int32_t> cells;  // oldest first; an entry counts when it is its cell's last one
        std::vector<int32_t> latest; // by cell: where its last entry is
    };

    template <typename Visible>
    static int32_t take(const Log & log, size_t i, Visible && visible, std::vector<int32_t> * out) {
        const int32_t cell = log.cells[i];
        if (log.latest[cell] != static_cast<int32_t>(i) || !visible(cell)) {
            return 0;
        }
        out->push_back(cell);
        return 1;
    }
    static void forget_old_entries(Log & log);

    const ggml_tensor * root_;
    std::vector<Log>    logs_;
};

} // namespace fasa
