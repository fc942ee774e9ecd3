// The C boundary: checks arguments, calls the C++ core, turns exceptions into a status and a sentence.
#include <memory>

#include "backend.h"
#include "hadamard.h"
#include "kernels.h"
#include "session.h"
#include "status.h"

struct fasa_layout {
    fasa::Layout layout;
};

struct fasa_session {
    fasa::Session session;
};

namespace {

using fasa::fail;
using fasa::guarded;

void need(bool ok, const char * sentence) {
    if (!ok) {
        fail(FASA_STATUS_ARGUMENT, "%s", sentence);
    }
}

void check_kv(const fasa_kv & kv) {
    for (const int32_t dim : {kv.k_dim, kv.v_dim}) {
        if (dim < 32 || dim > FASA_MAX_HEAD_DIM || dim % 32 != 0) {
            fail(FASA_STATUS_ARGUMENT, "Head size %d has no kernel; it must be a multiple of 32 from 32 to %d.", dim,
                 FASA_MAX_HEAD_DIM);
        }
    }
    for (const int32_t type : {kv.k_type, kv.v_type}) {
        if (fasa::kv_row_bytes(type, 32) == 0) {
            fail(FASA_STATUS_ARGUMENT, "K or V type %d has no kernel; see fasa_kv_type for those that have.", type);
        }
    }
    need(kv.k != nullptr && kv.v != nullptr, "K or V is NULL.");
    need(kv.k_stride >= fasa::kv_row_bytes(kv.k_type, kv.k_dim) &&
             kv.v_stride >= fasa::kv_row_bytes(kv.v_type, kv.v_dim),
         "Cells of K or V overlap: a stride is smaller than a row.");
}

} // namespace

int64_t fasa_kv_row_bytes(int32_t kv_type, int64_t n) {
    return n > 0 && n <= INT32_MAX && n % fasa::kKvBlock == 0 ? fasa::kv_row_bytes(kv_type, n) : 0;
}

fasa_status fasa_kv_to_float(int32_t kv_type, const void * rows, int64_t n, int64_t n_rows, float * out) {
    return guarded([&] {
        const int64_t bytes = fasa_kv_row_bytes(kv_type, n);
        need(bytes > 0, "A row needs a type with a kernel and a multiple of 32 values.");
        need(n_rows >= 0, "The number of rows is negative.");
        for (int64_t i = 0; i < n_rows; ++i) {
            fasa::kv_to_float(kv_type, static_cast<const uint8_t *>(rows) + i * bytes, static_cast<int32_t>(n),
                              out + i * n);
        }
    });
}

fasa_status fasa_layout_create(int32_t head_dim, int32_t n_rot, int32_t rope, int32_t n_fc, const uint16_t * fc,
                               const uint8_t * bits, const float * center, const float * scale, fasa_layout ** out) {
    return guarded([&] {
        need(fc != nullptr && bits != nullptr && out != nullptr, "fc, bits and out must not be NULL.");
        *out = new fasa_layout{fasa::Layout(head_dim, n_rot, rope, n_fc, fc, bits, center, scale)};
    });
}

void fasa_layout_free(fasa_layout * layout) { delete layout; }

int64_t fasa_layout_block_bytes(const fasa_layout * layout) { return layout->layout.block_bytes; }

fasa_status fasa_index_write(const fasa_layout * layout, const float * rows, const int64_t * cells, int64_t n,
                             uint8_t * index) {
    return guarded([&] {
        need(n >= 0, "The number of cells is negative.");
        for (int64_t i = 0; i < n; ++i) {
            need(cells[i] >= 0, "A cell is negative.");
            layout->layout.write(rows + i * layout->layout.head_dim,
                                 index + cells[i] / FASA_BLOCK_CELLS * layout->layout.block_bytes,
                                 static_cast<int32_t>(cells[i] % FASA_BLOCK_CELLS));
        }
    });
}

fasa_status fasa_score(int32_t isa, const fasa_layout * layout, const float * q, int32_t n_q, const uint8_t * index,
                       const uint64_t * visible, int64_t n_block, int64_t b0, int64_t b1, float * scores,
                       float * peaks) {
    return guarded([&] {
        need(n_q >= 1 && n_q <= FASA_MAX_GROUP, "A KV head serves 1 to 64 query heads.");
        need(b0 >= 0 && b0 <= b1 && b1 <= n_block, "The range of blocks is not inside the index.");
        fasa::kernels_of(isa).score(layout->layout, q, n_q, index, visible, n_block, b0, b1, scores, peaks);
    });
}

fasa_status fasa_select(int32_t isa, const float * scores, const float * peaks, int64_t n_block, int64_t budget,
                        float * scratch, int32_t * cells, int64_t * n_selected) {
    return guarded([&] {
        need(budget >= 1, "budget must be at least 1.");
        need(n_block >= 0, "The number of blocks is negative.");
        *n_selected = fasa::kernels_of(isa).select(scores, peaks, n_block, budget, scratch, cells);
    });
}

fasa_status fasa_attend(int32_t isa, const fasa_kv * kv, const float * q, const int32_t * cells, int64_t n, float * m,
                        float * d, float * o) {
    return guarded([&] {
        check_kv(*kv);
        need(n >= 0, "The number of cells is negative.");
        fasa::kernels_of(isa).attend(*kv, q, cells, n, m, d, o);
    });
}

fasa_status fasa_hadamard(float * x, int64_t n, int32_t size) {
    return guarded([&] {
        need(size >= 1 && (size & (size - 1)) == 0, "A Hadamard block must be a power of two.");
        need(n >= 0, "The number of transforms is negative.");
        for (int64_t i = 0; i < n; ++i) {
            fasa::hadamard(x + i * size, size);
        }
    });
}

fasa_status fasa_config_check(const fasa_config * config) {
    return guarded([&] { fasa::check_config(*config); });
}

int32_t fasa_pays_from_cuda(int32_t k_type, int32_t group) { return fasa::pays_from_cuda(k_type, group); }

fasa_status fasa_session_create(const fasa_profile * profile, const fasa_config * config, fasa_session ** out) {
    return guarded([&] {
        need(config != nullptr && out != nullptr, "config and out must not be NULL.");
        std::unique_ptr<fasa_session> s(new fasa_session{{profile, *config}});
        fasa::register_session(&s->session);
        *out = s.release();
    });
}

fasa_status fasa_session_arm(fasa_session * session) {
    return guarded([&] { fasa::arm(&session->session); });
}

fasa_status fasa_session_disarm(fasa_session *) {
    return guarded([&] { fasa::arm(nullptr); });
}

int32_t fasa_session_backends(const fasa_session * session) { return fasa::backends_of(&session->session); }

fasa_status fasa_session_set_profile(fasa_session * session, const fasa_profile * profile) {
    return guarded([&] { session->session.set_profile(profile); });
}

fasa_status fasa_session_configure(fasa_session * session, const fasa_config * config) {
    return guarded([&] { session->session.configure(*config); });
}

fasa_status fasa_session_counters(const fasa_session * session, fasa_counters * out) {
    return guarded([&] { *out = session->session.counters(); });
}

fasa_status fasa_session_timings(const fasa_session * session, fasa_timings * out) {
    return guarded([&] { *out = session->session.timings(); });
}

fasa_status fasa_session_reset(fasa_session * session) {
    return guarded([&] { session->session.reset(); });
}

fasa_status fasa_session_invalidate(fasa_session * session) {
    return guarded([&] { session->session.invalidate(); });
}

fasa_status fasa_session_set_scorer(fasa_session * session, fasa_scorer scorer, void * user) {
    return guarded([&] { session->session.set_scorer(scorer, user); });
}

fasa_status fasa_session_captured(const fasa_session * session, int32_t layer, int32_t * head_dim, int32_t * n_head,
                                  int64_t * n_rows, float * out) {
    return guarded([&] { session->session.captured(layer, head_dim, n_head, n_rows, out); });
}

fasa_status fasa_session_captured_clear(fasa_session * session) {
    return guarded([&] { session->session.captured_clear(); });
}

fasa_status fasa_session_keys(const fasa_session * session, int32_t layer, int64_t c0, int64_t c1, int32_t * head_dim,
                              int32_t * n_head_kv, float * out) {
    return guarded([&] { session->session.keys(layer, c0, c1, head_dim, n_head_kv, out); });
}

void fasa_session_free(fasa_session * session) {
    if (session != nullptr) {
        fasa::unregister_session(&session->session);
        delete session;
    }
}
