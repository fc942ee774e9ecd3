// Pieces of memory that are copied in one launch.
#include "../transfer.h"

#include <algorithm>

#include "stage.h"

using namespace fasa_test;
using fasa::gpu::Transfer;
using Bytes = std::vector<uint8_t>;

TEST(transfers_copy_pieces_of_any_size_and_place_there_and_back) {
    std::mt19937          rng    = fresh_rng();
    constexpr int64_t     kBytes = 1 << 17;
    Copied<uint8_t>       from, to;
    std::vector<Transfer> pieces;
    for (Copied<uint8_t> * memory : {&from, &to}) {
        for (int64_t i = 0; i < kBytes; ++i) {
            memory->host.push_back(static_cast<uint8_t>(rng()));
        }
        memory->to_device();
    }
    const int64_t cell        = 5;
    Bytes         wanted_from = from.host, wanted_to = to.host;
    int64_t       at = 0;
    for (const int64_t bytes : {4, 16, 34, 1025, 4096, 40000}) {
        for (const int64_t shift : {0, 2}) {
            const int64_t step = bytes < 100 ? 64 : 0;
            const int32_t hole = bytes > 100 ? static_cast<int32_t>(shift + 2) : 0;
            at                 = (at + 15) / 16 * 16 + shift;
            pieces.push_back({from.device.get() + at, to.device.get() + at, bytes, step, step / 2, hole});
            for (int32_t i = 0; i < hole; ++i) {
                wanted_from[at + cell * hole + i] = 0;
            }
            std::copy_n(wanted_from.begin() + at + cell * step, bytes, wanted_to.begin() + at + cell * step / 2);
            at += cell * step + bytes;
        }
    }
    CHECK(at < kBytes);
    Copied<Transfer> table;
    table.host = pieces;
    table.to_device();
    const auto n = static_cast<int32_t>(pieces.size());
    CHECK_EQUAL(cuda_api()->transfer(cuda_stream()->device(), table.device.get(), n, cell, 0), 0);
    from.to_host(), to.to_host();
    CHECK(from.host == wanted_from);
    CHECK(to.host == wanted_to);
    from.host.assign(kBytes, 0x5a);
    from.to_device();
    CHECK_EQUAL(cuda_api()->transfer(cuda_stream()->device(), table.device.get(), 6, cell, 1), 0); // without holes
    from.to_host();
    for (size_t i = 0; i < 6; ++i) {
        const int64_t first = pieces[i].from - from.device.get() + cell * pieces[i].from_step;
        CHECK(std::equal(wanted_from.begin() + first, wanted_from.begin() + first + pieces[i].bytes,
                         from.host.begin() + first));
    }
}
