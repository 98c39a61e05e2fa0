// Positions of ids, grouped so that equal ids are in one part and ascend within it: a stable counting sort.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "tensor_view.hpp"

namespace fedss {

struct Partition {
  std::unique_ptr<int64_t[]> ids;    // (M,) a copy: the tensor may change under a kernel that runs without the
                                     // interpreter's lock
  std::unique_ptr<int64_t[]> order;  // (M,) positions: part after part, ascending in each
  std::vector<int64_t> first;        // (parts + 1,) where in `order` each part begins
};

// Parts for threads that write to rows of `row_bytes` bytes. Throws std::out_of_range, naming the first position and
// value, unless every id is in [0, C).
Partition partition_ids(const char* name, const Vector& ids, int64_t C, int64_t row_bytes, int64_t parts, int threads);

}  // namespace fedss
