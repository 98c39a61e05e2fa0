// Every id is checked before anything is computed or written.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
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

[[noreturn]] inline void throw_repeated_id(const char* name, int64_t i, int64_t id, int64_t before) {
  std::ostringstream message;
  message << name << "[" << i << "] = " << id << " is also " << name << "[" << before << "], expected each class once";
  throw std::invalid_argument(message.str());
}

// A copy, because the tensor may change under a kernel that runs without the interpreter's lock.
inline std::vector<int64_t> copied_ids(const Vector& ids) {
  std::vector<int64_t> copied(ids.size);
  for (int64_t i = 0; i < ids.size; ++i) copied[i] = ids.id(i);
  return copied;
}

// A copy of the ids. Throws std::out_of_range, naming position and value, unless every one is in [0, C) or equals
// *ignore_index.
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

// Throws std::invalid_argument, naming position and value, if an id is there twice. Ascending ids cost one look at
// each, others an entry each in a hash table of positions.
inline void check_unique(const char* name, const std::vector<int64_t>& ids) {
  if (std::adjacent_find(ids.begin(), ids.end(), std::greater_equal<int64_t>()) == ids.end()) return;
  size_t slots = 2;
  int shift = 63;  // the hash is the product's upper bits
  for (; slots < 2 * ids.size(); slots *= 2) --shift;
  std::vector<size_t> position(slots);  // + 1; 0: empty
  for (size_t i = 0; i < ids.size(); ++i) {
    size_t slot = uint64_t(ids[i]) * 0x9E3779B97F4A7C15u >> shift;
    for (; position[slot] != 0; slot = (slot + 1) & (slots - 1)) {
      if (ids[position[slot] - 1] == ids[i]) throw_repeated_id(name, int64_t(i), ids[i], int64_t(position[slot] - 1));
    }
    position[slot] = i + 1;
  }
}

}  // namespace fedss
