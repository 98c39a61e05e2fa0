// One step of SGD with momentum on some rows of a matrix, for i = 0, 1, ..., M - 1 and c = class_ids[i]:
//
//     g = rows[i] + weight_decay * weight[c]
//     v = momentum * velocity[c] + g                    velocity[c] = v
//     weight[c] -= lr * v                               or lr * (g + momentum * v) if nesterov
//
// weight, velocity (C, D) float32 or float64, velocity of weight's type or without data if momentum is 0: v = g then;
// class_ids (M,) int64 in [0, C), each once; rows (M, D) of weight's type or a 16-bit one. Each is read once,
// and weight and velocity written once. Every operation is rounded by itself, never fused, so the bits are the same for
// any number of threads and any instruction set.
#pragma once

#include "tensor_view.hpp"

namespace fedss {

struct RowMomentum {
  Matrix weight, velocity;
  Vector class_ids;
  Matrix rows;
  double lr = 0, momentum = 0, weight_decay = 0;
  bool nesterov = false;
};

// Throws std::out_of_range for an id out of range and std::invalid_argument for a repeated one, naming position and
// value, before anything is written.
void row_momentum_step(const RowMomentum& step, int threads);

}  // namespace fedss
