// Compiled once for each instruction set; see kernels.hpp.
#include "kernels.hpp"

#include <type_traits>

#include "simd.hpp"

namespace fedss {
namespace FEDSS_ISA {
namespace {

constexpr double kInf = __builtin_inf();

constexpr int64_t kBlock = 32;  // classes whose logits stay in the first cache while all rows pass

template <class T>
inline Vec<T> logit(const LogitTile<T>& tile, int64_t j, Vec<T> dot, Vec<T> row_factor) {
  return dot * tile.class_factor[j] * row_factor + tile.offset[j];
}

// Raises max_r to that of o(j, r) over j, to the rounding of T: what exp is relative to need not be exact.
template <class T>
void raise_max(const LogitTile<T>& tile, int64_t begin, int64_t end, int64_t r) {
  const Vec<T> row_factor = load(tile.row_factor + r), target = load(tile.target + r);
  Vec<T> max = load(tile.max + r);
  for (int64_t j = begin; j < end; ++j) {
    Vec<T> o = logit(tile, j, load(tile.values + j * tile.stride + r), row_factor);
    o = target == tile.label[j] ? broadcast(T(-kInf)) : o;
    max = o > max ? o : max;  // a NaN is not greater: it shows in the sum
  }
  store(tile.max + r, max);
}

// What exponentiation is relative to: a multiple of 2^-9 in float32, 0 where there are no terms.
template <class T>
void settle_max(const LogitTile<T>& tile) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    T& max = tile.max[r];
    if (max == T(-kInf)) max = 0;
    if (sizeof(T) == 4 && max < T(1 << 14) && max > T(-(1 << 14))) {
      const T shift = T(0x1.8p14);
      volatile T rounded = max + shift;  // a float in [2^14, 2^15) has its last bit at 2^-9
      max = rounded - shift;
    }
  }
}

inline Vec<float> exponential(const LogitTile<float>& tile, int64_t j, int64_t r, Vec<float> similarity) {
  const Vec<float> low = similarity * load(tile.row_factor_low + r) + tile.offset_low[j];
  return exp2_of(similarity, load(tile.row_factor + r), tile.offset[j] - load(tile.max + r), low);
}

inline Vec<double> exponential(const LogitTile<double>& tile, int64_t j, int64_t r, Vec<double> similarity) {
  const Vec<double> o = similarity * load(tile.row_factor + r) + tile.offset[j] - load(tile.max + r);
  return exp_of(o > 0.0 ? Vec<double>{} : o);  // rounded otherwise than the maximum was, the largest may be above it
}

template <class T, bool SIMILARITY>
void add_exponentials(const LogitTile<T>& tile, int64_t begin, int64_t end, int64_t r) {
  const Vec<T> target = load(tile.target + r);
  Vec<T> sum{}, sum_similarity{};  // of a block; those of the blocks are added in float64
  for (int64_t j = begin; j < end; ++j) {
    T* value = tile.values + j * tile.stride + r;
    const Vec<T> similarity = load(value) * tile.class_factor[j];
    Vec<T> e = exponential(tile, j, r, similarity);
    e = target == tile.label[j] ? Vec<T>{} : e;
    store(value, e);
    sum += e;
    if (SIMILARITY) sum_similarity += target == tile.label[j] ? Vec<T>{} : e * (similarity - load(tile.origin + r));
  }
  for (int i = 0; i < kLanes<T>; ++i) {
    tile.sum[r + i] += double(sum[i]);
    if (SIMILARITY) tile.sum_similarity[r + i] += double(sum_similarity[i]);
  }
}

template <class T>
void exponentiate(const LogitTile<T>& tile) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    tile.max[r] = T(-kInf), tile.sum[r] = 0;
    if (tile.sum_similarity) tile.sum_similarity[r] = 0;
  }
  for (int64_t j = 0; j < tile.classes; j += kBlock) {
    const int64_t end = j + kBlock < tile.classes ? j + kBlock : tile.classes;
    for (int64_t r = 0; r < tile.rows; r += kLanes<T>) raise_max(tile, j, end, r);
  }
  settle_max(tile);
  for (int64_t j = 0; j < tile.classes; j += kBlock) {
    const int64_t end = j + kBlock < tile.classes ? j + kBlock : tile.classes;
    for (int64_t r = 0; r < tile.rows; r += kLanes<T>) {
      if (tile.sum_similarity) {
        add_exponentials<T, true>(tile, j, end, r);
      } else {
        add_exponentials<T, false>(tile, j, end, r);
      }
    }
  }
}

// 0 * factor, but 0 where the factor is infinite.
template <class V>
V zero_times(V factor) {
  return factor == factor ? V{} : factor;
}

template <class T>
void scale_columns(T* values, int64_t classes, int64_t rows, int64_t stride, const T* factor) {
  for (int64_t r = 0; r < rows; r += kLanes<T>) {
    const Vec<T> by = load(factor + r), zero = zero_times(by);
    for (int64_t j = 0; j < classes; ++j) {
      T* at = values + j * stride + r;
      const Vec<T> value = load(at);
      store(at, value == T(0) ? zero : value * by);
    }
  }
}

template <class T>
double sum(const T* values, int64_t n) {
  Doubles total{};
  int64_t i = 0;
  for (; i + kDoubles <= n; i += kDoubles) total += load_doubles(values + i);
  for (int lane = 0; i + lane < n; ++lane) total[lane] += double(values[i + lane]);
  return sum_of(total);
}

// The loops over a row: whole vectors, then what is left.

template <class T>
double dot(const T* a, const T* b, int64_t n) {
  Doubles first{}, second{};
  int64_t d = 0;
  for (; d + 2 * kDoubles <= n; d += 2 * kDoubles) {
    first += load_doubles(a + d) * load_doubles(b + d);
    second += load_doubles(a + d + kDoubles) * load_doubles(b + d + kDoubles);
  }
  double sum = sum_of(first + second);
  for (; d < n; ++d) sum += double(a[d]) * double(b[d]);
  return sum;
}

#if defined(FEDSS_FUSED)
// The same in half the time: sums of a few float products, which are then added in float64. Good to 2^-26 of the sum of
// the products' sizes, if that is in float's range.
inline double dot_in_blocks(const float* a, const float* b, int64_t n) {
  constexpr int64_t kStep = kLanes<float>, kBlockVectors = 8;
  Doubles total{};
  int64_t d = 0;
  while (d + kStep <= n) {
    Vec<float> first{}, second{};
    const int64_t left = (n - d) / kStep, vectors = left < kBlockVectors ? left : kBlockVectors;
    for (int64_t v = 0; v + 2 <= vectors; v += 2, d += 2 * kStep) {
      first = fused(load(a + d), load(b + d), first);
      second = fused(load(a + d + kStep), load(b + d + kStep), second);
    }
    if (vectors % 2) first = fused(load(a + d), load(b + d), first), d += kStep;
    total += halves_added(first + second);
  }
  double sum = sum_of(total);
  for (; d < n; ++d) sum += double(a[d]) * double(b[d]);
  return sum;
}

// A float64 number as a sum of two floats: what it multiplies is rounded as if by itself.
struct TwoFloats {
  Vec<float> high, low;

  explicit TwoFloats(double value)
      : high(broadcast(float(value))), low(broadcast(float(value - double(float(value))))) {}
  // Whether both are normal numbers with room for a product.
  static bool hold(double value) {
    const double size = __builtin_fabs(value);
    return size == 0 || (size > 0x1p-80 && size < 0x1p80);
  }
};

inline Vec<float> operator*(Vec<float> value, TwoFloats by) { return fused(value, by.high, value * by.low); }
#endif

// |row|
template <class T>
double norm(const T* row, int64_t n) {
#if defined(FEDSS_FUSED)
  if constexpr (std::is_same<T, float>::value) {
    const double squares = dot_in_blocks(row, row, n);
    if (squares > 0x1p-60 && squares < 0x1p100) return __builtin_sqrt(squares);
  }
#endif
  return __builtin_sqrt(dot(row, row, n));
}

template <class T>
void scale(const T* row, int64_t n, double factor, T* out) {
  int64_t d = 0;
#if defined(FEDSS_FUSED)
  if constexpr (std::is_same<T, float>::value) {
    if (TwoFloats::hold(factor)) {
      const TwoFloats by(factor);
      for (; d + kLanes<float> <= n; d += kLanes<float>) store(out + d, load(row + d) * by);
    }
  }
#endif
  for (; d + kDoubles <= n; d += kDoubles) store_doubles(out + d, load_doubles(row + d) * factor);
  for (; d < n; ++d) out[d] = T(double(row[d]) * factor);
}

template <class T>
void project(const T* row, int64_t n, double along, const T* unit, double factor, T* out) {
  int64_t d = 0;
#if defined(FEDSS_FUSED)
  if constexpr (std::is_same<T, float>::value) {
    const double share = along * dot_in_blocks(row, unit, n);
    if (TwoFloats::hold(share) && TwoFloats::hold(factor)) {
      const TwoFloats minus(-share), by(factor);
      for (; d + kLanes<float> <= n; d += kLanes<float>) {
        const Vec<float> across = fused(load(unit + d), minus.high, load(row + d));
        store(out + d, fused(load(unit + d), minus.low, across) * by);
      }
      for (; d < n; ++d) out[d] = float((double(row[d]) - double(unit[d]) * share) * factor);
      return;
    }
  }
#endif
  along *= dot(row, unit, n);
  for (; d + kDoubles <= n; d += kDoubles) {
    store_doubles(out + d, (load_doubles(row + d) - load_doubles(unit + d) * along) * factor);
  }
  for (; d < n; ++d) out[d] = T((double(row[d]) - double(unit[d]) * along) * factor);
}

template <class T>
void add_scaled(const T* row, int64_t n, T factor, T* sum) {
  int64_t d = 0;
  for (; d + kLanes<T> <= n; d += kLanes<T>) store(sum + d, load(sum + d) + load(row + d) * factor);
  for (; d < n; ++d) sum[d] += row[d] * factor;
}

void scale_to_bfloat16(const float* values, int64_t n, float factor, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = values[i] * factor;
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    out[i] = uint16_t(value == value ? rounded : 0x7fc0);
  }
}

void widen_bfloat16(const uint16_t* row, int64_t n, float* out) {
  uint32_t* bits = reinterpret_cast<uint32_t*>(out);
  for (int64_t d = 0; d < n; ++d) bits[d] = uint32_t(row[d]) << 16;
}

void exponentials(const double* x, int64_t n, double* out) {
  for (int64_t i = 0; i < n; i += kDoubles) {
    const int64_t some = n - i < kDoubles ? n - i : kDoubles;
    store_some(out + i, exp_of(load_some(x + i, some)), some);
  }
}

// Of each four rows all 16 sums are made once, and every query adds one of them, where it would add up to four rows
// (Arlazarov, Dinic, Kronrod and Faradzhev, 1970). They are made of a strip of the columns of 32 rows, so that they
// stay in the first cache while the queries pass.
using Bytes = Vec<uint8_t>;
constexpr int64_t kGroupRows = 4, kGroups = 8, kSums = 1 << kGroupRows, kXorRows = kGroups * kGroupRows;
constexpr int64_t kStripBytes = 4 * kVectorBytes;

template <int VECTORS>
struct GroupSums {
  alignas(kVectorBytes) uint8_t of[kGroups][kSums][VECTORS * kVectorBytes];
};

// The bytes [column, column + VECTORS vectors) of a row; zeros behind its end, and of a row that is not there.
template <int VECTORS>
void read_strip(const XorRows& p, int64_t row, int64_t column, Bytes* strip) {
  for (int v = 0; v < VECTORS; ++v) strip[v] = Bytes{};
  if (row >= p.num_rows) return;
  const uint8_t* from = reinterpret_cast<const uint8_t*>(p.rows) + row * p.row_stride + column;
  int64_t left = p.row_bytes - column;
  for (int v = 0; v < VECTORS && left > 0; ++v, from += kVectorBytes, left -= kVectorBytes) {
    strip[v] = left >= kVectorBytes ? load(from) : load_some(from, left);
  }
}

template <int VECTORS>
void sum_groups(const XorRows& p, int64_t first, int64_t column, GroupSums<VECTORS>& sums) {
  for (int64_t g = 0; g < kGroups; ++g) {
    auto* const of = sums.of[g];
    for (int v = 0; v < VECTORS; ++v) store(of[0] + v * kVectorBytes, Bytes{});
    for (int64_t i = 0; i < kGroupRows; ++i) {
      Bytes strip[VECTORS];
      read_strip<VECTORS>(p, first + g * kGroupRows + i, column, strip);
      for (int64_t s = 0; s < 1 << i; ++s) {
        for (int64_t v = 0, at = 0; v < VECTORS; ++v, at += kVectorBytes) {
          store(of[(1 << i) + s] + at, load(of[s] + at) ^ strip[v]);
        }
      }
    }
  }
}

// The bits of rows [first, first + 32) of a query.
inline uint32_t bits_of(const XorRows& p, int64_t query, int64_t first) {
  const uint8_t* from = p.bits + query * p.bits_stride + first / 8;
  uint32_t bits = 0;
  if (first + kXorRows <= p.num_rows) {
    __builtin_memcpy(&bits, from, sizeof bits);
  } else {
    for (int64_t i = 0; first + 8 * i < p.num_rows; ++i) bits |= uint32_t(from[i]) << (8 * i);
  }
  return bits;
}

// p is a copy, which stores of bytes cannot change: else all of it were read again for each query.
template <int VECTORS>
void xor_strip(const XorRows p, int64_t column) {
  GroupSums<VECTORS> sums;
  for (int64_t first = 0; first < p.num_rows; first += kXorRows) {
    sum_groups<VECTORS>(p, first, column, sums);
    for (int64_t q = 0; q < p.queries; ++q) {
      uint8_t* const to = reinterpret_cast<uint8_t*>(p.sums) + q * p.sum_stride + column;
      const uint32_t bits = bits_of(p, q, first);
      Bytes sum[VECTORS];
      for (int v = 0; v < VECTORS; ++v) sum[v] = load(to + v * kVectorBytes);
      for (int64_t g = 0; g < kGroups; ++g) {
        const uint8_t* const of_group = sums.of[g][bits >> g * kGroupRows & (kSums - 1)];
        for (int v = 0; v < VECTORS; ++v) sum[v] ^= load(of_group + v * kVectorBytes);
      }
      for (int v = 0; v < VECTORS; ++v) store(to + v * kVectorBytes, sum[v]);
    }
  }
}

void xor_rows(const XorRows& p) {
  int64_t column = 0;
  for (; column + kStripBytes <= p.row_bytes; column += kStripBytes) xor_strip<4>(p, column);
  switch ((p.row_bytes - column + kVectorBytes - 1) / kVectorBytes) {
    case 1: return xor_strip<1>(p, column);
    case 2: return xor_strip<2>(p, column);
    case 3: return xor_strip<3>(p, column);
    case 4: return xor_strip<4>(p, column);
  }
}

#if defined(__AVX512BF16__)
using Ints = Vec<uint32_t>;

// In the high half of each lane; a NaN stays one, whatever its bits.
inline Ints rounded_to_bfloat16(Vec<float> value) {
  const Ints bits = (Ints)value;
  return value == value ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
}

inline Vec<float> scaled(Vec<float> value, Vec<float> factor) {
  return value == 0.0f ? zero_times(factor) : value * factor;
}

void store_halves(uint16_t* to, Ints in_high_half) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)in_high_half, 16)));
}

void round_tile(const BfloatTile& tile) {
  for (int64_t j = 0; j < tile.classes; j += 2) {
    float *first = tile.values + j * tile.stride, *second = first + tile.stride;
    const bool paired = j + 1 < tile.classes;
    for (int64_t r = 0; r < tile.rows; r += kLanes<float>) {
      const Vec<float> row_factor = load(tile.row_factor + r), unit_factor = load(tile.unit_factor + r);
      const Vec<float> one = load(first + r), two = paired ? load(second + r) : Vec<float>{};
      const Ints low = rounded_to_bfloat16(scaled(one, row_factor * tile.class_factor[j]));
      const Ints high = paired ? rounded_to_bfloat16(scaled(two, row_factor * tile.class_factor[j + 1])) : Ints{};
      store(tile.by_class + j / 2 * tile.stride + r, (Vec<Bfloat16Pair>)(low >> 16 | (high & 0xffff0000)));
      store_halves(reinterpret_cast<uint16_t*>(first) + r, rounded_to_bfloat16(scaled(one, unit_factor)));
      if (paired) store_halves(reinterpret_cast<uint16_t*>(second) + r, rounded_to_bfloat16(scaled(two, unit_factor)));
    }
  }
}

void narrow(const float* row, int64_t n, uint16_t* out) {
  int64_t d = 0;
  for (; d + kLanes<float> <= n; d += kLanes<float>) store_halves(out + d, (Ints)load(row + d));
  if (d == n) return;
  uint16_t room[kLanes<float>];
  store_halves(room, (Ints)load_some(row + d, n - d));
  for (int64_t i = d; i < n; ++i) out[i] = room[i - d];
}

void interleave(const uint16_t* first, const uint16_t* second, int64_t n, Bfloat16Pair* out) {
  for (int64_t d = 0; d < n; ++d) out[d] = int32_t(uint32_t(first[d]) | uint32_t(second[d]) << 16);
}

constexpr BfloatKernels kBfloatKernels = {multiply<Bfloat16Pair, float>, round_tile, narrow, interleave};
#endif

// The tile of sums of the matrix product, on numbers that stay in registers.
constexpr int64_t kTileColumns = kTileVectors * kLanes<float>;

void multiply_in_registers(int64_t k) {
  const float a[kTileRows] = {}, b[kTileColumns] = {};
  float c[kTileRows * kTileColumns] = {};
  asm volatile("" : : "r"(a), "r"(b), "r"(c) : "memory");  // not known to be zeros, and ...
  multiply_tile<float, float, kTileRows, kTileVectors>(
      {kTileRows, kTileColumns, k, a, 1, 0, b, 0, c, kTileColumns, nullptr, false}, 0, 0, kLanes<float>, 0, k, false);
  asm volatile("" : : "r"(c) : "memory");  // ... the result is wanted
}

// Up to here float64 costs nothing that anyone would notice; where no instruction multiplies and adds, float32 rounds
// every product too, and accuracy is bought for longer.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr double kPreciseWork = 1 << 16;
#else
constexpr double kPreciseWork = 1 << 20;
#endif

template <class T>
constexpr KernelsFor<T> kKernelsFor = {kLanes<T>, multiply<T, T>, exponentiate<T>, scale_columns<T>, sum<T>,
                                       dot<T>,    norm<T>,        scale<T>,        project<T>,       add_scaled<T>};

#define FEDSS_STRING(name) #name
#define FEDSS_NAME(name) FEDSS_STRING(name)

}  // namespace

const Kernels kKernels = {FEDSS_NAME(FEDSS_ISA),
                          kKernelsFor<float>,
                          kKernelsFor<double>,
                          scale_to_bfloat16,
                          widen_bfloat16,
                          exponentials,
                          xor_rows,
#if defined(__AVX512BF16__)
                          &kBfloatKernels,
#else
                          nullptr,
#endif
                          kPreciseWork,
                          multiply_in_registers,
                          double(2 * kTileRows * kTileColumns)};

}  // namespace FEDSS_ISA
}  // namespace fedss
