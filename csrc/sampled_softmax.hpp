// The sampled-softmax loss and its gradients.
//
//   z(i, j) = scale * cos(input_i, weight_j) + bias_j                 (or the dot product)
//   o(i, t) = z(i, t) - target_log_expected_count_i
//   o(i, j) = z(i, class_ids_j) - log_expected_count_j                for every j with entry_label_j != target_label_i
//   loss_i  = -o(i, t) + logsumexp(o(i, t), every o(i, j))
//
// Labels are class_ids_j and t unless others are given. Where o(i, t) itself is given, it is a constant.
//
// Products are computed in float32 (bfloat16 ones by the hardware's dot products where it has them) and what follows
// them with more digits; small problems, float64 ones, and those whose logits or rows are out of float32's comfortable
// range in float64. Deterministic: every sum has a fixed order, whatever the number of threads. Memory: besides the
// gradients, a bounded block of logits and of packed class rows for all threads together, and O(B D + S) numbers; never
// B x S or C x D.
#pragma once

#include <cstdint>

#include "tensor_view.hpp"

namespace fedss {

enum class Reduction { none, mean, sum };
enum class Rounding { none, to_float16, to_bfloat16 };

struct SampledSoftmax {
  Matrix input;                      // (B, D) floating
  Matrix weight;                     // (C, D) floating
  Vector target;                     // (B,) int64 in [0, C), or ignore_index
  Vector class_ids;                  // (S,) int64 in [0, C)
  bool all_classes = false;          // class_ids is every row of weight, and not given
  Vector log_expected_count;         // (S,) floating, or empty: zeros
  Vector target_log_expected_count;  // (B,) floating, or empty: zeros
  Vector bias;                       // (C,) floating, or empty: zeros
  Vector entry_labels;               // (S,) int64, or empty: class_ids
  Vector target_labels;              // (B,) int64, or empty: target
  Vector target_logit;               // (B,) floating, or empty: made. A target is no class then, but only a label
  double scale = 1;
  bool cosine = true;
  int64_t ignore_index = -100;
  Rounding rounding = Rounding::none;  // applied to input and weight as they are read, unless they are float64
  Reduction reduction = Reduction::mean;
  Vector grad_loss;  // (B,) floating: the upstream gradient of each row's loss; only for gradients of Reduction::none
};

// Where results go, in float64 if input is float64, else in float32; what is null is not computed.
struct SampledSoftmaxResult {
  void* loss = nullptr;          // (B,) for Reduction::none, else (1,)
  void* grad_input = nullptr;    // (B, D)
  void* grad_rows = nullptr;     // (capacity, D): the gradient of the rows of weight that were touched ...
  void* grad_bias = nullptr;     // (capacity,): ... and of their biases
  int64_t* row_ids = nullptr;    // (capacity,): ... and which rows they are, ascending; then -1. Unused for all_classes
  int64_t capacity = 0;          // C for all_classes; S + B with entry_labels, else min(S + B, C)
  double* grad_scale = nullptr;  // (1,)
};

// Fills `result` and returns how many rows of weight were touched: listed in class_ids, and not left out by a
// correction of +inf, or a target. What is not finite gives NaN, in gradients too, and so does a dot product past the
// largest number of the results' type; a logit of -inf leaves a class out. Throws std::out_of_range for an id out of
// range and std::invalid_argument for a NaN or -inf correction, naming position and value, before anything is written.
int64_t sampled_softmax(const SampledSoftmax& problem, const SampledSoftmaxResult& result, int threads);

}  // namespace fedss
