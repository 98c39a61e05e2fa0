// The inner loops, compiled once for each instruction set and chosen at run time.
//
// Plain structs and pointers only: code that the compiler may share between translation units (of the standard library,
// say) must not be compiled with instructions that this machine may lack.
#pragma once

#include <cstdint>

namespace fedss {

using Bfloat16Pair = int32_t;  // two bfloat16 numbers, the first in the low half

// c(m, n) = a(m, k) b(k, n), or c += a b. a has any strides; b and c have rows of ldb and ldc elements; b's rows are
// readable to the next multiple of a vector. Row i of c is its row c_rows[i] if that is given. With pairs for elements,
// k counts pairs.
template <class Element, class Sum>
struct Product {
  int64_t m, n, k;
  const Element* a;
  int64_t a_row, a_col;
  const Element* b;
  int64_t ldb;
  Sum* c;
  int64_t ldc;
  const int64_t* c_rows;
  bool accumulate;
};

// Logits are kept in units of log 2 in float32 and of log e in float64.
template <class T>
constexpr double kLogitUnit = sizeof(T) == 4 ? 0.693147180559945309417 : 1.0;

// The logits of `classes` classes for `rows` rows of the batch, a class a row of the matrix:
//   o(j, r) = dot(j, r) * class_factor_j * row_factor_r + offset_j,   and none where target_r == label_j
// In float32 they need more digits than a float has: row factors and offsets come in two parts, the high part of an
// offset is a multiple of 2^-9, and logits and offsets are below 2^13.
template <class T>
struct LogitTile {
  int64_t classes, rows, stride;  // rows: a multiple of a vector
  T* values;                      // in: dot; out: exp(o - max)
  const T *class_factor, *offset, *offset_low;
  const T *row_factor, *row_factor_low;
  const T* origin;         // (rows,) of dot * class_factor, for sum_similarity
  const T* target;         // (rows,) the label of the row's target
  const T* label;          // (classes,) equal ones of a row and a class are those of an accidental hit
  T* max;                  // (rows,) out: of o, nearly; anything where there is none
  double* sum;             // (rows,) out: of exp(o - max)
  double* sum_similarity;  // (rows,) out, if not null: of exp(o - max) * (dot * class_factor - origin_r)
};

template <class T>
struct KernelsFor {
  int64_t lanes;  // elements of a vector
  void (*multiply)(const Product<T, T>&);
  void (*exponentiate)(const LogitTile<T>&);
  // values(j, r) *= factor_r, but 0 stays 0 where the factor is infinite (not where it is NaN).
  void (*scale_columns)(T* values, int64_t classes, int64_t rows, int64_t stride, const T* factor);
  double (*sum)(const T* values, int64_t n);
  // a . b, in float64
  double (*dot)(const T* a, const T* b, int64_t n);
  double (*norm)(const T* row, int64_t n);  // |row|
  // out = factor * row
  void (*scale)(const T* row, int64_t n, double factor, T* out);
  // out = factor * (row - along * (row . unit) * unit)
  void (*project)(const T* row, int64_t n, double along, const T* unit, double factor, T* out);
  // sum += factor * row
  void (*add_scaled)(const T* row, int64_t n, T factor, T* sum);
};

// What bfloat16 products take of a tile of exp(o - max), rounded to bfloat16 (to nearest, ties to even):
//   by_class(j / 2, r) = the pair of values(j, r) * row_factor_r * class_factor_j for j and j + 1
//   values(j, r)       = values(j, r) * unit_factor_r, as the first half of the row's memory
// 0 stays 0 where a factor is infinite (not where it is NaN). An odd last class is paired with 0.
struct BfloatTile {
  int64_t classes, rows, stride;
  float* values;
  const float *class_factor, *row_factor, *unit_factor;
  Bfloat16Pair* by_class;  // (classes / 2 rounded up, stride)
};

// Rows of bytes, and bit vectors that say which of them are in which sum by XOR.
struct XorRows {
  const char* rows;
  int64_t num_rows, row_bytes, row_stride;
  const uint8_t* bits;  // (queries, num_rows / 8 rounded up), bit i % 8 of byte i / 8 for row i
  int64_t queries, bits_stride;
  char* sums;  // (queries, sum_stride): row_bytes of them, and after those as many as make up whole vectors
  int64_t sum_stride;
};

// Products of pairs of bfloat16 numbers, and what prepares them.
struct BfloatKernels {
  void (*multiply)(const Product<Bfloat16Pair, float>&);
  void (*round_tile)(const BfloatTile&);
  void (*narrow)(const float* row, int64_t n, uint16_t* out);  // of numbers that bfloat16 has
  void (*interleave)(const uint16_t* first, const uint16_t* second, int64_t n, Bfloat16Pair* out);
};

struct Kernels {
  const char* name;
  KernelsFor<float> of_float;
  KernelsFor<double> of_double;
  // out = factor * values, rounded to float and then to bfloat16 (to nearest, ties to even)
  void (*scale_to_bfloat16)(const float* values, int64_t n, float factor, uint16_t* out);
  void (*widen_bfloat16)(const uint16_t* row, int64_t n, float* out);
  void (*exponentials)(const double* x, int64_t n, double* out);  // out_i = exp(x_i) for x_i <= 0
  void (*xor_rows)(const XorRows&);                               // sum ^= each row whose bit is set
  const BfloatKernels* of_bfloat16;                               // null where there is no instruction for them
  double precise_work;                           // multiply-adds of a product up to which float64 is worth its time
  void (*multiply_in_registers)(int64_t steps);  // to measure how fast that can be
  double operations_a_step;                      // of it, in float32
};

template <class T>
const KernelsFor<T>& kernels_for(const Kernels& kernels);
template <>
inline const KernelsFor<float>& kernels_for<float>(const Kernels& kernels) {
  return kernels.of_float;
}
template <>
inline const KernelsFor<double>& kernels_for<double>(const Kernels& kernels) {
  return kernels.of_double;
}

// One for each translation unit of kernels.cpp that this build has.
namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}
namespace neon {
extern const Kernels kKernels;
}

}  // namespace fedss
