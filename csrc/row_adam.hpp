// One step of AdamW on some rows of a matrix, for i = 0, 1, ..., M - 1, c = class_ids[i] and g = rows[i]:
//
//     n = row_steps[c] + 1                                             row_steps[c] = n
//     m = exp_avg[c] + (1 - beta1) * (g - exp_avg[c])                  exp_avg[c] = m
//     v = beta2 * exp_avg_sq[c] + (1 - beta2) * (g * g)                exp_avg_sq[c] = v
//     weight[c] = (1 - lr * weight_decay) * weight[c]
//                 - lr / (1 - beta1^n) * (m / (sqrt(v) / sqrt(1 - beta2^n) + eps))
//
// weight, exp_avg, exp_avg_sq (C, D) float32 or float64, all of one type; row_steps (C,) int64: a row is corrected for
// its own steps alone; class_ids (M,) int64 in [0, C), each once; rows (M, D) of weight's type or a 16-bit one. Each is
// read once and the first four written once. Numbers of a row are computed in double and rounded once, every operation
// on it is rounded by itself, never fused: the bits are the same for any number of threads and any instruction set.
#pragma once

#include "tensor_view.hpp"

namespace fedss {

struct RowAdam {
  Matrix weight, exp_avg, exp_avg_sq;
  Vector row_steps, class_ids;
  Matrix rows;
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0;
};

// Throws std::out_of_range for an id out of range and std::invalid_argument for a repeated one, naming position and
// value, before anything is written.
void row_adam_step(const RowAdam& step, int threads);

}  // namespace fedss
