// out[class_ids[i]] += scale[i] * rows[i], for i = 0, 1, ..., M - 1.
//
// class_ids (M,) int64 in [0, C); rows (M, D) of out's type or a 16-bit one; scale (M,) or empty; out (C, D) float32 or
// float64. Deterministic: an element of `out` is owned by one thread, which adds to it in the order of i; multiply,
// round, add, round, never fused, so the bits are the same for any number of threads and any instruction set.
#pragma once

#include "tensor_view.hpp"

namespace fedss {

// Throws std::out_of_range for an id out of range, naming position and value, before anything is written.
void scatter_add(const Matrix& out, const Vector& class_ids, const Matrix& rows, const Vector& scale, int threads);

}  // namespace fedss
