// The compiler's vector type and what the kernels make of it: loads, reductions, exp, and the register-tiled matrix
// product. Only for kernels.cpp, which is compiled once per instruction set; everything here is in the namespace of
// that instruction set, so that the linker cannot take one set's code for another's.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.hpp"

#if defined(__AVX512BF16__)
#define FEDSS_ISA avx512_bf16
#elif defined(__AVX512F__)
#define FEDSS_ISA avx512
#elif defined(__AVX2__)
#define FEDSS_ISA avx2
#elif defined(__ARM_NEON)
#define FEDSS_ISA neon
#else
#define FEDSS_ISA baseline
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace fedss {
namespace FEDSS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 14, kTileVectors = 2;  // 28 sums, 2 of b, 1 of a: 31 of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileRows = 6, kTileVectors = 2;  // 12 + 2 + 1 of 16
#elif defined(__ARM_NEON)
constexpr int kVectorBytes = 16, kTileRows = 12, kTileVectors = 2;  // 24 + 2 + 1 of 32
#else
constexpr int kVectorBytes = 16, kTileRows = 4, kTileVectors = 2;  // 8 + 2 + 1, and the products, of 16
#endif

template <class T>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  // as many elements as a vector of double has
  typedef T Half __attribute__((vector_size(kVectorBytes * sizeof(T) / 8)));
  typedef T UnalignedHalf __attribute__((vector_size(kVectorBytes * sizeof(T) / 8), aligned(sizeof(T)), may_alias));
};

template <class T>
using Vec = typename VectorOf<T>::Type;
using Doubles = Vec<double>;

template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));
constexpr int kDoubles = kLanes<double>;

template <class T>
inline Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::Unaligned*>(from);
}

template <class T>
inline void store(T* to, Vec<T> value) {
  *reinterpret_cast<typename VectorOf<T>::Unaligned*>(to) = value;
}

template <class T>
inline Vec<T> broadcast(T value) {
  return Vec<T>{} + value;
}

// The first n elements; the others are 0 and not read, or not written.
template <class T>
inline Vec<T> load_some(const T* from, int64_t n) {
  T room[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) room[i] = from[i];
  return load(room);
}

template <class T>
inline void store_some(T* to, Vec<T> value, int64_t n) {
  T room[kLanes<T>];
  store(room, value);
  for (int64_t i = 0; i < n; ++i) to[i] = room[i];
}

// As many elements as a vector of double has, converted. By intrinsics where compilers make a detour of
// __builtin_convertvector.
inline Doubles load_doubles(const double* from) { return load(from); }
inline void store_doubles(double* to, Doubles value) { store(to, value); }

inline Doubles load_doubles(const float* from) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_cvtps_pd(_mm256_loadu_ps(from));
#elif defined(__AVX2__)
  return (Doubles)_mm256_cvtps_pd(_mm_loadu_ps(from));
#else
  return __builtin_convertvector(*reinterpret_cast<const VectorOf<float>::UnalignedHalf*>(from), Doubles);
#endif
}

inline void store_doubles(float* to, Doubles value) {
#if defined(__AVX512F__)
  _mm256_storeu_ps(to, _mm512_cvtpd_ps((__m512d)value));
#elif defined(__AVX2__)
  _mm_storeu_ps(to, _mm256_cvtpd_ps((__m256d)value));
#else
  *reinterpret_cast<VectorOf<float>::UnalignedHalf*>(to) = __builtin_convertvector(value, VectorOf<float>::Half);
#endif
}

inline double sum_of(Doubles value) {
  double room[kDoubles];
  store(room, value);
  for (int step = kDoubles / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) room[i] += room[i + step];
  }
  return room[0];
}

// The sums of the lanes i and i + kDoubles.
inline Doubles halves_added(Vec<float> value) {
  float room[kLanes<float>];
  store(room, value);
  return load_doubles(room) + load_doubles(room + kDoubles);
}

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FEDSS_FUSED 1

// a b + c, rounded once. Not left to the compiler where c is a product too, as it may fuse that one instead.
inline Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
}
#endif

// e^x for x <= 0, or NaN; 0 near and below the smallest normal number. Within about one unit in the last place:
// x = n ln 2 + r with |r| <= ln 2 / 2, and the exponential series of r.
inline Doubles exp_of(Doubles x) {
  constexpr double kShift = 0x1.8p52;  // adding it rounds to an integer, which is then in the low bits
  constexpr double kLog2e = 0x1.71547652b82fep0, kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  const Doubles shifted = x * kLog2e + kShift, n = shifted - kShift;
  const Doubles r = (x - n * kLn2High) - n * kLn2Low;
  Doubles p = r * (1.0 / 6227020800) + (1.0 / 479001600);  // the next term is below 1e-17
  p = p * r + (1.0 / 39916800);
  p = p * r + (1.0 / 3628800);
  p = p * r + (1.0 / 362880);
  p = p * r + (1.0 / 40320);
  p = p * r + (1.0 / 5040);
  p = p * r + (1.0 / 720);
  p = p * r + (1.0 / 120);
  p = p * r + (1.0 / 24);
  p = p * r + (1.0 / 6);
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  // Of unsigned numbers, as it overflows where the result is another one.
  const Vec<uint64_t> exponent = ((Vec<uint64_t>)shifted << 52) + 0x3ff0000000000000;
  return x < -708.0 ? Doubles{} : p * (Doubles)exponent;
}

// a b + c, nearly as if rounded once, where most of a b cancels.
inline Vec<float> add_exactly(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(FEDSS_FUSED)
  return fused(a, b, c);
#else
  // Dekker's product: both factors in halves, whose products are exact.
  const Vec<float> product = a * b, a_shifted = a * 4097.0f, b_shifted = b * 4097.0f;
  const Vec<float> a_high = a_shifted - (a_shifted - a), a_low = a - a_high;
  const Vec<float> b_high = b_shifted - (b_shifted - b), b_low = b - b_high;
  const Vec<float> rest = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low;
  return (product + c) + rest;
#endif
}

// 2^(a b + high + low), where high is a multiple of 2^-9 below 2^15, a b + high + low is at most about 0, and low is
// small: as accurate as if the sum had not been rounded. 0 near and below the smallest normal number.
inline Vec<float> exp2_of(Vec<float> a, Vec<float> b, Vec<float> high, Vec<float> low) {
  constexpr float kShift = 0x1.8p23f, kLn2 = 0x1.62e430p-1f;
  const Vec<float> sum = a * b + high, shifted = sum + kShift, n = shifted - kShift;
  const Vec<float> r = add_exactly(a, b, high - n) + low;  // high - n is exact
  constexpr float c1 = kLn2, c2 = c1 * kLn2 / 2, c3 = c2 * kLn2 / 3, c4 = c3 * kLn2 / 4, c5 = c4 * kLn2 / 5,
                  c6 = c5 * kLn2 / 6, c7 = c6 * kLn2 / 7;  // the next term is below 6e-9
  const Vec<float> r2 = r * r;                             // pairs of terms, as a chain of eight would wait for itself
  const Vec<float> p = ((r * c7 + c6) * r2 + (r * c5 + c4)) * (r2 * r2) + ((r * c3 + c2) * r2 + (r * c1 + 1.0f));
  const Vec<uint32_t> exponent = ((Vec<uint32_t>)shifted << 23) + 0x3f800000;
  return sum < -125.0f ? Vec<float>{} : p * (Vec<float>)exponent;
}

// ---- the matrix product ----

inline Vec<float> multiply_add(Vec<float> sum, Vec<float> a, Vec<float> b) { return sum + a * b; }
inline Vec<double> multiply_add(Vec<double> sum, Vec<double> a, Vec<double> b) { return sum + a * b; }
#if defined(__AVX512BF16__)
// Each lane: sum + a.first * b.first + a.second * b.second.
inline Vec<float> multiply_add(Vec<float> sum, Vec<Bfloat16Pair> a, Vec<Bfloat16Pair> b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

// Sums over so many terms stay in registers before they are added to what came before: the rounding errors of a long
// sum grow with the size of its partial sums.
constexpr int64_t kSumBlock = 128;

// ROWS x VECTORS registers of sums over k in [begin, end), in the order of k, stored to c or added to it. `last` is how
// many elements of the last vector c has.
template <class Element, class Sum, int ROWS, int VECTORS>
void multiply_tile(const Product<Element, Sum>& p, int64_t i0, int64_t j0, int64_t last, int64_t begin, int64_t end,
                   bool accumulate) {
  constexpr int kStep = kLanes<Sum>;
  const Element* a = p.a + i0 * p.a_row;
  const Element* b = p.b + j0;
  Vec<Sum> sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = Vec<Sum>{};
  }
  for (int64_t k = begin; k < end; ++k) {
    Vec<Element> columns[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) columns[j] = load(b + k * p.ldb + j * kStep);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec<Element> row = broadcast(a[i * p.a_row + k * p.a_col]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = multiply_add(sum[i][j], row, columns[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    Sum* c = p.c + (p.c_rows ? p.c_rows[i0 + i] : i0 + i) * p.ldc + j0;
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      Sum* to = c + j * kStep;
      if (j < VECTORS - 1 || last == kStep) {
        store(to, accumulate ? load(to) + sum[i][j] : sum[i][j]);
      } else {
        store_some(to, accumulate ? load_some(to, last) + sum[i][j] : sum[i][j], last);
      }
    }
  }
}

template <class Element, class Sum, int VECTORS, int ROWS = kTileRows>
void multiply_rows(int rows, const Product<Element, Sum>& p, int64_t i0, int64_t j0, int64_t last, int64_t begin,
                   int64_t end, bool accumulate) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return multiply_tile<Element, Sum, ROWS, VECTORS>(p, i0, j0, last, begin, end, accumulate);
    multiply_rows<Element, Sum, VECTORS, ROWS - 1>(rows, p, i0, j0, last, begin, end, accumulate);
  }
}

// A block of k meets all rows of a before the next one comes: what it needs of b stays in the first cache.
template <class Element, class Sum>
void multiply(const Product<Element, Sum>& p) {
  constexpr int64_t kStep = kLanes<Sum>, kColumns = kStep * kTileVectors;
  const int64_t tiles = (p.m + kTileRows - 1) / kTileRows;
  const int64_t blocks = p.k > kSumBlock ? (p.k + kSumBlock - 1) / kSumBlock : 1;
  for (int64_t j = 0; j < p.n; j += kColumns) {
    const int64_t left = p.n - j, last = (left - 1) % kStep + 1;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = p.k * block / blocks, end = p.k * (block + 1) / blocks;
      const bool accumulate = p.accumulate || block > 0;
      for (int64_t tile = 0; tile < tiles; ++tile) {  // of nearly equal heights, so that none is too low to be quick
        const int64_t i = p.m * tile / tiles;
        const int rows = int(p.m * (tile + 1) / tiles - i);
        if (left > kStep) {
          multiply_rows<Element, Sum, kTileVectors>(rows, p, i, j, left >= kColumns ? kStep : last, begin, end,
                                                    accumulate);
        } else {
          multiply_rows<Element, Sum, 1>(rows, p, i, j, last, begin, end, accumulate);
        }
      }
    }
  }
}

}  // namespace FEDSS_ISA
}  // namespace fedss
