// sampled_softmax: the same bits on any number of threads and whatever lay in the results' memory, refusals that write
// nothing, numbers that are finite where the arguments are, and the loss of the definition where that is cheap.
#include "sampled_softmax.hpp"

#include <array>
#include <set>

#include "draw.hpp"

using namespace fuzz;

namespace {

struct Problem {
  Tensor input, weight, target, class_ids, log_count, target_log_count, bias, grad_loss;
  Tensor entry_labels, target_labels, target_logit;
  SampledSoftmax view;  // of the tensors above
  unsigned wanted = 0;  // results: a bit for each
  int64_t S = 0;

  Problem(const Problem&) = delete;
  explicit Problem(Draw& draw) {
    draw.use_some_instruction_set();
    int64_t B = draw.below(9), C = draw.below(9), D = draw.below(20), listed = draw.below(9);
    // Products in float32 or bfloat16, shared out to threads; more columns than are kept at a time.
    if (draw.one_in(64)) B = draw.below(130), C = 1 + draw.below(400), D = draw.below(130), listed = draw.below(400);
    if (draw.one_in(4096)) B %= 4, C = listed = 33000, D %= 3;
    const DType x = draw.floating(), w = draw.floating();
    view.all_classes = draw.flag(), view.cosine = draw.flag(), S = view.all_classes ? C : listed;
    view.ignore_index = draw.one_of<int64_t>({-100, 0, C - 1, std::numeric_limits<int64_t>::min()});
    view.rounding = draw.one_of({Rounding::none, Rounding::to_float16, Rounding::to_bfloat16});
    view.reduction = draw.one_of({Reduction::none, Reduction::mean, Reduction::sum});
    view.scale = draw.one_of({20.0, 1.0, 0.0, -3.0, 400.0, 1e5, 1e300, kInf, kNaN});
    draw.tame = std::abs(view.scale) < 1e6;
    wanted = draw.byte();
    const unsigned given = draw.byte();
    input = draw.matrix(x, B, D, true), weight = draw.matrix(w, C, D, true);
    target = draw.ids(B, C), class_ids = draw.ids(S, C);
    const unsigned ignored = draw.byte();
    for (int64_t i = 0; i < B; ++i) {
      if (ignored >> i % 8 & 1) target.at<int64_t>(i) = view.ignore_index;
    }
    view.input = input.matrix(), view.weight = weight.matrix(), view.target = target.vector();
    if (!view.all_classes) view.class_ids = class_ids.vector();
    if (given & 1) log_count = corrections(draw, S), view.log_expected_count = log_count.vector();
    if (given & 2) target_log_count = corrections(draw, B), view.target_log_expected_count = target_log_count.vector();
    if (given & 4) bias = draw.vector(draw.floating(), C), view.bias = bias.vector();
    if (given & 8) grad_loss = draw.vector(draw.floating(), B), view.grad_loss = grad_loss.vector();
    // Few labels, so that there are hits, and some that nobody else has.
    if (given & 16) entry_labels = draw.ids(S, 1 + draw.below(5)), view.entry_labels = entry_labels.vector();
    if (given & 32) target_labels = draw.ids(B, 1 + draw.below(5)), view.target_labels = target_labels.vector();
    if (given & 64 && view.reduction == Reduction::none) {
      target_logit = draw.vector(draw.floating(), B), view.target_logit = target_logit.vector();
    }
    if (given & 16 && wanted & (4 | 8)) wanted |= 32;  // the rows of a class under several labels become one
  }

  // How the message that refuses the problem begins, or nothing.
  std::string refused() const {
    const int64_t C = view.weight.rows;
    std::string bad = view.target_logit ? "" : first_bad_id("target", view.target, C, &view.ignore_index);
    if (bad.empty()) bad = first_bad_id("class_ids", view.class_ids, C);
    if (bad.empty()) bad = first_bad_correction("log_expected_count", view.log_expected_count, false);
    if (bad.empty()) bad = first_bad_correction("target_log_expected_count", view.target_log_expected_count, true);
    return bad;
  }

  bool counts(int64_t i) const { return target.id(i) != view.ignore_index; }

  // Rows of results for the classes that take part.
  int64_t capacity() const {
    const int64_t C = weight.rows, entries = S + input.rows;
    return view.all_classes ? C : view.entry_labels ? entries : std::min(entries, C);
  }

  // Ascending: the classes that are listed, and not left out, or a target whose logit is made.
  std::set<int64_t> touched() const {
    std::set<int64_t> ids;
    for (int64_t j = 0; j < S; ++j) {
      if (view.all_classes || value(view.log_expected_count, j) < kInf)
        ids.insert(view.all_classes ? j : class_ids.id(j));
    }
    for (int64_t i = 0; i < target.rows && !view.target_logit; ++i) {
      if (counts(i)) ids.insert(target.id(i));
    }
    return ids;
  }

  // The sum of the losses, by definition.
  double loss() const {
    double sum = 0;
    for (int64_t i = 0; i < target.rows; ++i) {
      if (!counts(i)) continue;
      const double o_t =
          view.target_logit ? view.target_logit[i] : logit(i, target.id(i)) - value(view.target_log_expected_count, i);
      const int64_t label = view.target_labels ? target_labels.id(i) : target.id(i);
      std::vector<double> o{o_t};
      for (int64_t j = 0; j < S; ++j) {
        const int64_t id = view.all_classes ? j : class_ids.id(j);
        if ((view.entry_labels ? entry_labels.id(j) : id) != label)
          o.push_back(logit(i, id) - value(view.log_expected_count, j));
      }
      const double max = *std::max_element(o.begin(), o.end());
      double terms = 0;
      for (double each : o) terms += std::exp(each - max);
      sum += max - o_t + std::log(terms);
    }
    return sum;
  }

 private:
  static double value(const Vector& v, int64_t i) { return v ? v[i] : 0.0; }

  // Mostly such as are accepted, +inf among those of class_ids too.
  static Tensor corrections(Draw& draw, int64_t n) {
    Tensor t = draw.vector(draw.floating(), n);
    const unsigned left_out = draw.byte();
    for (int64_t i = 0; i < n && t.dtype == DType::float32; ++i) {
      if (left_out >> i % 8 & 1) t.at<float>(i) = float(kInf);
    }
    return t;
  }

  static std::string first_bad_correction(const char* name, const Vector& counts, bool of_targets) {
    for (int64_t i = 0; i < counts.size; ++i) {
      if (counts[i] > -kInf && (counts[i] < kInf || !of_targets)) continue;
      return "invalid: " + std::string(name) + "[" + std::to_string(i) + "] = ";
    }
    return {};
  }

  double element(const Tensor& t, int64_t i, int64_t d) const {
    const double number = t.number(i, d);
    if (t.dtype == DType::float64 || view.rounding == Rounding::none) return number;
    return view.rounding == Rounding::to_bfloat16 ? round_to_bfloat16(float(number)) : round_to_float16(float(number));
  }

  double logit(int64_t i, int64_t c) const {
    double dot = 0, x2 = 0, w2 = 0;
    for (int64_t d = 0; d < input.cols; ++d) {
      const double x = element(input, i, d), w = element(weight, c, d);
      dot += x * w, x2 += x * x, w2 += w * w;
    }
    const bool zero = std::sqrt(x2) < 1e-12 || std::sqrt(w2) < 1e-12;
    const double similarity = !view.cosine ? dot : zero ? 0.0 : dot / std::sqrt(x2) / std::sqrt(w2);
    return view.scale * similarity + value(view.bias, c);
  }
};

// What a call gives, in memory that held `filling` before.
struct Answer {
  Tensor loss, grad_input, grad_rows, grad_bias, grad_scale, row_ids;
  int64_t touched = -1;
  std::string refused;

  Answer(const Problem& p, int threads, char filling) : filling_(filling) {
    const int64_t B = p.view.input.rows, D = p.view.input.cols;
    const DType type = p.view.input.dtype == DType::float64 ? DType::float64 : DType::float32;
    SampledSoftmaxResult result;
    result.capacity = p.capacity();
    const auto room = [&](unsigned bit, Tensor& t, DType dtype, int64_t n) -> void* {
      if (!(p.wanted >> bit & 1)) return nullptr;
      t.dtype = dtype, t.rows = n, t.cols = 1;
      t.allocate();
      std::fill(t.memory.begin(), t.memory.end(), filling);
      return t.data();
    };
    result.loss = room(0, loss, type, p.view.reduction == Reduction::none ? B : 1);
    result.grad_input = room(1, grad_input, type, B * D);
    result.grad_rows = room(2, grad_rows, type, result.capacity * D);
    result.grad_bias = room(3, grad_bias, type, result.capacity);
    result.grad_scale = static_cast<double*>(room(4, grad_scale, DType::float64, 1));
    if (!p.view.all_classes) {
      result.row_ids = static_cast<int64_t*>(room(5, row_ids, DType::int64, result.capacity));
    }
    refused = refusal([&] { touched = sampled_softmax(p.view, result, threads); });
  }

  bool same(const Answer& other) const {
    const auto of = [](const Answer& a) {
      return std::array{&a.loss, &a.grad_input, &a.grad_rows, &a.grad_bias, &a.grad_scale, &a.row_ids};
    };
    const auto mine = of(*this), theirs = of(other);
    return std::equal(mine.begin(), mine.end(), theirs.begin(),
                      [](auto* a, auto* b) { return a->memory == b->memory; });
  }

  bool untouched() const {
    for (const Tensor* t : {&loss, &grad_input, &grad_rows, &grad_bias, &grad_scale, &row_ids}) {
      if (std::any_of(t->memory.begin(), t->memory.end(), [&](char byte) { return byte != filling_; })) return false;
    }
    return true;
  }

  bool finite() const {
    for (const Tensor* t : {&loss, &grad_input, &grad_rows, &grad_bias, &grad_scale}) {
      for (int64_t i = 0; i < t->elements(); ++i) {
        if (!std::isfinite(t->number(i))) return false;
      }
    }
    return true;
  }

  double sum_of_losses() const {
    double sum = 0;
    for (int64_t i = 0; i < loss.elements(); ++i) sum += loss.number(i);
    return sum;
  }

 private:
  char filling_;
};

// Of a tensor of `n` rows, those from `first` on hold zeros.
bool zeros_from(const Tensor& t, int64_t first, int64_t n) {
  for (int64_t i = n ? t.elements() / n * first : 0; i < t.elements(); ++i) {
    if (t.number(i) != 0) return false;
  }
  return true;
}

void check_rows(const Problem& p, const Answer& a) {
  const std::set<int64_t> touched = p.touched();
  if (!p.view.entry_labels || p.view.all_classes || a.row_ids.elements() > 0) {
    promise(a.touched == int64_t(touched.size()), "as many rows touched as there are classes that take part");
  }
  const int64_t capacity = p.capacity();
  promise(zeros_from(a.grad_rows, a.touched, capacity), "no gradient behind the rows that were touched");
  promise(zeros_from(a.grad_bias, a.touched, capacity), "no gradient behind the biases that were touched");
  auto id = touched.begin();
  for (int64_t i = 0; i < a.row_ids.elements(); ++i) {
    promise(a.row_ids.id(i) == (id == touched.end() ? -1 : *id++), "the touched rows, ascending, then -1");
  }
  if (p.view.reduction != Reduction::none || a.loss.elements() == 0) return;
  for (int64_t i = 0; i < p.view.input.rows; ++i) {
    promise(p.counts(i) || a.loss.number(i) == 0, "an ignored row has no loss");
  }
}

void check_loss(const Problem& p, const Answer& a) {
  const int64_t B = p.view.input.rows, D = p.view.input.cols;
  if (a.loss.elements() == 0 || B * p.S * D > 1 << 16) return;  // larger ones may be computed in float32
  double expected = p.loss();
  int64_t rows = 0;
  for (int64_t i = 0; i < B; ++i) rows += p.counts(i);
  if (p.view.reduction == Reduction::mean) expected /= double(std::max<int64_t>(rows, 1));
  const double cancelled = 1e-12 * std::abs(p.view.scale) * double(B * D + 1);
  promise(std::abs(a.sum_of_losses() - expected) <= 1e-5 * std::abs(expected) + 1e-6 + cancelled,
          "the definition's loss");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Draw draw(data, size);
  const int threads = draw.threads();
  const Problem problem(draw);
  const Answer one(problem, 1, '\x5a'), other(problem, threads, '\xa5');
  promise_refusal(one.refused, problem.refused());
  promise(one.refused == other.refused, "the same refusal");
  if (!one.refused.empty()) {
    promise(one.untouched() && other.untouched(), "a refused call writes nothing");
    return 0;
  }
  promise(one.same(other), "every result written, with the same bits on any number of threads");
  check_rows(problem, one);
  if (!draw.tame) return 0;
  promise(one.finite(), "finite results of finite arguments");
  check_loss(problem, one);
  return 0;
}
