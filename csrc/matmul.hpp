// C += A * B on small blocks that lie in cache, plain loops that a compiler turns into vector code.
#pragma once

#include <cstdint>

namespace fedss {

// B's and C's rows are padded to a multiple of this many columns.
constexpr int64_t kPad = 16;

inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// One register tile: ROWS x COLS sums over k, each in the order of k.
template <int ROWS, int COLS>
void multiply_add_tile(int64_t k, const double* a, int64_t a_row, int64_t a_col, const double* b, int64_t ldb,
                       double* c, int64_t ldc) {
  double sum[ROWS][COLS] = {};
  for (int64_t p = 0; p < k; ++p) {
    for (int i = 0; i < ROWS; ++i) {
      const double factor = a[i * a_row + p * a_col];
      for (int j = 0; j < COLS; ++j) sum[i][j] += factor * b[p * ldb + j];
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < COLS; ++j) c[i * ldc + j] += sum[i][j];
  }
}

// C (m, n) += A (m, k) * B (k, n). A has any strides; B and C have rows of ldb and ldc elements; n is a multiple of
// kPad.
inline void multiply_add(int64_t m, int64_t n, int64_t k, const double* a, int64_t a_row, int64_t a_col,
                         const double* b, int64_t ldb, double* c, int64_t ldc) {
  constexpr int kCols = 4;  // with four rows: half of the sixteen 16-byte registers of plain x86-64
  for (int64_t j = 0; j < n; j += kCols) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) {
      multiply_add_tile<4, kCols>(k, a + i * a_row, a_row, a_col, b + j, ldb, c + i * ldc + j, ldc);
    }
    for (; i < m; ++i) multiply_add_tile<1, kCols>(k, a + i * a_row, a_row, a_col, b + j, ldb, c + i * ldc + j, ldc);
  }
}

}  // namespace fedss
