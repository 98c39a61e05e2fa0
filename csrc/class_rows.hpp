// The rows of `weight` that take part in a loss, each once: which of them are columns of the logits, and which are only
// some row's target.
#pragma once

#include <cstdint>
#include <vector>

#include "sampled_softmax.hpp"

namespace fedss {

// Slots are the classes of class_ids that are not left out and of the targets, each once, ascending: the rows that have
// a gradient. Columns are the slots that are terms of the denominator, whatever the row: those of class_ids. A repeated
// entry of class_ids has the same logit z as its twin, so exp(z - a) + exp(z - b) is one term with correction
// -log(exp(-a) + exp(-b)). Where labels tell accidental hits, each label that a class is listed under has a slot and a
// column of its own.
class ClassRows {
 public:
  std::vector<int64_t> batch_rows;     // (V,) the rows of the batch that are not ignored
  std::vector<int64_t> target_slot;    // (V,) where their targets are; empty where their logits are given
  std::vector<int64_t> target_column;  // (V,) ... and as which column, or -1
  std::vector<int64_t> row_label;      // (V,) numbers from 0 on; empty unless labels tell accidental hits
  std::vector<int64_t> column_label;   // (columns,) the same, or -1 for a label that no row has

  // Checks every id and correction, as nothing was written yet.
  explicit ClassRows(const SampledSoftmax& problem);

  int64_t slots() const { return slots_; }
  int64_t columns() const { return int64_t(log_count_.size()); }
  int64_t id(int64_t slot) const { return all_ ? slot : ids_[slot]; }
  int64_t slot(int64_t column) const { return column_slot_.empty() ? column : column_slot_[column]; }
  double log_count(int64_t column) const { return log_count_[column]; }
  const std::vector<int64_t>& ids() const { return ids_; }  // of the slots; empty where class c is slot c
  // (columns,) the slots of the columns from this one on; null where column j is slot j.
  const int64_t* slots_from(int64_t column) const { return column_slot_.empty() ? nullptr : &column_slot_[column]; }

 private:
  bool all_;
  int64_t slots_ = 0;
  std::vector<int64_t> ids_;          // (slots,)
  std::vector<int64_t> column_slot_;  // (columns,) or empty if every slot is a column
  std::vector<double> log_count_;     // (columns,) merged log_expected_count

  void take_all(const SampledSoftmax& problem, const std::vector<int64_t>& targets);
  void number_labels(std::vector<int64_t> labels_of_rows);
  void merge(const SampledSoftmax& problem, const std::vector<int64_t>& class_ids, const std::vector<int64_t>& targets);
};

}  // namespace fedss
