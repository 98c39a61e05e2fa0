// SGD with momentum for a matrix of which each step touches few rows. The others coast on their velocity:
//
//     v <- beta v + g;   w <- w - lr v                      with g = 0 for the rows that have no gradient
//
// A row is stored as it was after its own last step, with the number of steps of the matrix that were done then. Once
// `now` are done, k = now - stepped of them have passed it by, and what it is then follows in closed form:
//
//     w - lr coast(k) v,   coast(k) = beta + beta^2 + ... + beta^k = beta (1 - beta^k) / (1 - beta);   beta^k v
//
// So a step costs what the rows in it cost, and reading changes nothing. Factors are computed in double and rounded
// once, every operation on a row is rounded by itself, and a step starts from exactly what a read gives: the bits are
// the same for any number of threads and any instruction set.
#pragma once

#include "tensor_view.hpp"

namespace fedss {

struct LazyMomentum {
  Matrix weight, velocity;  // (C, D) float32; zeros of velocity: a row that was never stepped
  Vector stepped;           // (C,) int64
  double lr = 0, momentum = 0;
  int64_t now = 0;
};

// out[i] = row class_ids[i] as it is now; out (S, D) float32. Throws std::out_of_range for an id out of range, naming
// position and value, before anything is written.
void lazy_momentum_read(const LazyMomentum& table, const Vector& class_ids, const Matrix& out, int threads);

// The step that `now` becomes now + 1 by, for the rows that have a gradient; rows (M, D) float32. Returns whether all
// numbers that it wrote are finite. Throws like the read, and std::invalid_argument for an id that comes twice.
bool lazy_momentum_step(const LazyMomentum& table, const Vector& class_ids, const Matrix& rows, int threads);

}  // namespace fedss
