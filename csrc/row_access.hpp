// Rows of a matrix as a loop sees them: pointers of the element's type, so that the loop is compiled once for each type
// and becomes vector code, and memory that is asked for before it is needed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensor_view.hpp"
#include "thread_pool.hpp"

namespace fedss {

struct Float16 {
  uint16_t bits;
  operator float() const { return float16_to_float(bits); }
};

struct BFloat16 {
  uint16_t bits;
  operator float() const { return bfloat16_to_float(bits); }
};

// body(Element()) for rows of `dtype`: T's own, float16 or bfloat16.
template <class T, class Body>
void with_row_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float16: return body(Float16());
    case DType::bfloat16: return body(BFloat16());
    default: return body(T());
  }
}

// body(T(), Element()) for a matrix of `dtype`, float32 or float64, and rows of `row_dtype`: its own or 16 bits.
template <class Body>
void with_types(DType dtype, DType row_dtype, const Body& body) {
  const auto with_rows_of = [&](auto number) {
    with_row_type<decltype(number)>(row_dtype, [&](auto element) { body(number, element); });
  };
  if (dtype == DType::float64) {
    with_rows_of(double());
  } else {
    with_rows_of(float());
  }
}

constexpr int64_t kLineBytes = 64;     // of a cache line
constexpr int64_t kRunBytes = 256;     // of a row between two rounds of prefetching
constexpr int64_t kAheadBytes = 4096;  // how far ahead of the arithmetic rows are asked for: they come in no order that
                                       // hardware could guess

// How many rows of n elements lie in that distance.
template <class T>
int64_t rows_ahead(int64_t n) {
  return std::max<int64_t>(1, kAheadBytes / std::max<int64_t>(1, n * int64_t(sizeof(T))));
}

// Asks for the cache lines of n elements.
template <class T>
void prefetch(const T* data, int64_t n) {
  for (int64_t d = 0; d < n; d += kLineBytes / int64_t(sizeof(T))) __builtin_prefetch(data + d);
}

// Where element (i, j) is; null in a matrix without memory, whose rows are empty.
template <class Element>
const Element* at(const Matrix& m, int64_t i, int64_t j) {
  if (m.data == nullptr) return nullptr;
  return static_cast<const Element*>(m.data) + i * m.row_stride + j * m.col_stride;
}

template <class Element>
Element* at_mutable(const Matrix& m, int64_t i, int64_t j) {
  return const_cast<Element*>(at<Element>(m, i, j));
}

// How the rows of a call are shared out: elements below which threads cost more than they give, and those of one task.
struct Shares {
  double serial_elements;
  int64_t task_elements;
};

// body(i, later) once for each position i of class_ids, whose row has D elements of T, and that of a row that comes a
// little later, whose memory the body asks for.
template <class T, class Body>
void for_listed_rows(const std::vector<int64_t>& class_ids, int64_t D, Shares shares, int threads, const Body& body) {
  const int64_t M = int64_t(class_ids.size()), ahead = rows_ahead<T>(D);
  const int64_t per_task = std::max<int64_t>(1, shares.task_elements / std::max<int64_t>(1, D));
  if (double(M) * double(D) < shares.serial_elements) threads = 1;
  parallel_for((M + per_task - 1) / per_task, std::max(threads, 1), [&](int64_t task, int) {
    const int64_t last = std::min((task + 1) * per_task, M);
    for (int64_t i = task * per_task; i < last; ++i) {
      body(i, std::min(i + ahead, M - 1));
    }
  });
}

}  // namespace fedss
