// What the fuzz targets make of the bytes they are given: sizes, flags, and tensors whose memory ends where they do, so
// that the address sanitizer sees an access one element behind them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "instruction_sets.hpp"
#include "tensor_view.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace fuzz {

using namespace fedss;

constexpr double kInf = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();

// Ends the process where a kernel did not do what its header says: a fuzzer takes that for a crash and keeps the input.
inline void promise(bool kept, const char* what) {
  if (kept) return;
  std::fprintf(stderr, "not as promised: %s\n", what);
  std::abort();
}

// What a call that may refuse its arguments threw, or nothing.
template <class Call>
std::string refusal(const Call& call) {
  try {
    call();
  } catch (const std::out_of_range& error) {
    return std::string("out of range: ") + error.what();
  } catch (const std::invalid_argument& error) {
    return std::string("invalid: ") + error.what();
  }
  return {};
}

// `got` names what `expected` does, and nothing is refused where nothing is expected.
inline void promise_refusal(const std::string& got, const std::string& expected) {
  promise(expected.empty() ? got.empty() : got.rfind(expected, 0) == 0,
          ("expected \"" + expected + "\", got \"" + got + "\"").c_str());
}

inline uint16_t bfloat16_bits(float value) { return uint16_t(float_to_bits(round_to_bfloat16(value)) >> 16); }

inline uint16_t float16_bits(float value) {
  const float magnitude = std::abs(round_to_float16(value));
  const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
  if (!(magnitude < kInf)) return uint16_t(sign | (magnitude == magnitude ? 0x7c00 : 0x7e00));
  if (magnitude < 0x1p-14f) return uint16_t(sign | uint32_t(magnitude * 0x1p24f));
  return uint16_t(sign | ((float_to_bits(magnitude) >> 13) - (112 << 10)));
}

// How the message about the first id that is not a class begins, or nothing.
inline std::string first_bad_id(const char* name, const Vector& ids, int64_t C, const int64_t* ignore_index = nullptr) {
  for (int64_t i = 0; i < ids.size; ++i) {
    const int64_t id = ids.id(i);
    if ((id >= 0 && id < C) || (ignore_index && id == *ignore_index)) continue;
    return "out of range: " + std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(id) + ", expected";
  }
  return {};
}

// How the message about the first id that came before begins, or nothing.
inline std::string first_repeated_id(const char* name, const Vector& ids) {
  const auto entry = [&](int64_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; };
  for (int64_t i = 0; i < ids.size; ++i) {
    for (int64_t before = 0; before < i; ++before) {
      if (ids.id(before) != ids.id(i)) continue;
      return "invalid: " + entry(i) + " = " + std::to_string(ids.id(i)) + " is also " + entry(before) + ", expected";
    }
  }
  return {};
}

// A tensor of one or two dimensions that owns its memory; the memory is null if it has no elements, as torch's is.
struct Tensor {
  DType dtype = DType::float32;
  int64_t rows = 0, cols = 0, row_stride = 1, col_stride = 1;
  int64_t lead = 0;  // elements before the first one: vectors' loads must not count on alignment
  std::vector<char> memory;

  void allocate() {
    const bool empty = rows == 0 || cols == 0;
    const int64_t last = empty ? 0 : (rows - 1) * row_stride + (cols - 1) * col_stride + 1;
    memory.assign(empty ? 0 : size_t((lead + last) * size_of(dtype)), 0);
  }

  int64_t elements() const { return int64_t(memory.size()) / size_of(dtype); }
  void* data() { return memory.empty() ? nullptr : memory.data() + lead * size_of(dtype); }
  const void* data() const { return const_cast<Tensor*>(this)->data(); }
  Matrix matrix() const { return {data(), dtype, rows, cols, row_stride, col_stride}; }
  Vector vector() const { return {data(), dtype, rows, row_stride}; }

  template <class T>
  T& at(int64_t i, int64_t j = 0) {
    return static_cast<T*>(data())[i * row_stride + j * col_stride];
  }
  int64_t id(int64_t i) const { return vector().id(i); }
  double number(int64_t i, int64_t j = 0) const {
    return Vector{data(), dtype, elements(), 1}[i * row_stride + j * col_stride];
  }

  // Every bit of the memory, gaps between the rows too; but any NaN for any other, as the sign of one depends on the
  // order in which the compiler adds two of them.
  bool same(const Tensor& other) const {
    if (memory == other.memory) return true;
    const int64_t size = size_of(dtype);
    for (int64_t i = 0; i < elements(); ++i) {
      const char *a = memory.data() + i * size, *b = other.memory.data() + i * size;
      if (std::memcmp(a, b, size_t(size)) == 0) continue;
      if (dtype == DType::int64) return false;
      if (!std::isnan(Vector{a, dtype, 1, 1}[0]) || !std::isnan(Vector{b, dtype, 1, 1}[0])) return false;
    }
    return true;
  }
};

// Where targets run on several threads at once: there is one choice for all of them.
inline bool keeps_instruction_set = false;

class Draw {
 public:
  Draw(const uint8_t* data, size_t size) : next_(data), end_(data + size) {
    for (size_t i = 0; i < size; ++i) hash_ = (hash_ ^ data[i]) * 0x100000001b3;
  }

  bool tame = true;  // every number drawn so far is finite and of moderate size

  // The next byte; zeros once there are none.
  uint8_t byte() { return next_ < end_ ? *next_++ : 0; }
  bool flag() { return byte() & 1; }
  bool seldom() { return byte() >= 224; }
  int64_t below(int64_t n) {  // n up to 2^16
    const int64_t low = byte();
    return (n > 256 ? low << 8 | byte() : low) % n;
  }
  // For what takes long: by a hash of all bytes, so that the share of the inputs for which it is true stays 1 / n,
  // however much a fuzzer likes them.
  bool one_in(uint64_t n) const { return (hash_ >> 24) % n == 0; }
  template <class T>
  T one_of(std::initializer_list<T> choices) {
    return choices.begin()[below(int64_t(choices.size()))];
  }

  // A learning rate or the like: nothing but a finite number is asked of those.
  double scalar() { return one_of({0.1, 0.0, 1.0, -0.5, 0.9, 1e-3, 1e30, 1e300, 0x1p-140, 0x1p-1074}); }

  int threads() { return int(below(5)); }  // 0 counts as 1
  DType floating() { return one_of({DType::float32, DType::float64, DType::float16, DType::bfloat16}); }

  void use_some_instruction_set() {
    static const std::vector<std::string> sets = instruction_sets();
    const std::string& set = sets[size_t(below(int64_t(sets.size())))];
    if (!keeps_instruction_set) use_instruction_set(set);
  }

  // shared: only read, so that its rows, or the elements of a row, may be one and the same.
  Tensor matrix(DType dtype, int64_t rows, int64_t cols, bool shared = false) {
    Tensor t;
    t.dtype = dtype, t.rows = rows, t.cols = cols, t.row_stride = cols;
    const int64_t gap = below(4);
    switch (below(shared ? 7 : 5)) {
      case 0: break;
      case 1: t.row_stride = cols + gap; break;
      case 2: t.col_stride = 1 + gap, t.row_stride = cols * t.col_stride + gap; break;
      case 3: t.row_stride = 1, t.col_stride = rows + gap; break;
      case 4: t.row_stride = rows > 1 ? cols : std::numeric_limits<int64_t>::max(); break;  // never stepped by
      case 5: t.row_stride = 0; break;
      case 6: t.row_stride = 1, t.col_stride = 0; break;
    }
    t.lead = below(4);
    t.allocate();
    fill(t);
    return t;
  }

  // A matrix whose rows' elements lie side by side.
  Tensor dense_rows(DType dtype, int64_t rows, int64_t cols) {
    Tensor t;
    t.dtype = dtype, t.rows = rows, t.cols = cols, t.row_stride = cols + below(4), t.lead = below(4);
    t.allocate();
    fill(t);
    return t;
  }

  Tensor vector(DType dtype, int64_t n) {
    Tensor t = strip(dtype, n);
    fill(t);
    return t;
  }

  // Ids of C classes, seldom one that is out of range; always, if there are none.
  Tensor ids(int64_t n, int64_t C) {
    Tensor t = strip(DType::int64, n);
    const int order = int(below(5));
    const int64_t start = int64_t(random() >> 1);
    int64_t step = order == 0 ? 1 : 1 + start % std::max<int64_t>(C, 1);
    while (std::gcd(step, C) > 1) --step;  // so that C ids in a row are all different
    for (int64_t i = 0; C > 0 && i < n; ++i) {
      const int64_t drawn = int64_t(random() >> 1) % C;
      t.at<int64_t>(i) = order < 3 ? (start % C + i % C * step) % C : order == 3 ? drawn : drawn % 3 % C;
    }
    if (n > 0 && seldom()) {
      const int64_t lowest = std::numeric_limits<int64_t>::min();
      t.at<int64_t>(below(n)) = one_of<int64_t>({-1, C, C + 1, lowest, ~lowest, int64_t(1) << 32, -C});
    }
    return t;
  }

  uint64_t random() {  // splitmix64, from one byte of seed for each tensor
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }

 private:
  const uint8_t *next_, *end_;
  uint64_t state_ = 0, hash_ = 0xcbf29ce484222325;

  Tensor strip(DType dtype, int64_t n) {
    Tensor t;
    t.dtype = dtype, t.rows = n, t.cols = 1, t.row_stride = 1 + below(3), t.lead = below(4);
    t.allocate();
    state_ += byte();
    return t;
  }

  void fill(Tensor& t) {
    const int kind = int(below(6));
    state_ += byte();
    tame = tame && kind < 3;
    const int64_t size = size_of(t.dtype);
    constexpr int64_t kPeriod = 1009;  // what follows repeats: numbers are slower to draw than to add
    for (int64_t i = 0; i < t.elements(); ++i) {
      char* const to = t.memory.data() + i * size;
      if (i >= kPeriod) {
        std::memcpy(to, to - kPeriod * size, size_t(size));
      } else if (kind == 5) {
        for (int64_t b = 0; b < size; ++b) to[b] = char(byte());
      } else if (kind == 4) {
        const uint64_t bits = random();
        std::memcpy(to, &bits, size_t(size));
      } else {
        store(number(kind), t.dtype, to);
      }
    }
  }

  double number(int kind) {
    constexpr double kSpecial[] = {0.0,   -0.0,  kInf,     -kInf,    kNaN,      0x1p-149, 0x1p-1074, 1e38,
                                   -1e38, 1e300, 0x1p-24f, 0x1p-126, 0x1p-1022, 65504,    1e-13,     -1e30};
    const uint64_t bits = random();
    if (kind == 2) return double(int64_t(bits >> 62) - 1);
    if (kind == 3 && bits % 4 == 0) return kSpecial[bits >> 60];
    return double(int64_t(bits) >> 40) * 0x1p-23;
  }

  static void store(double value, DType dtype, char* to) {
    const float narrow = float(value);
    const uint16_t bfloat = bfloat16_bits(narrow), half = float16_bits(narrow);
    switch (dtype) {
      case DType::float64: std::memcpy(to, &value, sizeof value); break;
      case DType::float32: std::memcpy(to, &narrow, sizeof narrow); break;
      case DType::bfloat16: std::memcpy(to, &bfloat, sizeof bfloat); break;
      default: std::memcpy(to, &half, sizeof half);
    }
  }
};

}  // namespace fuzz
