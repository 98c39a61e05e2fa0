// Which rows each part of a scatter consists of: equal ids are in one part, in the order in which they came.
#pragma once

#include <cstdint>
#include <vector>

#include "tensor_view.hpp"

namespace fedss {

struct Entry {
  int64_t i,
      id;  // ids[i] = id: a copy, as the tensor may change under a kernel that runs without the interpreter's lock
};

// [chunk][part] -> entries: a part's are those of chunk 0, chunk 1, ..., i ascending.
using Partition = std::vector<std::vector<std::vector<Entry>>>;

// For threads that write to rows of `row_bytes` bytes. Throws std::out_of_range, naming the first position and value,
// unless every id is in [0, C).
Partition partition_ids(const char* name, const Vector& ids, int64_t C, int64_t row_bytes, int64_t parts, int threads);

}  // namespace fedss
