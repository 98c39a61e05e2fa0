#include "class_rows.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "check_ids.hpp"

namespace fedss {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// Of a member of the class set, +inf leaves it out; a target cannot be left out.
void check_corrections(const char* name, const Vector& counts, bool of_targets) {
  for (int64_t i = 0; i < counts.size; ++i) {
    const double value = counts[i];
    if (value > -kInf && (value < kInf || !of_targets)) continue;
    std::ostringstream message;
    message << name << "[" << i << "] = " << value << ", expected a "
            << (of_targets ? "finite number" : "number or +inf, which leaves the entry out");
    throw std::invalid_argument(message.str());
  }
}

struct Entry {
  int64_t id, position;
};

// By id, then by position: the digits of the ids from the last to the first, each a stable counting sort.
std::vector<Entry> sorted_entries(const std::vector<int64_t>& ids) {
  const int64_t n = int64_t(ids.size());
  std::vector<Entry> entries(n);
  bool ascending = true;
  uint64_t bits = 0;
  for (int64_t i = 0; i < n; ++i) {
    entries[i] = {ids[i], i};
    bits |= uint64_t(ids[i]);
    ascending = ascending && (i == 0 || ids[i - 1] <= ids[i]);
  }
  if (ascending) return entries;
  constexpr int kDigit = 11;
  std::vector<Entry> other(n);
  std::vector<int64_t> begin(1 << kDigit);
  for (int shift = 0; bits >> shift; shift += kDigit) {
    const auto digit = [shift](int64_t id) { return uint64_t(id) >> shift & ((1 << kDigit) - 1); };
    std::fill(begin.begin(), begin.end(), 0);
    for (const Entry& entry : entries) ++begin[digit(entry.id)];
    int64_t sum = 0;
    for (int64_t& count : begin) {
      const int64_t here = count;
      count = sum;
      sum += here;
    }
    for (const Entry& entry : entries) other[begin[digit(entry.id)]++] = entry;
    entries.swap(other);
    if (shift + kDigit >= 64) break;
  }
  return entries;
}

// The correction of entries that name one class; +inf if all of them are left out.
double merged_log_count(const Vector& counts, const Entry* first, const Entry* last) {
  const auto log_count = [&](const Entry& entry) { return counts ? counts[entry.position] : 0.0; };
  double lowest = kInf;
  for (const Entry* entry = first; entry < last; ++entry) lowest = std::min(lowest, log_count(*entry));
  if (last - first <= 1 || lowest == kInf) return lowest;
  double sum = 0;
  for (const Entry* entry = first; entry < last; ++entry) sum += std::exp(lowest - log_count(*entry));
  return lowest - std::log(sum);
}

}  // namespace

ClassRows::ClassRows(const SampledSoftmax& p) : all_(p.all_classes) {
  const std::vector<int64_t> target = checked_ids("target", p.target, p.weight.rows, &p.ignore_index);
  const std::vector<int64_t> class_ids = checked_ids("class_ids", p.class_ids, p.weight.rows);
  check_corrections("log_expected_count", p.log_expected_count, false);
  check_corrections("target_log_expected_count", p.target_log_expected_count, true);
  std::vector<int64_t> targets;  // (V,)
  batch_rows.reserve(target.size()), targets.reserve(target.size());
  for (size_t i = 0; i < target.size(); ++i) {
    if (target[i] == p.ignore_index) continue;
    batch_rows.push_back(int64_t(i));
    targets.push_back(target[i]);
  }
  if (all_) {
    take_all(p, targets);
  } else {
    merge(p, class_ids, targets);
  }
}

void ClassRows::take_all(const SampledSoftmax& p, const std::vector<int64_t>& targets) {
  slots_ = p.weight.rows;
  target_slot = target_column = targets;
  log_count_.assign(slots_, 0.0);
  if (!p.log_expected_count) return;
  int64_t columns = 0;
  for (int64_t slot = 0; slot < slots_; ++slot) {
    log_count_[slot] = p.log_expected_count[slot];
    columns += log_count_[slot] < kInf;
  }
  if (columns == slots_) return;
  std::vector<int64_t> column(slots_, -1);
  column_slot_.reserve(columns);
  for (int64_t slot = 0; slot < slots_; ++slot) {
    if (log_count_[slot] == kInf) continue;
    column[slot] = int64_t(column_slot_.size());
    log_count_[column[slot]] = log_count_[slot];
    column_slot_.push_back(slot);
  }
  log_count_.resize(columns);
  for (int64_t& target : target_column) target = column[target];
}

void ClassRows::merge(const SampledSoftmax& p, const std::vector<int64_t>& class_ids,
                      const std::vector<int64_t>& targets) {
  const std::vector<Entry> listed = sorted_entries(class_ids), wanted = sorted_entries(targets);
  target_slot.resize(targets.size()), target_column.resize(targets.size());
  const size_t most = listed.size() + wanted.size();
  ids_.reserve(most), column_slot_.reserve(listed.size()), log_count_.reserve(listed.size());
  for (size_t next = 0, next_wanted = 0; next < listed.size() || next_wanted < wanted.size();) {
    const bool from_list =
        next_wanted == wanted.size() || (next < listed.size() && listed[next].id <= wanted[next_wanted].id);
    const int64_t id = from_list ? listed[next].id : wanted[next_wanted].id, slot = int64_t(ids_.size());
    const bool is_target = next_wanted < wanted.size() && wanted[next_wanted].id == id;
    int64_t column = -1;
    double log_count = kInf;
    const size_t first = next;
    while (next < listed.size() && listed[next].id == id) ++next;
    if (next > first) {
      log_count = merged_log_count(p.log_expected_count, &listed[first], &listed[first] + (next - first));
    }
    if (log_count < kInf) {
      column = int64_t(log_count_.size());
      log_count_.push_back(log_count), column_slot_.push_back(slot);
    }
    if (column >= 0 || is_target) ids_.push_back(id);
    for (; next_wanted < wanted.size() && wanted[next_wanted].id == id; ++next_wanted) {
      target_slot[wanted[next_wanted].position] = slot;
      target_column[wanted[next_wanted].position] = column;
    }
  }
  slots_ = int64_t(ids_.size());
  if (int64_t(column_slot_.size()) == slots_) column_slot_.clear();
}

}  // namespace fedss
