// Every id is checked before anything is computed or written.
#pragma once

#include <sstream>
#include <stdexcept>

#include "tensor_view.hpp"

namespace fedss {

// Throws std::out_of_range, naming position and value, unless every id is in [0, C) or equals *ignore_index.
inline void check_ids(const char* name, const Vector& ids, int64_t C, const int64_t* ignore_index = nullptr) {
  for (int64_t i = 0; i < ids.size; ++i) {
    const int64_t id = ids.id(i);
    if ((id >= 0 && id < C) || (ignore_index && id == *ignore_index)) continue;
    std::ostringstream message;
    message << name << "[" << i << "] = " << id << ", expected a class in [0, " << C << ")";
    if (ignore_index) message << " or ignore_index " << *ignore_index;
    throw std::out_of_range(message.str());
  }
}

}  // namespace fedss
