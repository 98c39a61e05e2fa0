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

bool has_labels(const SampledSoftmax& p) { return p.entry_labels || p.target_labels || p.target_logit; }

struct Entry {
  int64_t id, position;
};

// By id, then by position: the digits of the ids from the last to the first, each a stable counting sort. Few ids have
// short digits, as a sort passes over all values of a digit too.
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
  const int width = n < 1000 ? 7 : 11;
  std::vector<Entry> other(n);
  std::vector<int64_t> begin(size_t(1) << width);
  for (int shift = 0; shift < 64 && bits >> shift; shift += width) {
    const auto digit = [&](int64_t id) { return uint64_t(id) >> shift & (begin.size() - 1); };
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
  const bool has_targets = !p.target_logit, labelled = has_labels(p);
  const std::vector<int64_t> target =
      has_targets ? checked_ids("target", p.target, p.weight.rows, &p.ignore_index) : copied_ids(p.target);
  const std::vector<int64_t> class_ids = checked_ids("class_ids", p.class_ids, p.weight.rows);
  check_corrections("log_expected_count", p.log_expected_count, false);
  check_corrections("target_log_expected_count", p.target_log_expected_count, true);
  std::vector<int64_t> targets, labels;  // (V,)
  batch_rows.reserve(target.size()), targets.reserve(target.size());
  for (size_t i = 0; i < target.size(); ++i) {
    if (target[i] == p.ignore_index) continue;
    batch_rows.push_back(int64_t(i));
    if (has_targets) targets.push_back(target[i]);
    if (labelled) labels.push_back(p.target_labels ? p.target_labels.id(int64_t(i)) : target[i]);
  }
  if (all_) {
    take_all(p, targets);
  } else {
    merge(p, class_ids, targets);
  }
  if (labelled) number_labels(labels);
}

// The labels of rows become numbers, and those of columns the same ones.
void ClassRows::number_labels(std::vector<int64_t> labels) {
  row_label = labels;
  std::sort(labels.begin(), labels.end());
  labels.erase(std::unique(labels.begin(), labels.end()), labels.end());
  const auto number = [&labels](int64_t label) {
    const auto at = std::lower_bound(labels.begin(), labels.end(), label);
    return at != labels.end() && *at == label ? int64_t(at - labels.begin()) : int64_t(-1);
  };
  std::transform(row_label.begin(), row_label.end(), row_label.begin(), number);
  std::transform(column_label.begin(), column_label.end(), column_label.begin(), number);
}

void ClassRows::take_all(const SampledSoftmax& p, const std::vector<int64_t>& targets) {
  slots_ = p.weight.rows;
  target_slot = target_column = targets;
  log_count_.assign(slots_, 0.0);
  if (has_labels(p)) {
    column_label.resize(slots_);
    for (int64_t slot = 0; slot < slots_; ++slot) column_label[slot] = p.entry_labels ? p.entry_labels.id(slot) : slot;
  }
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
    if (!column_label.empty()) column_label[column[slot]] = column_label[slot];
    column_slot_.push_back(slot);
  }
  log_count_.resize(columns);
  if (!column_label.empty()) column_label.resize(columns);
  for (int64_t& target : target_column) target = column[target];
}

void ClassRows::merge(const SampledSoftmax& p, const std::vector<int64_t>& class_ids,
                      const std::vector<int64_t>& targets) {
  std::vector<Entry> listed = sorted_entries(class_ids);
  const std::vector<Entry> wanted = sorted_entries(targets);
  const std::vector<int64_t> labels = copied_ids(p.entry_labels);
  const bool labelled = has_labels(p), given = bool(p.entry_labels);
  const auto label = [&](const Entry& entry) { return given ? labels[entry.position] : entry.id; };
  target_slot.resize(targets.size()), target_column.resize(targets.size());
  const size_t most = listed.size() + wanted.size();
  ids_.reserve(most), column_slot_.reserve(listed.size()), log_count_.reserve(listed.size());
  for (size_t next = 0, next_wanted = 0; next < listed.size() || next_wanted < wanted.size();) {
    const bool from_list =
        next_wanted == wanted.size() || (next < listed.size() && listed[next].id <= wanted[next_wanted].id);
    const int64_t id = from_list ? listed[next].id : wanted[next_wanted].id, slot = int64_t(ids_.size());
    const bool is_target = next_wanted < wanted.size() && wanted[next_wanted].id == id;
    const auto begin = listed.begin() + next;
    while (next < listed.size() && listed[next].id == id) ++next;
    const auto end = listed.begin() + next;
    const int64_t columns = int64_t(log_count_.size());
    const auto add_column = [&](const Entry* first, const Entry* last) {
      const double log_count = merged_log_count(p.log_expected_count, first, last);
      if (log_count == kInf) return;
      log_count_.push_back(log_count), column_slot_.push_back(int64_t(ids_.size())), ids_.push_back(id);
      if (labelled) column_label.push_back(label(*first));
    };
    if (!given && begin != end) add_column(&*begin, &*begin + (end - begin));
    if (given) {  // a column for each label
      std::stable_sort(begin, end, [&](const Entry& a, const Entry& b) { return label(a) < label(b); });
      for (auto first = begin; first != end;) {
        const auto last = std::find_if_not(first, end, [&](const Entry& e) { return label(e) == label(*first); });
        add_column(&*first, &*first + (last - first));
        first = last;
      }
    }
    const int64_t column = int64_t(log_count_.size()) > columns ? columns : -1;
    if (column < 0 && is_target) ids_.push_back(id);
    for (; next_wanted < wanted.size() && wanted[next_wanted].id == id; ++next_wanted) {
      target_slot[wanted[next_wanted].position] = slot;
      target_column[wanted[next_wanted].position] = column;
    }
  }
  slots_ = int64_t(ids_.size());
  if (int64_t(column_slot_.size()) == slots_) column_slot_.clear();
}

}  // namespace fedss
