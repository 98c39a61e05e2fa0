// Every id is checked before anything is computed or written.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "tensor_view.hpp"

namespace fedss {

[[noreturn]] inline void throw_bad_id(const char* name, int64_t i, int64_t id, int64_t C,
                                      const int64_t* ignore_index = nullptr) {
  std::ostringstream message;
  message << name << "[" << i << "] = " << id << ", expected a class in [0, " << C << ")";
  if (ignore_index) message << " or ignore_index " << *ignore_index;
  throw std::out_of_range(message.str());
}

// A copy of the ids. Throws std::out_of_range, naming position and value, unless every one is in [0, C) or equals
// *ignore_index. A copy, because the tensor may change under a kernel that runs without the interpreter's lock.
inline std::vector<int64_t> checked_ids(const char* name, const Vector& ids, int64_t C,
                                        const int64_t* ignore_index = nullptr) {
  std::vector<int64_t> checked(ids.size);
  for (int64_t i = 0; i < ids.size; ++i) {
    const int64_t id = checked[i] = ids.id(i);
    if ((id >= 0 && id < C) || (ignore_index && id == *ignore_index)) continue;
    throw_bad_id(name, i, id, C, ignore_index);
  }
  return checked;
}

}  // namespace fedss
