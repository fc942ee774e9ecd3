// Nodes computed for calibration and evaluation: slow, exact where they attend to everything, on the same cache.
#pragma once

#include "attention.h"

namespace fasa {

// Exact attention of every row over all its visible cells, and a copy of the queries.
void run_capture(const NodeWork & w, int ith, int nth);

// select and attend on scores that w.scorer gives, all on the first thread.
void run_scored(const NodeWork & w, int ith);

} // namespace fasa
