#include "sampled_softmax.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "check_ids.hpp"
#include "matmul.hpp"
#include "thread_pool.hpp"

namespace fedss {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kZeroNorm = 1e-12;                // rows shorter than this have cosine 0 and pass no gradient
constexpr int64_t kBlockElements = 1 << 19;        // of a block of logits: the rows of a wave x the classes of a chunk
constexpr int64_t kFewRows = 64, kManyRows = 256;  // of a wave: at least the first where it meets all classes in one
                                                   // chunk; else the second, so that weight is read less often
constexpr int64_t kClassTile = 64, kRowTile = 16;  // of one task
constexpr double kSerialWork = 1e5;                // multiply-adds below which threads cost more than they give

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

// The rows of `weight` that take part, each once, and the correction of each.
//
// A repeated entry of class_ids has the same logit z as its twin, so exp(z - a) + exp(z - b) is one term with
// correction -log(exp(-a) + exp(-b)). A target that class_ids does not list is a row whose term is zero.
struct ClassRows {
  bool all = false;
  std::vector<int64_t> ids;          // (U,) ascending; unused if all
  std::vector<double> log_count;     // (U,) merged log_expected_count; +inf: no term
  std::vector<int64_t> batch_rows;   // (V,) the rows of the batch that are not ignored
  std::vector<int64_t> target_slot;  // (V,) where in `ids` their targets are
  std::vector<char> takes_part;      // (U,) whether the class is a term of some row's loss

  int64_t size() const { return int64_t(log_count.size()); }
  int64_t id(int64_t slot) const { return all ? slot : ids[slot]; }

  // Checks every id and correction, as nothing was written yet.
  explicit ClassRows(const SampledSoftmax& p) : all(p.all_classes) {
    const std::vector<int64_t> target = checked_ids("target", p.target, p.weight.rows, &p.ignore_index);
    const std::vector<int64_t> class_ids = checked_ids("class_ids", p.class_ids, p.weight.rows);
    check_corrections("log_expected_count", p.log_expected_count, false);
    check_corrections("target_log_expected_count", p.target_log_expected_count, true);
    std::vector<int64_t> counted;  // (V,) the targets of batch_rows
    for (size_t i = 0; i < target.size(); ++i) {
      if (target[i] == p.ignore_index) continue;
      batch_rows.push_back(int64_t(i));
      counted.push_back(target[i]);
    }
    if (all) {
      log_count.resize(p.weight.rows);
      for (int64_t j = 0; j < size(); ++j) log_count[j] = p.log_expected_count ? p.log_expected_count[j] : 0.0;
      target_slot = counted;
    } else {
      merge(p, class_ids, counted);
      for (int64_t t : counted) target_slot.push_back(std::lower_bound(ids.begin(), ids.end(), t) - ids.begin());
    }
    takes_part.resize(size());
    for (int64_t u = 0; u < size(); ++u) takes_part[u] = log_count[u] < kInf;
    for (int64_t u : target_slot) takes_part[u] = true;
  }

 private:
  void merge(const SampledSoftmax& p, const std::vector<int64_t>& class_ids, const std::vector<int64_t>& counted) {
    const int64_t S = int64_t(class_ids.size());
    std::vector<std::pair<int64_t, int64_t>> entries;  // (class id, position in class_ids, or S for a target)
    entries.reserve(S + counted.size());
    for (int64_t j = 0; j < S; ++j) entries.emplace_back(class_ids[j], j);
    for (int64_t t : counted) entries.emplace_back(t, S);
    std::sort(entries.begin(), entries.end());
    for (size_t first = 0, last; first < entries.size(); first = last) {
      for (last = first; last < entries.size() && entries[last].first == entries[first].first;) ++last;
      ids.push_back(entries[first].first);
      log_count.push_back(merged_log_count(p, entries, first, last));
    }
  }

  static double merged_log_count(const SampledSoftmax& p, const std::vector<std::pair<int64_t, int64_t>>& entries,
                                 size_t first, size_t last) {
    const int64_t S = p.class_ids.size;
    const auto log_count_of = [&](int64_t j) { return p.log_expected_count ? p.log_expected_count[j] : 0.0; };
    double lowest = kInf;
    int64_t copies = 0;
    for (size_t e = first; e < last && entries[e].second < S; ++e, ++copies) {
      lowest = std::min(lowest, log_count_of(entries[e].second));
    }
    if (copies <= 1 || lowest == kInf) return lowest;
    double sum = 0;
    for (size_t e = first; e < first + copies; ++e) sum += std::exp(lowest - log_count_of(entries[e].second));
    return lowest - std::log(sum);
  }
};

void round_row(Rounding rounding, DType dtype, double* row, int64_t n) {
  if (rounding == Rounding::none || dtype == DType::float64) return;
  for (int64_t d = 0; d < n; ++d) {
    const float value = float(row[d]);
    row[d] = rounding == Rounding::to_bfloat16 ? round_to_bfloat16(value) : round_to_float16(value);
  }
}

// A matrix row as the products use it: divided by the power of two that brings its norm to [1/2, 1), which is exact and
// keeps products in range whatever the row's length. For the dot product rows stay as they are and all factors are 1.
struct Norm {
  double inverse = 1;         // 1 / |row|; 0 for a zero row, which makes its cosines and its gradient zero
  double inverse_scaled = 1;  // 1 / |scaled row|
};

// Everything is computed in float64 and rounded once, to `Out`, the type of the results.
template <class Out>
class Solver {
 public:
  Solver(const SampledSoftmax& problem, const SampledSoftmaxResult& result, int threads)
      : p_(problem), out_(result), classes_(problem) {
    B_ = p_.input.rows, D_ = p_.input.cols, V_ = int64_t(classes_.batch_rows.size()), U_ = classes_.size();
    D_pad_ = padded(D_);
    threads_ = double(V_) * double(U_) * double(D_) < kSerialWork ? 1 : std::max(threads, 1);
    const int64_t columns = std::max(tiles(U_), int64_t(1)) * kClassTile, fitting = kBlockElements / columns;
    wave_rows_ = std::min(fitting >= kFewRows ? fitting : kManyRows, std::max<int64_t>(V_, 1));
    chunk_ = std::min(columns, kBlockElements / wave_rows_ / kClassTile * kClassTile);
    wants_gradient_ = out_.grad_input || out_.grad_rows || out_.grad_bias || out_.grad_scale;
  }

  void solve() {
    clear_results();
    if (V_ > 0) {
      allocate();
      for (int64_t first = 0; first < V_; first += wave_rows_) run_wave(first, std::min(wave_rows_, V_ - first));
    }
    store_scalars();
  }

 private:
  // One row of the batch while its wave runs.
  struct Row {
    Norm norm;
    double upstream = 0;                 // gradient of the result with respect to this row's loss
    double target_logit = 0;             // o_t
    double max = -kInf;                  // of o_t and every o_j so far
    double sum_others = 0;               // over j != t, of exp(o_j - max)
    double sum_gradient_similarity = 0;  // over j, of dlogits_j * similarity_j
  };

  const SampledSoftmax& p_;
  const SampledSoftmaxResult& out_;
  const ClassRows classes_;
  int64_t B_, D_, V_, U_;  // batch, dimension, rows that are not ignored, classes that take part
  int64_t D_pad_, wave_rows_, chunk_;
  int threads_;
  bool wants_gradient_;

  std::vector<Row> row_;                      // (wave,)
  std::vector<double> x_, grad_x_;            // (wave, D_pad) scaled input rows; gradient with respect to them
  std::vector<double> similarity_, dlogits_;  // (wave, chunk) cosines or dot products; gradient of the logits
  std::vector<Norm> norm_;                    // (chunk,) of the chunk's class rows
  std::vector<double> offset_;     // (U,) bias_j - log_expected_count_j: o_j = scale * similarity_j + offset_j
  std::vector<double> grad_bias_;  // (U,)
  std::vector<std::vector<double>> scratch_;  // one for each worker
  double loss_sum_ = 0, grad_scale_ = 0;

  void clear_results() {
    if (out_.grad_input) std::fill_n(static_cast<Out*>(out_.grad_input), B_ * D_, Out(0));
    if (out_.grad_rows) std::fill_n(static_cast<Out*>(out_.grad_rows), out_.capacity * D_, Out(0));
    if (out_.grad_bias) std::fill_n(static_cast<Out*>(out_.grad_bias), out_.capacity, Out(0));
    if (out_.loss) std::fill_n(static_cast<Out*>(out_.loss), p_.reduction == Reduction::none ? B_ : 1, Out(0));
    if (out_.row_ids) {
      std::copy(classes_.ids.begin(), classes_.ids.end(), out_.row_ids);
      std::fill(out_.row_ids + classes_.ids.size(), out_.row_ids + out_.capacity, int64_t(-1));
    }
  }

  void allocate() {
    row_.resize(wave_rows_);
    x_.assign(wave_rows_ * D_pad_, 0.0);
    similarity_.resize(wave_rows_ * chunk_);
    norm_.resize(chunk_);
    scratch_.assign(threads_, std::vector<double>(kClassTile * (D_pad_ + kRowTile) + D_pad_));
    offset_.resize(U_);
    for (int64_t u = 0; u < U_; ++u)
      offset_[u] = classes_.log_count[u] == kInf ? -kInf : bias(u) - classes_.log_count[u];
    if (!wants_gradient_) return;
    dlogits_.resize(wave_rows_ * chunk_);
    grad_x_.resize(wave_rows_ * D_pad_);
    grad_bias_.assign(out_.grad_bias ? U_ : 0, 0.0);
  }

  void store_scalars() {
    const double count = p_.reduction == Reduction::mean ? double(std::max<int64_t>(V_, 1)) : 1.0;
    if (out_.loss && p_.reduction != Reduction::none) *static_cast<Out*>(out_.loss) = Out(loss_sum_ / count);
    if (out_.grad_scale) *out_.grad_scale = grad_scale_;
    for (size_t u = 0; u < grad_bias_.size(); ++u) static_cast<Out*>(out_.grad_bias)[u] = Out(grad_bias_[u]);
  }

  // A wave of rows meets the classes chunk by chunk: once for the logsumexp, once for the gradient. Where all the
  // classes are one chunk, the second pass finds what the first one computed still there.
  void run_wave(int64_t first, int64_t rows) {
    load_rows(first, rows);
    for (int64_t c = 0; c < U_; c += chunk_) {
      const int64_t columns = std::min(chunk_, U_ - c);
      compute_similarity(c, columns, rows);
      accumulate_logsumexp(first, c, columns, rows);
    }
    store_loss(first, rows);
    if (!wants_gradient_) return;
    std::fill_n(grad_x_.begin(), rows * D_pad_, 0.0);
    for (int64_t c = 0; c < U_; c += chunk_) {
      const int64_t columns = std::min(chunk_, U_ - c);
      if (chunk_ < U_) compute_similarity(c, columns, rows);
      compute_dlogits(first, c, columns, rows);
      if (out_.grad_input) accumulate_grad_input(c, columns, rows);
      if (out_.grad_rows || out_.grad_bias) accumulate_grad_rows(c, columns, rows);
    }
    for (int64_t r = 0; r < rows; ++r) grad_scale_ += row_[r].sum_gradient_similarity;
    if (out_.grad_input) store_grad_input(first, rows);
  }

  static int64_t tiles(int64_t classes) { return (classes + kClassTile - 1) / kClassTile; }

  // factor * gradient, but 0 through a zero row or scale even where an upstream gradient is infinite.
  static double through(double factor, double gradient) { return factor == 0.0 ? 0.0 : factor * gradient; }

  double bias(int64_t slot) const { return p_.bias ? p_.bias[classes_.id(slot)] : 0.0; }

  // Reads one row, rounded if asked, and scales it as Norm says.
  Norm load(const Matrix& from, int64_t row, double* out) const {
    from.read_row(row, out);
    round_row(p_.rounding, from.dtype, out, D_);
    if (!p_.cosine) return Norm{};
    double norm = norm_of(out), inverse = 1 / norm;
    if (norm < kZeroNorm) return Norm{0.0, 0.0};
    if (norm == kInf) {  // an infinite element, or float64 squares past the largest number
      for (int64_t d = 0; d < D_; ++d) out[d] *= 0x1p-600;
      norm = norm_of(out), inverse = 0x1p-600 / norm;
    }
    if (!(norm < kInf)) return Norm{kNaN, kNaN};
    int exponent;
    const double scaled = std::frexp(norm, &exponent), shrink = std::ldexp(1.0, -exponent);
    for (int64_t d = 0; d < D_; ++d) out[d] *= shrink;
    return Norm{inverse, 1 / scaled};
  }

  double norm_of(const double* row) const {
    double squares = 0;
    for (int64_t d = 0; d < D_; ++d) squares += row[d] * row[d];
    return std::sqrt(squares);
  }

  // A class that is no term of any loss may hold anything: it is read as zeros.
  Norm load_class(int64_t slot, double* out) const {
    if (classes_.takes_part[slot]) return load(p_.weight, classes_.id(slot), out);
    std::fill_n(out, D_, 0.0);
    return Norm{0.0, 0.0};
  }

  void load_rows(int64_t first, int64_t rows) {
    const double share = p_.reduction == Reduction::mean ? 1.0 / double(V_) : 1.0;
    parallel_for(rows, threads_, [&](int64_t r, int) {
      const int64_t i = classes_.batch_rows[first + r];
      row_[r] = Row{};
      row_[r].norm = load(p_.input, i, x_.data() + r * D_pad_);
      row_[r].upstream = p_.grad_loss ? p_.grad_loss[i] : share;
    });
  }

  // similarity(r, j) = cos(x_r, w_j), or x_r . w_j. Tasks: tiles of classes; each reads its class rows once.
  void compute_similarity(int64_t chunk, int64_t columns, int64_t rows) {
    parallel_for(tiles(columns), threads_, [&](int64_t task, int worker) {
      const int64_t j0 = task * kClassTile, tile = std::min(kClassTile, columns - j0);
      double* w = scratch_[worker].data();  // (D,)
      double* w_columns = w + D_pad_;       // (D, kClassTile)
      std::fill_n(w_columns, D_ * kClassTile, 0.0);
      for (int64_t j = 0; j < tile; ++j) {
        norm_[j0 + j] = load_class(chunk + j0 + j, w);
        for (int64_t d = 0; d < D_; ++d) w_columns[d * kClassTile + j] = w[d];
      }
      for (int64_t r = 0; r < rows; ++r) std::fill_n(similarity_.data() + r * chunk_ + j0, kClassTile, 0.0);
      multiply_add(rows, kClassTile, D_, x_.data(), D_pad_, 1, w_columns, kClassTile, similarity_.data() + j0, chunk_);
      if (!p_.cosine) return;
      for (int64_t r = 0; r < rows; ++r) {
        double* similarity = similarity_.data() + r * chunk_ + j0;
        const double inverse = row_[r].norm.inverse_scaled;
        for (int64_t j = 0; j < tile; ++j) {
          similarity[j] *= inverse * norm_[j0 + j].inverse_scaled;
        }
      }
    });
  }

  // exp(o_j - max), and 0 for an entry that is left out, whatever its row holds.
  double term(double offset, double similarity, double max) const {
    return offset == -kInf ? 0.0 : std::exp(p_.scale * double(similarity) + offset - max);
  }

  // Folds the chunk's terms into max and sum_others.
  void accumulate_logsumexp(int64_t first, int64_t chunk, int64_t columns, int64_t rows) {
    parallel_for(rows, threads_, [&](int64_t r, int) {
      Row& row = row_[r];
      const double* similarity = similarity_.data() + r * chunk_;
      const double* offset = offset_.data() + chunk;
      const int64_t t = classes_.target_slot[first + r] - chunk;
      double max = row.max;
      if (t >= 0 && t < columns) {
        row.target_logit = p_.scale * similarity[t] + bias(chunk + t) - target_log_count(first + r);
        max = std::max(max, row.target_logit);
      }
      for (int64_t j = 0; j < columns; ++j) {
        if (j != t && offset[j] != -kInf) max = std::max(max, p_.scale * similarity[j] + offset[j]);
      }
      if (max == -kInf) return;  // so far nothing but entries that are left out
      double sum = row.sum_others * std::exp(row.max - max);
      for (int64_t j = 0; j < columns; ++j) {
        const double value = j == t ? 0.0 : term(offset[j], similarity[j], max);
        sum += value;
        if (keeps_terms()) dlogits_[r * chunk_ + j] = value;
      }
      row.max = max, row.sum_others = sum;
    });
  }

  // Where one chunk holds all classes, the terms of the first pass serve the second.
  bool keeps_terms() const { return wants_gradient_ && chunk_ >= U_; }

  double target_log_count(int64_t v) const {
    return p_.target_log_expected_count ? p_.target_log_expected_count[classes_.batch_rows[v]] : 0.0;
  }

  // loss = log1p(sum_{j != t} exp(o_j - o_t)) where the target leads, else (max - o_t) + log(sum of all).
  void store_loss(int64_t first, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const Row& row = row_[r];
      const double of_target = std::exp(row.target_logit - row.max);
      const double loss = row.target_logit == row.max
                              ? std::log1p(row.sum_others)
                              : row.max - row.target_logit + std::log(of_target + row.sum_others);
      loss_sum_ += loss;
      if (out_.loss && p_.reduction == Reduction::none) {
        static_cast<Out*>(out_.loss)[classes_.batch_rows[first + r]] = Out(loss);
      }
    }
  }

  // dlogits(r, j) = upstream_r * (softmax_j - [j is the target]); the target's as minus the others' sum, so that
  // nothing cancels as its probability nears 1.
  void compute_dlogits(int64_t first, int64_t chunk, int64_t columns, int64_t rows) {
    parallel_for(rows, threads_, [&](int64_t r, int) {
      Row& row = row_[r];
      const double* similarity = similarity_.data() + r * chunk_;
      double* dlogits = dlogits_.data() + r * chunk_;
      const int64_t t = classes_.target_slot[first + r] - chunk;
      const double share = row.upstream / (std::exp(row.target_logit - row.max) + row.sum_others);
      for (int64_t j = 0; j < columns; ++j) {
        const double value = keeps_terms() ? dlogits[j] : term(offset_[chunk + j], similarity[j], row.max);
        const double gradient = through(j == t ? -row.sum_others : value, share);
        row.sum_gradient_similarity += through(similarity[j], gradient);
        dlogits[j] = gradient;
      }
    });
  }

  // grad_x_r += sum_j dlogits(r, j) w_j / |w_j|. Tasks: tiles of rows; classes in order.
  void accumulate_grad_input(int64_t chunk, int64_t columns, int64_t rows) {
    parallel_for((rows + kRowTile - 1) / kRowTile, threads_, [&](int64_t task, int worker) {
      const int64_t r0 = task * kRowTile, count = std::min(kRowTile, rows - r0);
      double* w = scratch_[worker].data();             // (kClassTile, D_pad); columns past D stay zero
      double* coefficients = w + kClassTile * D_pad_;  // (kRowTile, kClassTile)
      std::fill_n(w, kClassTile * D_pad_, 0.0);
      for (int64_t j0 = 0; j0 < columns; j0 += kClassTile) {
        const int64_t tile = std::min(kClassTile, columns - j0);
        for (int64_t j = 0; j < tile; ++j) {
          const double inverse = load_class(chunk + j0 + j, w + j * D_pad_).inverse_scaled;
          for (int64_t r = 0; r < count; ++r) {
            coefficients[r * kClassTile + j] = through(inverse, dlogits_[(r0 + r) * chunk_ + j0 + j]);
          }
        }
        multiply_add(count, D_pad_, tile, coefficients, kClassTile, 1, w, D_pad_, grad_x_.data() + r0 * D_pad_, D_pad_);
      }
    });
  }

  // scale / |x| times what is left of grad_x without its part along x, which is x / |x| * sum_j dlogits_j cos_j.
  void store_grad_input(int64_t first, int64_t rows) {
    parallel_for(rows, threads_, [&](int64_t r, int) {
      const Row& row = row_[r];
      const double along = p_.cosine ? row.sum_gradient_similarity * row.norm.inverse_scaled : 0.0;
      const double factor = p_.scale * row.norm.inverse;
      Out* out = static_cast<Out*>(out_.grad_input) + classes_.batch_rows[first + r] * D_;
      for (int64_t d = 0; d < D_; ++d) {
        out[d] = Out(through(factor, grad_x_[r * D_pad_ + d] - along * x_[r * D_pad_ + d]));
      }
    });
  }

  // The same for class rows: grad_w_j += sum_r dlogits(r, j) x_r / |x_r|, without its part along w_j, times
  // scale / |w_j|. Tasks: tiles of classes; rows in order.
  void accumulate_grad_rows(int64_t chunk, int64_t columns, int64_t rows) {
    parallel_for(tiles(columns), threads_, [&](int64_t task, int worker) {
      const int64_t j0 = task * kClassTile, tile = std::min(kClassTile, columns - j0);
      double* grad = scratch_[worker].data();             // (kClassTile, D_pad)
      double* coefficients = grad + kClassTile * D_pad_;  // (kRowTile, kClassTile)
      double* w = coefficients + kRowTile * kClassTile;   // (D,)
      double along[kClassTile] = {}, sum[kClassTile] = {};
      std::fill_n(grad, kClassTile * D_pad_, 0.0);
      for (int64_t r0 = 0; r0 < rows; r0 += kRowTile) {
        const int64_t count = std::min(kRowTile, rows - r0);
        for (int64_t r = 0; r < count; ++r) {
          const double inverse = row_[r0 + r].norm.inverse_scaled;
          for (int64_t j = 0; j < tile; ++j) {
            const int64_t at = (r0 + r) * chunk_ + j0 + j;
            along[j] += through(similarity_[at], dlogits_[at]);
            sum[j] += dlogits_[at];
            coefficients[r * kClassTile + j] = through(inverse, dlogits_[at]);
          }
        }
        multiply_add(tile, D_pad_, count, coefficients, 1, kClassTile, x_.data() + r0 * D_pad_, D_pad_, grad, D_pad_);
      }
      for (int64_t j = 0; j < tile; ++j) {
        if (out_.grad_bias) grad_bias_[chunk + j0 + j] += sum[j];
        if (out_.grad_rows) add_grad_row(chunk + j0 + j, grad + j * D_pad_, along[j], w);
      }
    });
  }

  void add_grad_row(int64_t slot, const double* grad, double along, double* w) const {
    const Norm norm = load_class(slot, w);
    const double factor = p_.scale * norm.inverse;
    along = p_.cosine ? along * norm.inverse_scaled : 0.0;
    Out* out = static_cast<Out*>(out_.grad_rows) + slot * D_;
    for (int64_t d = 0; d < D_; ++d) out[d] += Out(through(factor, grad[d] - along * w[d]));
  }
};

}  // namespace

void sampled_softmax(const SampledSoftmax& problem, const SampledSoftmaxResult& result, int threads) {
  if (problem.input.dtype == DType::float64) {
    Solver<double>(problem, result, threads).solve();
  } else {
    Solver<float>(problem, result, threads).solve();
  }
}

}  // namespace fedss
