#include "xor_rows.hpp"

#include <algorithm>

#include "arena.hpp"
#include "instruction_sets.hpp"
#include "thread_pool.hpp"

namespace fedss {
namespace {

constexpr int64_t kTaskRows = 512;       // of the table; a multiple of 8, as bits are taken by the byte
constexpr int64_t kTaskQueries = 256;    // whose answers stay in the second cache while the table is read once
constexpr int64_t kPadding = 64;         // bytes of an answer are a multiple of: those of the longest vector
constexpr double kSerialWork = 1 << 21;  // bytes of rows in all sums below which threads cost more than they give

}  // namespace

void xor_rows(const Matrix& table, const BitVectors& bits, void* answers, int threads) {
  const int64_t row_bytes = table.cols * size_of(table.dtype), tasks = (table.rows + kTaskRows - 1) / kTaskRows;
  const int64_t row_stride = table.rows > 1 ? table.row_stride * size_of(table.dtype) : 0;  // that of one row is any
  const int64_t padded = (row_bytes + kPadding - 1) / kPadding * kPadding;
  if (double(table.rows) * double(row_bytes) * double(bits.rows) < kSerialWork) threads = 1;
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, tasks));
  const Kernels& kernels = current_kernels();
  Arena arena;
  char* const sums = arena.take<char>(workers * std::min(kTaskQueries, bits.rows) * padded);
  for (int64_t first = 0; first < bits.rows; first += kTaskQueries) {
    const int64_t queries = std::min(kTaskQueries, bits.rows - first), bytes = queries * padded;
    std::fill_n(sums, workers * bytes, 0);
    parallel_for(tasks, int(workers), [&](int64_t task, int worker) {
      const int64_t row = task * kTaskRows;
      kernels.xor_rows({table.row(row), std::min(kTaskRows, table.rows - row), row_bytes, row_stride,
                        bits.data + first * bits.row_stride + row / 8, queries, bits.row_stride, sums + worker * bytes,
                        padded});
    });
    for (int64_t worker = 1; worker < workers; ++worker) {
      for (int64_t i = 0; i < bytes; ++i) sums[i] ^= sums[worker * bytes + i];
    }
    for (int64_t q = 0; q < queries; ++q) {
      std::copy_n(sums + q * padded, row_bytes, static_cast<char*>(answers) + (first + q) * row_bytes);
    }
  }
}

}  // namespace fedss
