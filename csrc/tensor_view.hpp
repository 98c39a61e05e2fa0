// What the kernels see of a tensor: a pointer, sizes, strides (in elements) and an element type read as float or
// double.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace fedss {

enum class DType { float16, bfloat16, float32, float64, int64 };

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float16:
    case DType::bfloat16: return 2;
    case DType::float32: return 4;
    default: return 8;
  }
}

// 16-bit floats: exact conversion to float32, and float32 rounded to their values (to nearest, ties to even).

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bfloat16_to_float(uint16_t half) { return bits_to_float(uint32_t(half) << 16); }

// Masks for branches, so that a loop over it becomes vector code; right where denormals are flushed to zero, too.
inline float float16_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  const uint32_t subnormal = float_to_bits(float(int32_t(magnitude)) * 0x1p-24f);
  const uint32_t rebias = (112u << 23) + (-uint32_t(magnitude >= 0x7c00) & 112u << 23);  // 127 - 15; inf, NaN: twice
  const uint32_t normal = (magnitude << 13) + rebias;
  const uint32_t is_normal = -uint32_t(magnitude >= 0x400);
  return bits_to_float(sign | (normal & is_normal) | (subnormal & ~is_normal));
}

inline float round_to_bfloat16(float value) {
  if (value != value) return value;
  const uint32_t bits = float_to_bits(value);
  return bits_to_float((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
}

inline float round_to_float16(float value) {
  const float magnitude = value < 0 ? -value : value;
  if (!(magnitude < 65520.0f)) return value == value ? value * std::numeric_limits<float>::infinity() : value;
  // Adding and taking away a number whose last bit is float16's last bit at this exponent rounds there.
  uint32_t exponent = float_to_bits(magnitude) & 0x7f800000;
  if (exponent < 0x38800000) exponent = 0x38800000;  // 2^-14: below it the steps of float16 are even
  const volatile float shift = bits_to_float(exponent + (13u << 23)) * 1.5f;
  const volatile float shifted = value + shift;
  return shifted - shift;
}

// A vector of n elements.
struct Vector {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t size = 0, stride = 1;

  explicit operator bool() const { return data != nullptr || size > 0; }

  double operator[](int64_t i) const {
    const int64_t at = i * stride;
    switch (dtype) {
      case DType::float16: return float16_to_float(static_cast<const uint16_t*>(data)[at]);
      case DType::bfloat16: return bfloat16_to_float(static_cast<const uint16_t*>(data)[at]);
      case DType::float32: return static_cast<const float*>(data)[at];
      case DType::float64: return static_cast<const double*>(data)[at];
      default: return double(id(i));
    }
  }

  int64_t id(int64_t i) const { return static_cast<const int64_t*>(data)[i * stride]; }
};

// A matrix of rows x cols elements; offsets are 64 bits wide, so rows * cols may pass 2^31.
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t rows = 0, cols = 0, row_stride = 0, col_stride = 1;

  // Where row i is; null if there is no memory, as rows are empty then.
  const char* row(int64_t i) const {
    return data ? static_cast<const char*>(data) + i * row_stride * size_of(dtype) : nullptr;
  }

  // out[d] = element (i, d), converted.
  template <class T>
  void read_row(int64_t i, T* out) const {
    switch (dtype) {
      case DType::float16: return read<uint16_t>(i, out, float16_to_float);
      case DType::bfloat16: return read<uint16_t>(i, out, bfloat16_to_float);
      case DType::float32: return read<float>(i, out, [](float value) { return value; });
      default: return read<double>(i, out, [](double value) { return value; });
    }
  }

 private:
  template <class Element, class T, class Convert>
  void read(int64_t i, T* out, Convert convert) const {
    const Element* from = reinterpret_cast<const Element*>(row(i));
    if (col_stride == 1) {
      for (int64_t d = 0; d < cols; ++d) out[d] = T(convert(from[d]));
    } else {
      for (int64_t d = 0; d < cols; ++d) out[d] = T(convert(from[d * col_stride]));
    }
  }
};

}  // namespace fedss
