// One query row of a replaced node: where its numbers lie, and the stages for one of its heads. Threads share heads and
// parts of them in attention.cpp.
#pragma once

#include "attention.h"

namespace fasa {

// Running softmax of one part of a head's selection; see fasa_attend.
struct State {
    float * m;
    float * d;
    float * o;
};

State state_of(const NodeWork & w, int64_t head, int split);
void  clear(const State & s, int64_t v_dim);
void  merge(const State & into, const State & from, int64_t v_dim);

// Takes the model's sink into account, divides, and writes the head's result.
void finish(const NodeWork & w, const State & s, int64_t head, const Row & row);

const float * query(const NodeWork & w, int64_t head, const Row & row); // in the basis of the cache
void          rope_query(const NodeWork & w, int64_t head, const Row & row, float * out);
fasa_kv       kv_of(const NodeWork & w, int64_t head, const Row & row);

float *   scores_of(const NodeWork & w, const Row & row, int64_t head);
float *   peaks_of(const NodeWork & w, const Row & row, int64_t head);
int32_t * cells_of(const NodeWork & w, int64_t head);

// From the scores, or all visible cells where the row attends to all.
void select_head(const NodeWork & w, const Row & row, int64_t head);

// attend for one of `n_split` equal parts of a head's selection.
void attend_part(const NodeWork & w, const Row & row, int64_t head, int split, int n_split);

} // namespace fasa
