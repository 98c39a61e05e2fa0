// How the work goes, for a wave of rows of the batch and a chunk of the columns (mostly all of them):
//
//   pack      class rows, gathered, normalised, one behind the other
//   logits    tiles of classes x rows: the product, then exp(o - max of the tile), in place
//   rows      max and sum of each row from those of its tiles, its loss, and what each tile is to be multiplied with
//   grad_x    the tiles become dlogits; each gives its share of the rows' gradients
//   classes   tiles of classes: the gradients of their rows, over the rows of the wave in order
//
// A step ends before the next begins, as tiles need each other's results. Where one tile of rows is the whole batch a
// tile of classes does not: each is packed when its logits are wanted, and goes through the last two steps at once. In
// one of several chunks, whose logits are computed again for the gradient, it is packed again too, so that no more is
// packed at a time than a tile for each thread. Which tiles there are depends on the sizes alone, so the order of every
// sum does.
#include "sampled_softmax.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "arena.hpp"
#include "class_rows.hpp"
#include "instruction_sets.hpp"
#include "kernels.hpp"
#include "thread_pool.hpp"

namespace fedss {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kZeroNorm = 1e-12;  // rows shorter than this have cosine 0 and pass no gradient

// Sizes, in elements: of the logits of a wave, and of the packed class rows of a chunk.
constexpr int64_t kFewLogits = 1 << 20, kMostLogits = 1 << 21, kMostPacked = 1 << 22;
constexpr int64_t kRowStep = 8, kRowTile = 64, kClassTile = 512, kSmallestClassTile = 32;
constexpr int64_t kFewClasses = 56, kPackedTogether = 32;
constexpr int64_t kFewestRows = 64, kMostRows = 1024, kChunkedRows = 256;  // of a wave; the last: in several chunks
constexpr int64_t kTasks = 16;       // what a step is cut into, where that leaves tasks of some size
constexpr double kTaskWork = 2e5;    // multiply-adds
constexpr double kSerialWork = 4e5;  // multiply-adds of a product below which threads cost more than they give

// In float32, logits and rows must stay in a range where it loses nothing; see LogitTile.
constexpr double kLargestScale = 300, kLargestLogit = 2800, kLongestRow = 0x1p60, kShortestRow = 0x1p-30;

constexpr size_t kMostFloatLabels = 1 << 24;

// Thrown, and caught again here, where float32 does not do.
struct OutOfFloatRange {};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// factor * gradient, but 0 through a factor of 0 even where an upstream gradient is infinite; a NaN stays one.
double through(double factor, double gradient) {
  return factor == 0.0 && gradient == gradient ? 0.0 : factor * gradient;
}

// Computes in T and stores Out, the type of the results.
template <class T, class Out>
class Solver {
 public:
  Solver(const SampledSoftmax& problem, const SampledSoftmaxResult& result, const ClassRows& classes, int threads)
      : p_(problem), out_(result), classes_(classes), kernels_(kernels_for<T>(current_kernels())) {
    B_ = p_.input.rows, D_ = p_.input.cols, V_ = int64_t(classes_.batch_rows.size()), N_ = classes_.columns();
    threads_ = double(V_) * double(N_) * double(D_) < kSerialWork ? 1 : std::max(threads, 1);
    wants_x_ = out_.grad_input, wants_rows_ = out_.grad_rows;
    if (std::is_same<T, float>::value && holds_bfloat16(p_.input) && holds_bfloat16(p_.weight) && !out_.grad_bias) {
      pairs_ = current_kernels().of_bfloat16;
    }
    wants_gradient_ = wants_x_ || wants_rows_ || out_.grad_bias || out_.grad_scale;
  }

  void solve() {
    clear_what_is_not_written();
    if (V_ > 0) {
      plan();
      allocate();
      if (chunk_ == N_ && !by_tile_) pack(0, N_);
      for (int64_t first = 0; first < V_; first += wave_) run_wave(first, std::min(wave_, V_ - first));
      if (wants_rows_ && !by_tile_) finish_class_rows();
    }
    store_scalars();
  }

 private:
  // One row of the batch while its wave runs. o: logits, natural units.
  struct Row {
    const T* target_row = nullptr;  // the unit row of the target; none where its logit is given
    double inverse = 1;             // 1 / |x|, 0 for a zero row; 1 for dot products
    double similarity_factor = 1;   // of products with the packed row; 1 where it was divided by its length
    double upstream = 0;            // gradient of the result with respect to this row's loss
    double target_similarity = 0;   // cos(x, w_t), or x . w_t
    double target_logit = 0;        // o_t
    double max = -kInf;             // of o_j over the columns so far, nearly
    double sum = 0;                 // of exp(o_j - max)
    double sum_similarity = 0;      // of exp(o_j - max) * (similarity_j - origin)
    double share = 0;               // dlogits_j = share * exp(o_j - max_)
    double peak = 0;                // max_: of o_t and every o_j
    double target_gradient = 0;     // dlogits_t
  };

  struct Tile {
    int64_t begin, end;  // columns of the chunk
  };

  const SampledSoftmax& p_;
  const SampledSoftmaxResult& out_;
  const ClassRows& classes_;
  const KernelsFor<T>& kernels_;
  int64_t B_, D_, V_, N_;  // batch, dimension, rows that are not ignored, columns
  int64_t ld_, wave_, row_tile_, chunk_, tiles_;
  int threads_;
  bool wants_x_, wants_rows_, wants_gradient_;
  bool by_tile_;      // tiles of classes do not wait for each other; one thread need not either way
  bool packs_again_;  // by tile in each of several chunks: the packed tile is a thread's own, and gone with the next
  Arena arena_;
  std::atomic<bool> out_of_range_{false};
  std::atomic<double> longest_x_{0}, longest_w_{0};  // |x| and |w|, for dot products
  double loss_sum_ = 0, grad_scale_ = 0;

  std::vector<Row> row_;                     // (wave,)
  T *x_, *target_rows_;                      // (wave, ld) unit rows; unit rows of their targets
  T* x_columns_;                             // (row tiles, D, row_tile) x_ transposed
  T *row_factor_, *row_factor_low_;          // (wave,)
  T* origin_;                                // (wave,) the target's similarity, in the units of the products
  T* target_;                                // (wave,) label of the target, below 0: none
  T* label_;                                 // (chunk,) of the columns: their numbers, unless labels are given
  T* w_;                                     // (packed, ld) unit class rows: the chunk's, or a tile's for each thread
  double* inverse_;                          // (chunk,) 1 / |w|, as Row::inverse
  T *class_factor_, *offset_, *offset_low_;  // (chunk,)
  T* logits_;                            // (row tiles, chunk, row_tile), then exp(o - max of the tile), then dlogits
  T *tile_max_, *tile_factor_;           // (tiles, wave)
  double *tile_sum_, *tile_similarity_;  // (tiles, wave)
  // In place of w_ and x_columns_, where products are of bfloat16: the rows as they are, in pairs along D, and in pairs
  // of rows. x(r, d) is in pair (r, d / 2) or (r / 2, d); only then are factors of rows and classes 1 / length.
  const BfloatKernels* pairs_ = nullptr;
  int64_t pairs_ld_;                        // of the rows in pairs along D
  Bfloat16Pair *w_pairs_, *w_interleaved_;  // (packed, pairs_ld), (packed / 2, ld)
  Bfloat16Pair *x_rows_, *x_pairs_;         // (wave, pairs_ld); the same as (row tiles, D / 2, row_tile)
  Bfloat16Pair* x_interleaved_;             // (wave / 2, ld)
  Bfloat16Pair* dlogits_pairs_;             // (threads, class tile / 2, row_tile)
  T* grad_x_part_;                          // (tiles, wave, ld)
  T* grad_x_;                               // (wave, ld)
  T* grad_rows_;                            // (slots, D): sums of dlogits * unit x
  std::vector<char> takes_part_;  // (slots,) whether the class is a term of any loss; if not it may hold anything
  double* grad_bias_;             // (slots,)
  T* scratch_;                    // (threads, 3, ld)

  bool holds_bfloat16(const Matrix& rows) const {
    return rows.dtype == DType::bfloat16 || (rounds(rows) && p_.rounding == Rounding::to_bfloat16);
  }

  // ---- memory ----

  void clear_what_is_not_written() {
    if (out_.loss) std::fill_n(static_cast<Out*>(out_.loss), p_.reduction == Reduction::none ? B_ : 1, Out(0));
    if (wants_x_ && V_ < B_) std::fill_n(static_cast<Out*>(out_.grad_input), B_ * D_, Out(0));
    const int64_t slots = V_ > 0 ? classes_.slots() : 0;
    if (wants_rows_) std::fill_n(static_cast<Out*>(out_.grad_rows) + slots * D_, (out_.capacity - slots) * D_, Out(0));
    if (out_.grad_bias) std::fill_n(static_cast<Out*>(out_.grad_bias), out_.capacity, Out(0));
    if (out_.row_ids) {
      std::copy(classes_.ids().begin(), classes_.ids().end(), out_.row_ids);
      std::fill(out_.row_ids + classes_.ids().size(), out_.row_ids + out_.capacity, int64_t(-1));
    }
  }

  void plan() {
    if (sizeof(T) == 4 && p_.cosine && std::abs(p_.scale) > kLargestScale) throw OutOfFloatRange{};
    if (sizeof(T) == 4 && classes_.row_label.size() > kMostFloatLabels) throw OutOfFloatRange{};
    const int64_t line = 64 / int64_t(sizeof(T));
    ld_ = std::max(round_up(D_, std::max(line, kernels_.lanes)), line);
    if (ld_ / line % 2 == 0) ld_ += line;  // an odd number of lines: rows fall on all sets of a cache
    pairs_ld_ = (D_ + 1) / 2;
    const bool resident = N_ * ld_ <= kMostPacked && N_ * kFewestRows <= kMostLogits;
    const int64_t columns = std::max<int64_t>(N_, 1);
    // The more there is of the class rows that each wave reads again, the more rows share them.
    const int64_t logits = N_ * ld_ > kFewLogits ? kMostLogits : kFewLogits;
    wave_ = resident ? std::clamp(logits / columns / kRowTile * kRowTile, kFewestRows, kMostRows) : kChunkedRows;
    wave_ = std::min(wave_, V_);
    row_tile_ = std::min(kRowTile, round_up(wave_, kernels_.lanes));
    chunk_ = resident ? N_ : std::min({N_, kMostLogits / padded_wave(), std::max(kMostPacked / ld_, kClassTile)});
    const int64_t row_tiles = padded_wave() / row_tile_;
    const int64_t tasks =
        int64_t(std::clamp(double(wave_) * double(chunk_) * double(D_) / kTaskWork, 1.0, double(kTasks)));
    tiles_ = std::max(ceil_div(chunk_, kClassTile),
                      std::min(ceil_div(chunk_, kSmallestClassTile), ceil_div(tasks, row_tiles)));
    packs_again_ = row_tiles == 1 && chunk_ < N_ && threads_ * tile_width(chunk_) < chunk_;
    by_tile_ = packs_again_ || (row_tiles == 1 && chunk_ == N_ && N_ > 0 && threads_ > 1);
  }

  int64_t padded_wave() const { return round_up(wave_, row_tile_); }
  int64_t packed_columns() const { return packs_again_ ? threads_ * tile_width(chunk_) : chunk_; }

  // Where the first row of a tile of classes is packed.
  int64_t packed(const Tile& t, int worker) const { return packs_again_ ? worker * tile_width(chunk_) : t.begin; }

  void allocate() {
    const int64_t wave = padded_wave();
    row_.resize(wave);
    x_ = arena_.take<T>(wave * ld_), target_rows_ = arena_.take<T>(wave * ld_);
    if (pairs_) {
      x_pairs_ = arena_.take<Bfloat16Pair>(wave * pairs_ld_), x_rows_ = arena_.take<Bfloat16Pair>(wave * pairs_ld_);
      x_interleaved_ = arena_.take<Bfloat16Pair>(wave / 2 * ld_);
      w_pairs_ = arena_.take<Bfloat16Pair>(packed_columns() * pairs_ld_);
      w_interleaved_ = arena_.take<Bfloat16Pair>((packed_columns() + 1) / 2 * ld_);
      dlogits_pairs_ = arena_.take<Bfloat16Pair>(threads_ * tile_pairs());
    } else {
      x_columns_ = arena_.take<T>(wave * D_), w_ = arena_.take<T>(packed_columns() * ld_);
    }
    row_factor_ = arena_.take<T>(wave), row_factor_low_ = arena_.take<T>(wave), target_ = arena_.take<T>(wave);
    origin_ = arena_.take<T>(wave);
    label_ = arena_.take<T>(chunk_);
    for (int64_t j = 0; j < chunk_; ++j) label_[j] = T(j);
    inverse_ = arena_.take<double>(chunk_);
    class_factor_ = arena_.take<T>(chunk_), offset_ = arena_.take<T>(chunk_), offset_low_ = arena_.take<T>(chunk_);
    logits_ = arena_.take<T>(wave * chunk_);
    tile_max_ = arena_.take<T>(tiles_ * wave), tile_factor_ = arena_.take<T>(tiles_ * wave);
    tile_sum_ = arena_.take<double>(tiles_ * wave);
    tile_similarity_ = out_.grad_scale ? arena_.take<double>(tiles_ * wave) : nullptr;
    scratch_ = arena_.take<T>(threads_ * 3 * ld_);
    if (wants_x_) {
      grad_x_part_ = arena_.take<T>(tiles_ * wave * ld_), grad_x_ = arena_.take<T>(wave * ld_);
    }
    if (wants_rows_) {
      grad_rows_ =
          std::is_same<T, Out>::value ? static_cast<T*>(out_.grad_rows) : arena_.take<T>(classes_.slots() * D_);
      clear_slots_without_column();
    }
    grad_bias_ = nullptr;
    if (out_.grad_bias) {
      grad_bias_ = arena_.take<double>(classes_.slots());
      std::fill_n(grad_bias_, classes_.slots(), 0.0);
    }
  }

  int64_t tile_pairs() const { return tile_width(chunk_) / 2 * row_tile_; }

  void clear_slots_without_column() {
    takes_part_.assign(classes_.slots(), N_ == classes_.slots());
    if (N_ == classes_.slots()) return;
    for (int64_t column = 0; column < N_; ++column) takes_part_[classes_.slot(column)] = true;
    for (int64_t slot = 0; slot < classes_.slots(); ++slot) {
      if (!takes_part_[slot]) std::fill_n(grad_rows_ + slot * D_, D_, T(0));
    }
    for (int64_t slot : classes_.target_slot) takes_part_[slot] = true;
  }

  void store_scalars() {
    const double count = p_.reduction == Reduction::mean ? double(std::max<int64_t>(V_, 1)) : 1.0;
    if (out_.loss && p_.reduction != Reduction::none) *static_cast<Out*>(out_.loss) = Out(loss_sum_ / count);
    if (out_.grad_scale) *out_.grad_scale = grad_scale_;
    if (!out_.grad_bias || V_ == 0) return;
    for (int64_t slot = 0; slot < classes_.slots(); ++slot) {
      static_cast<Out*>(out_.grad_bias)[slot] = Out(grad_bias_[slot]);
    }
  }

  // ---- rows of input and weight ----

  // Row i, rounded if asked: where it is, or in `scratch`.
  const T* read_row(const Matrix& from, int64_t i, T* scratch) const {
    const bool in_place = from.dtype == (sizeof(T) == 4 ? DType::float32 : DType::float64) && from.col_stride == 1;
    if (in_place && !rounds(from)) return reinterpret_cast<const T*>(from.row(i));
    if constexpr (std::is_same<T, float>::value) {
      if (is_bfloat16_row(from)) {
        current_kernels().widen_bfloat16(reinterpret_cast<const uint16_t*>(from.row(i)), D_, scratch);
        return scratch;
      }
    }
    from.read_row(i, scratch);
    if (rounds(from)) round_row(scratch);
    return scratch;
  }

  // Whether memory holds what is to be read, in bfloat16.
  bool is_bfloat16_row(const Matrix& from) const {
    return from.dtype == DType::bfloat16 && from.col_stride == 1 && p_.rounding != Rounding::to_float16;
  }

  // out = a row of that length divided by it (for the cosine), with zeros up to a whole vector; the row may be there
  // already. Returns 1 / length, 0 for a zero row, or 1 for dot products. A row that holds anything but finite numbers
  // becomes NaN.
  double store_unit(const Matrix& from, const T* row, double norm, T* out) {
    std::fill(out + D_, out + round_up(D_, kernels_.lanes), T(0));
    if (!p_.cosine) {
      check_length(from, norm);
      if (row != out) std::copy(row, row + D_, out);
      return 1;
    }
    if (norm < kZeroNorm) {
      std::fill_n(out, D_, T(0));
      return 0;
    }
    double inverse = 1;
    if (norm == kInf) {  // an infinite element, or squares past the largest number of float64
      inverse = 0x1p-600;
      kernels_.scale(row, D_, inverse, out);
      row = out, norm = kernels_.norm(row, D_);
    }
    if (norm < kInf) {
      kernels_.scale(row, D_, 1 / norm, out);
      return inverse / norm;
    }
    std::fill_n(out, D_, T(kNaN));
    return kNaN;
  }

  double read_unit(const Matrix& from, int64_t i, T* out) {
    const T* row = read_row(from, i, out);
    return store_unit(from, row, kernels_.norm(row, D_), out);
  }

  // Row i as it is, in bfloat16, with a zero behind it if D is odd. Returns as read_unit does.
  double read_bfloat16(const Matrix& from, int64_t i, float* scratch, Bfloat16Pair* out) {
    const float* row = read_row(from, i, scratch);
    if (D_ % 2) out[pairs_ld_ - 1] = 0;
    if (is_bfloat16_row(from)) {
      std::memcpy(out, from.row(i), D_ * sizeof(uint16_t));
    } else {
      pairs_->narrow(row, D_, reinterpret_cast<uint16_t*>(out));
    }
    const double norm = kernels_.norm(row, D_);
    if (p_.cosine && norm < kZeroNorm) return 0;
    check_length(from, norm);
    return p_.cosine ? 1 / norm : 1;
  }

  // Where rows are not divided by their lengths, float32 products of them must stay in range.
  void check_length(const Matrix& from, double norm) {
    if (sizeof(Out) != 4) return;
    if (sizeof(T) == 4 && !(norm == 0 || (norm > kShortestRow && norm < kLongestRow))) out_of_range_ = true;
    std::atomic<double>& longest = &from == &p_.input ? longest_x_ : longest_w_;
    double before = longest.load(std::memory_order_relaxed);
    while (norm > before && !longest.compare_exchange_weak(before, norm)) {
    }
  }

  // A dot product past the largest number of the results' type is infinite there, whatever T holds.
  static double as_result(double product) {
    return std::abs(product) > std::numeric_limits<Out>::max() ? std::copysign(kInf, product) : product;
  }

  bool rounds(const Matrix& from) const { return p_.rounding != Rounding::none && from.dtype != DType::float64; }

  void round_row(T* row) const {
    for (int64_t d = 0; d < D_; ++d) {
      row[d] =
          p_.rounding == Rounding::to_bfloat16 ? round_to_bfloat16(float(row[d])) : round_to_float16(float(row[d]));
    }
  }

  T* scratch(int worker, int which) const { return scratch_ + (worker * 3 + which) * ld_; }

  double bias(int64_t slot) const { return p_.bias ? p_.bias[classes_.id(slot)] : 0.0; }

  void refuse_out_of_range() {
    const bool too_large = !p_.cosine && std::abs(p_.scale) * longest_x_ * longest_w_ > kLargestLogit;
    if (sizeof(T) == 4 && (out_of_range_ || too_large)) throw OutOfFloatRange{};
  }

  void pack(int64_t first, int64_t columns) {
    parallel_for(ceil_div(columns, kSmallestClassTile), threads_, [&](int64_t task, int worker) {
      const int64_t begin = task * kSmallestClassTile;
      pack_columns(first, {begin, std::min(begin + kSmallestClassTile, columns)}, begin, worker);
    });
    refuse_out_of_range();
  }

  // The first of them becomes packed row `at`.
  void pack_columns(int64_t first, const Tile& t, int64_t at, int worker) {
    if (pairs_) {
      pack_pairs(first, t, at, worker);
    } else {
      for (int64_t j = t.begin; j < t.end; j += kPackedTogether) {
        pack_units(first, {j, std::min(j + kPackedTogether, t.end)}, at + j - t.begin);
      }
    }
    split_offsets(first, t.begin, t.end);
  }

  // Lengths first, as square roots and divisions of one row would wait for each other.
  void pack_units(int64_t first, const Tile& t, int64_t at) {
    const T* row[kPackedTogether];
    double norm[kPackedTogether];
    for (int64_t j = t.begin; j < t.end; ++j) {
      prefetch_class(first + j + 8);
      row[j - t.begin] = read_row(p_.weight, class_id(first + j), w_ + (at + j - t.begin) * ld_);
      norm[j - t.begin] = kernels_.norm(row[j - t.begin], D_);
    }
    for (int64_t j = t.begin; j < t.end; ++j) {
      inverse_[j] = store_unit(p_.weight, row[j - t.begin], norm[j - t.begin], w_ + (at + j - t.begin) * ld_);
      class_factor_[j] = T(1);
    }
  }

  void pack_pairs(int64_t first, const Tile& t, int64_t at, int worker) {
    if constexpr (std::is_same<T, float>::value) {
      for (int64_t j = t.begin; j < t.end; ++j) {
        prefetch_class(first + j + 8);
        Bfloat16Pair* out = w_pairs_ + (at + j - t.begin) * pairs_ld_;
        inverse_[j] = read_bfloat16(p_.weight, class_id(first + j), scratch(worker, 0), out);
        class_factor_[j] = T(inverse_[j]);
      }
      interleave(w_pairs_, at, at + t.end - t.begin, worker, w_interleaved_);
    }
  }

  int64_t class_id(int64_t column) const { return classes_.id(classes_.slot(column)); }

  // Offsets, in the unit of T's logits, as a high part (in float32 a multiple of 2^-9) and what is left.
  void split_offsets(int64_t first, int64_t begin, int64_t end) {
    constexpr double kShift = 0x1.8p43;  // its last bit is 2^-9: adding it rounds there
    bool too_large = false;
    for (int64_t j = begin; j < end; ++j) {
      double value = -classes_.log_count(first + j);
      if (p_.bias) value += bias(classes_.slot(first + j));
      value *= 1 / kLogitUnit<T>;
      too_large = too_large || std::abs(value) > kLargestLogit / kLogitUnit<T>;
      const double high = sizeof(T) == 4 ? (value + kShift) - kShift : value;
      offset_[j] = T(high), offset_low_[j] = T(value - high);
    }
    if (sizeof(T) == 4 && too_large) out_of_range_ = true;
  }

  // Rows [begin, end) of `rows`, in pairs; an odd last one is paired with zeros.
  void interleave(const Bfloat16Pair* rows, int64_t begin, int64_t end, int worker, Bfloat16Pair* out) {
    Bfloat16Pair* zeros = reinterpret_cast<Bfloat16Pair*>(scratch(worker, 2));
    std::fill_n(zeros, pairs_ld_, 0);
    for (int64_t i = begin; i < end; i += 2) {
      const Bfloat16Pair *first = rows + i * pairs_ld_, *second = i + 1 < end ? first + pairs_ld_ : zeros;
      pairs_->interleave(reinterpret_cast<const uint16_t*>(first), reinterpret_cast<const uint16_t*>(second), D_,
                         out + i / 2 * ld_);
    }
  }

  void prefetch_class(int64_t column) const {
    if (classes_.ids().empty() || column >= N_) return;  // rows in their order come by themselves
    const char* row = p_.weight.row(classes_.id(classes_.slot(column)));
    const int64_t bytes = std::min<int64_t>(D_ * size_of(p_.weight.dtype), 1024);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
  }

  void load_rows(int64_t first, int64_t rows) {
    const double share = p_.reduction == Reduction::mean ? 1.0 / double(V_) : 1.0;
    parallel_for(ceil_div(padded_wave(), kRowStep), threads_, [&](int64_t task, int worker) {
      const int64_t end = std::min((task + 1) * kRowStep, padded_wave());
      for (int64_t r = task * kRowStep; r < end; ++r) {
        if (r < rows) {
          load_row(first + r, r, share, worker);
        } else {
          std::fill_n(x_ + r * ld_, ld_, T(0));
          if (pairs_) std::fill_n(x_rows_ + r * pairs_ld_, pairs_ld_, 0);
          row_factor_[r] = row_factor_low_[r] = origin_[r] = 0;
        }
      }
      const int64_t begin = task * kRowStep;
      if (pairs_) {
        transpose(x_rows_, pairs_ld_, begin, end, pairs_ld_, x_pairs_);
        interleave(x_rows_, begin, end, worker, x_interleaved_);
      } else {
        transpose(x_, ld_, begin, end, D_, x_columns_);
      }
    });
    refuse_out_of_range();
  }

  // Rows [begin, end), of one row tile, become columns of it.
  template <class Element>
  void transpose(const Element* rows, int64_t ld, int64_t begin, int64_t end, int64_t n, Element* tiles) const {
    const int64_t inside = begin % row_tile_;
    Element* columns = tiles + (begin - inside) * n + inside;
    for (int64_t d = 0; d < n; ++d) {
      for (int64_t r = begin; r < end; ++r) columns[d * row_tile_ + r - begin] = rows[r * ld + d];
    }
  }

  void load_row(int64_t v, int64_t r, double share, int worker) {
    const int64_t i = classes_.batch_rows[v];
    Row& row = row_[r] = Row{};
    row.inverse = read_unit(p_.input, i, x_ + r * ld_);
    row.upstream = p_.grad_loss ? p_.grad_loss[i] : share;
    if (p_.target_logit) {
      row.target_logit = p_.target_logit[i];
    } else {
      load_target(v, r);
    }
    if constexpr (std::is_same<T, float>::value) {
      if (pairs_) row.similarity_factor = read_bfloat16(p_.input, i, scratch(worker, 0), x_rows_ + r * pairs_ld_);
    }
    const double factor = p_.scale * row.similarity_factor / kLogitUnit<T>;
    row_factor_[r] = T(factor), row_factor_low_[r] = T(factor - double(row_factor_[r]));
    origin_[r] = row.similarity_factor == 0.0 ? T(0) : T(row.target_similarity / row.similarity_factor);
    if (sizeof(T) == 4 && std::abs(row.target_logit) > kLargestLogit) out_of_range_ = true;
  }

  void load_target(int64_t v, int64_t r) {
    const int64_t i = classes_.batch_rows[v], slot = classes_.target_slot[v];
    Row& row = row_[r];
    if (chunk_ == N_ && !by_tile_ && !pairs_ && classes_.target_column[v] >= 0) {
      row.target_row = w_ + classes_.target_column[v] * ld_;
    } else {
      row.target_row = target_rows_ + r * ld_;
      read_unit(p_.weight, classes_.id(slot), target_rows_ + r * ld_);
    }
    row.target_similarity = as_result(kernels_.dot(x_ + r * ld_, row.target_row, D_));
    const double log_count = p_.target_log_expected_count ? p_.target_log_expected_count[i] : 0.0;
    row.target_logit = p_.scale * row.target_similarity + bias(slot) - log_count;
  }

  // ---- the steps ----

  int64_t tile_width(int64_t columns) const { return round_up(ceil_div(columns, tiles_), 2); }

  Tile tile(int64_t t, int64_t columns) const {
    const int64_t width = tile_width(columns);
    return {t * width, std::min((t + 1) * width, columns)};
  }

  // A wave of rows meets the columns chunk by chunk: once for the logsumexp, once for the gradient. Where all columns
  // are one chunk, the second pass finds what the first one computed still there.
  void run_wave(int64_t first, int64_t rows) {
    load_rows(first, rows);
    for (int64_t c = 0; c < N_; c += chunk_) {
      const int64_t columns = std::min(chunk_, N_ - c);
      if (chunk_ < N_ && !by_tile_) pack(c, columns);
      compute_exponentials(first, c, columns, rows);
      merge_tiles(rows, columns);
    }
    finish_losses(first, rows);
    if (!wants_gradient_) return;
    if (N_ == 0) return run_targets(first, rows);
    for (int64_t c = 0; c < N_; c += chunk_) {
      const int64_t columns = std::min(chunk_, N_ - c);
      if (chunk_ < N_ && !by_tile_) pack(c, columns), compute_exponentials(first, c, columns, rows);
      compute_dlogits(first, c, columns, rows);
      accumulate_gradients(first, c, columns, rows);
    }
  }

  // No class is in the denominator besides the targets: gradients are 0, or NaN beside losses that are.
  void run_targets(int64_t first, int64_t rows) {
    if (wants_x_) {
      std::fill_n(grad_x_, rows * ld_, T(0));
      for (int64_t r = 0; r < rows; ++r) store_grad_input(first, r);
    }
    add_targets(first, 0, {0, 0}, rows, 0, D_);
  }

  int64_t row_tiles(int64_t rows) const { return ceil_div(rows, row_tile_); }
  int64_t rows_of(int64_t row_tile, int64_t rows) const { return std::min(row_tile_, rows - row_tile * row_tile_); }
  int64_t padded_rows_of(int64_t row_tile, int64_t rows) const {
    return round_up(rows_of(row_tile, rows), kernels_.lanes);
  }
  T* logits(int64_t row_tile, int64_t column) const { return logits_ + (row_tile * chunk_ + column) * row_tile_; }

  // For every tile of classes and tile of rows: body(tile of classes, number of it, tile of rows, worker).
  template <class Body>
  void for_tiles(int64_t columns, int64_t rows, const Body& body) {
    const int64_t across = row_tiles(rows);
    parallel_for(tiles_of(columns) * across, threads_, [&](int64_t task, int worker) {
      body(tile(task / across, columns), task / across, task % across, worker);
    });
  }

  void compute_exponentials(int64_t first, int64_t chunk, int64_t columns, int64_t rows) {
    find_targets(first, chunk, columns, rows);
    for_tiles(columns, rows, [&](const Tile& t, int64_t number, int64_t row_tile, int worker) {
      if (by_tile_ && first == 0) pack_columns(chunk, t, packed(t, worker), worker);
      exponentiate_tile(t, number, row_tile, rows, worker);
    });
    if (by_tile_) refuse_out_of_range();
  }

  void find_targets(int64_t first, int64_t chunk, int64_t columns, int64_t rows) {
    if (!classes_.row_label.empty()) {
      for (int64_t j = 0; j < columns; ++j) label_[j] = T(classes_.column_label[chunk + j]);
      for (int64_t r = 0; r < padded_wave(); ++r) target_[r] = r < rows ? T(classes_.row_label[first + r]) : T(-2);
      return;
    }
    for (int64_t r = 0; r < padded_wave(); ++r) {
      const int64_t column = r < rows ? classes_.target_column[first + r] - chunk : -1;
      target_[r] = column < columns ? T(column) : T(-1);
    }
  }

  void exponentiate_tile(const Tile& t, int64_t number, int64_t row_tile, int64_t rows, int worker) {
    const int64_t lanes = padded_rows_of(row_tile, rows), classes = t.end - t.begin;
    const int64_t r = row_tile * row_tile_, at = number * padded_wave() + r;
    T* values = logits(row_tile, t.begin);
    multiply_logits(t, r, lanes, worker, values);
    kernels_.exponentiate({classes, lanes, row_tile_, values, class_factor_ + t.begin, offset_ + t.begin,
                           offset_low_ + t.begin, row_factor_ + r, row_factor_low_ + r, origin_ + r, target_ + r,
                           label_ + t.begin, tile_max_ + at, tile_sum_ + at,
                           tile_similarity_ ? tile_similarity_ + at : nullptr});
  }

  // values(j, r) = w_j . x_r, a tile of classes and the rows from `r` on
  void multiply_logits(const Tile& t, int64_t r, int64_t lanes, int worker, T* values) const {
    const int64_t classes = t.end - t.begin, at = packed(t, worker);
    if constexpr (std::is_same<T, float>::value) {
      if (pairs_) {
        return pairs_->multiply({classes, lanes, pairs_ld_, w_pairs_ + at * pairs_ld_, pairs_ld_, 1,
                                 x_pairs_ + r * pairs_ld_, row_tile_, values, row_tile_, nullptr, false});
      }
    }
    kernels_.multiply(
        {classes, lanes, D_, w_ + at * ld_, ld_, 1, x_columns_ + r * D_, row_tile_, values, row_tile_, nullptr, false});
    if (sizeof(T) == sizeof(Out) || p_.cosine || longest_x_ * longest_w_ <= std::numeric_limits<Out>::max()) return;
    for (int64_t i = 0; i < classes * row_tile_; i += row_tile_) {
      std::transform(values + i, values + i + lanes, values + i, as_result);
    }
  }

  // Folds the tiles of a chunk into max, sum and sum_similarity of each row.
  void merge_tiles(int64_t rows, int64_t columns) {
    const int64_t tiles = tiles_of(columns);
    parallel_for(ceil_div(rows, kRowStep), threads_, [&](int64_t task, int) {
      const int64_t begin = task * kRowStep, end = std::min(begin + kRowStep, rows);
      for (int64_t r = begin; r < end; ++r) {
        double max = row_[r].max;
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t at = t * padded_wave() + r;
          if (tile_sum_[at] != 0) max = std::max(max, tile_max(at));  // a NaN differs from 0 too
        }
        const double before = row_[r].sum > 0 ? std::exp(row_[r].max - max) : 0.0;
        row_[r].sum *= before, row_[r].sum_similarity *= before, row_[r].max = max;
      }
      double factor[kRowStep];
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t at = t * padded_wave();
        tile_exponentials(at, begin, end, [this](int64_t r) { return row_[r].max; }, factor);
        for (int64_t r = begin; r < end; ++r) {
          row_[r].sum += factor[r - begin] * tile_sum_[at + r];
          if (tile_similarity_) row_[r].sum_similarity += factor[r - begin] * tile_similarity_[at + r];
        }
      }
    });
  }

  // Tiles are of nearly equal width; the last of `tiles_` may hold nothing.
  int64_t tiles_of(int64_t columns) const { return ceil_div(columns, tile_width(columns)); }

  double tile_max(int64_t at) const { return double(tile_max_[at]) * kLogitUnit<T>; }

  // out = exp(max of the tile that begins at `at` - max(r)) for the rows [begin, end), 0 where it has no term.
  template <class Max>
  void tile_exponentials(int64_t at, int64_t begin, int64_t end, const Max& max, double* out) const {
    for (int64_t r = begin; r < end; ++r) out[r - begin] = tile_sum_[at + r] != 0 ? tile_max(at + r) - max(r) : -kInf;
    current_kernels().exponentials(out, end - begin, out);
  }

  // loss = log1p(sum_{j != t} exp(o_j - o_t)) where the target leads, else (max - o_t) + log(sum of all). dlogits of
  // the target is minus the others' sum, so that nothing cancels as its probability nears 1. An infinite peak makes
  // all of it NaN.
  void finish_losses(int64_t first, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      Row& row = row_[r];
      row.peak = row.target_logit >= row.max ? row.target_logit : row.max;
      const double zero = row.peak - row.peak;  // or NaN
      const double others = row.sum == 0 ? zero : row.sum * std::exp(row.max - row.peak) + zero;
      const double target = std::exp(row.target_logit - row.peak), all = target + others;
      const double loss =
          row.target_logit == row.peak ? std::log1p(others) : row.peak - row.target_logit + std::log(all);
      loss_sum_ += loss;
      if (out_.loss && p_.reduction == Reduction::none) {
        static_cast<Out*>(out_.loss)[classes_.batch_rows[first + r]] = Out(loss);
      }
      row.share = row.upstream / all;
      row.target_gradient = p_.target_logit ? 0.0 : -through(others, row.share);
      if (!out_.grad_scale) continue;
      // sum_{j != t} exp(o_j) (similarity_j - similarity_t): of differences, as all may be nearly the same. What the
      // origin lost when it was rounded is made good.
      const double differences =
          row.sum == 0 ? 0.0 : row.sum_similarity * row.similarity_factor * std::exp(row.max - row.peak);
      const double rounded = double(origin_[r]) * row.similarity_factor - row.target_similarity;
      grad_scale_ += through(differences + others * rounded, row.share);
    }
  }

  // The tiles become dlogits, but for the rows' targets; each gives its share of the rows' gradients.
  void compute_dlogits(int64_t first, int64_t chunk, int64_t columns, int64_t rows) {
    if (packs_again_) find_targets(first, chunk, columns, rows);
    for_tiles(columns, rows, [&](const Tile& t, int64_t number, int64_t row_tile, int worker) {
      if (packs_again_) {
        pack_columns(chunk, t, packed(t, worker), worker);
        exponentiate_tile(t, number, row_tile, rows, worker);
      }
      const int64_t lanes = padded_rows_of(row_tile, rows), count = rows_of(row_tile, rows);
      const int64_t r0 = row_tile * row_tile_, at = number * padded_wave() + r0;
      double factor[kRowTile];
      tile_exponentials(number * padded_wave(), r0, r0 + count, [this](int64_t r) { return row_[r].peak; }, factor);
      for (int64_t r = 0; r < lanes; ++r) tile_factor_[at + r] = r < count ? T(row_[r0 + r].share * factor[r]) : T(0);
      T* out = nullptr;  // the first tile needs no place of its own
      if (wants_x_) out = number == 0 ? grad_x_ + r0 * ld_ : grad_x_part_ + at * ld_;
      multiply_grad_x(t, r0, count, lanes, tile_factor_ + at, worker, out, number == 0 && chunk > 0);
      if (!by_tile_) return;
      accumulate_class_rows(first, chunk, t, rows, 0, D_);
      if (wants_rows_ && first + rows == V_) finish_class_rows(slots_of(chunk, t), worker);
    });
  }

  // The values of a tile become dlogits, and out(r) = (or +=) their sum over the tile's classes, each times its unit
  // row.
  void multiply_grad_x(const Tile& t, int64_t r0, int64_t count, int64_t lanes, const T* factor, int worker, T* out,
                       bool accumulate) {
    const int64_t classes = t.end - t.begin, columns = round_up(D_, kernels_.lanes), at = packed(t, worker);
    T* dlogits = logits(r0 / row_tile_, t.begin);
    if constexpr (std::is_same<T, float>::value) {
      if (pairs_) {
        float unit_factor[kRowTile];
        for (int64_t r = 0; r < lanes; ++r) {
          unit_factor[r] = r < count ? float(factor[r] * row_[r0 + r].similarity_factor) : 0.0f;
        }
        Bfloat16Pair* by_class = dlogits_pairs_ + worker * tile_pairs();
        pairs_->round_tile(
            {classes, lanes, row_tile_, dlogits, class_factor_ + t.begin, factor, unit_factor, by_class});
        if (!wants_x_) return;
        return pairs_->multiply({count, columns, ceil_div(classes, 2), by_class, 1, row_tile_,
                                 w_interleaved_ + at / 2 * ld_, ld_, out, ld_, nullptr, accumulate});
      }
    }
    kernels_.scale_columns(dlogits, classes, lanes, row_tile_, factor);
    if (!wants_x_) return;
    kernels_.multiply(
        {count, columns, classes, dlogits, 1, row_tile_, w_ + at * ld_, ld_, out, ld_, nullptr, accumulate});
  }

  // Class rows over the rows of the wave, rows over the tiles of the chunk.
  void accumulate_gradients(int64_t first, int64_t chunk, int64_t columns, int64_t rows) {
    const int64_t tiles = tiles_of(columns), width = 2 * kernels_.lanes;
    const int64_t blocks =
        wants_rows_ ? std::clamp<int64_t>(kTasks / tiles, 1, std::max<int64_t>(ceil_div(D_, width), 1)) : 1;
    const int64_t step = round_up(ceil_div(std::max<int64_t>(D_, 1), blocks), width);
    const int64_t class_tasks = !by_tile_ && (wants_rows_ || grad_bias_) ? tiles * blocks : 0;
    const int64_t row_tasks = wants_x_ ? ceil_div(rows, kRowStep) : 0;
    parallel_for(class_tasks + row_tasks, threads_, [&](int64_t task, int) {
      if (task < class_tasks) {
        const int64_t d = task % blocks * step;
        accumulate_class_rows(first, chunk, tile(task / blocks, columns), rows, d, std::min(d + step, D_));
      } else {
        const int64_t begin = (task - class_tasks) * kRowStep;
        for (int64_t r = begin; r < std::min(begin + kRowStep, rows); ++r) {
          add_grad_x(r, tiles);
          if (chunk + columns == N_) store_grad_input(first, r);
        }
      }
    });
  }

  void add_grad_x(int64_t r, int64_t tiles) {
    for (int64_t t = 1; t < tiles; ++t) {
      kernels_.add_scaled(grad_x_part_ + (t * padded_wave() + r) * ld_, D_, T(1), grad_x_ + r * ld_);
    }
  }

  // The columns of a tile, dimensions [d, d_end); the first of the dimensions brings the biases along.
  void accumulate_class_rows(int64_t first, int64_t chunk, const Tile& t, int64_t rows, int64_t d, int64_t d_end) {
    // A few classes meet all rows before the next ones come: their sums stay in the cache.
    for (int64_t begin = t.begin; begin < t.end; begin += kFewClasses) {
      const Tile few{begin, std::min(begin + kFewClasses, t.end)};
      for (int64_t row_tile = 0; row_tile < row_tiles(rows); ++row_tile) {
        if (wants_rows_ && d < d_end) multiply_grad_rows(first, chunk, few, row_tile, rows, d, d_end);
        if (grad_bias_ && d == 0) add_grad_bias(chunk, few, row_tile, rows);
      }
    }
    add_targets(first, chunk, t, rows, d, d_end);
  }

  void add_grad_bias(int64_t chunk, const Tile& t, int64_t row_tile, int64_t rows) {
    for (int64_t j = t.begin; j < t.end; ++j) {
      grad_bias_[classes_.slot(chunk + j)] += kernels_.sum(logits(row_tile, j), rows_of(row_tile, rows));
    }
  }

  // The sums over the rows of a row tile of dlogits times the unit row, added to what earlier rows gave.
  void multiply_grad_rows(int64_t first, int64_t chunk, const Tile& t, int64_t row_tile, int64_t rows, int64_t d,
                          int64_t d_end) const {
    const int64_t classes = t.end - t.begin, count = rows_of(row_tile, rows), r = row_tile * row_tile_;
    const int64_t* slots = classes_.slots_from(chunk + t.begin);
    const T* dlogits = logits(row_tile, t.begin);
    T* out = grad_rows_ + (slots ? 0 : (chunk + t.begin) * D_) + d;
    const bool accumulate = first > 0 || row_tile > 0;
    if constexpr (std::is_same<T, float>::value) {
      if (pairs_) {
        return pairs_->multiply({classes, d_end - d, ceil_div(count, 2), reinterpret_cast<const Bfloat16Pair*>(dlogits),
                                 row_tile_, 1, x_interleaved_ + r / 2 * ld_ + d, ld_, out, D_, slots, accumulate});
      }
    }
    kernels_.multiply(
        {classes, d_end - d, count, dlogits, row_tile_, 1, x_ + r * ld_ + d, ld_, out, D_, slots, accumulate});
  }

  struct Slots {
    int64_t begin, end;
  };

  // A tile owns the slots from its first column on to the next tile's; the first one those before it too.
  Slots slots_of(int64_t chunk, const Tile& t) const {
    const int64_t next = chunk + t.end;
    return {chunk + t.begin == 0 ? 0 : classes_.slot(chunk + t.begin),
            next < N_ ? classes_.slot(next) : classes_.slots()};
  }

  void add_targets(int64_t first, int64_t chunk, const Tile& t, int64_t rows, int64_t d, int64_t d_end) {
    if (p_.target_logit) return;
    const Slots owned = slots_of(chunk, t);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t slot = classes_.target_slot[first + r];
      if (slot < owned.begin || slot >= owned.end) continue;
      const double gradient = row_[r].target_gradient;
      if (wants_rows_ && d < d_end)
        kernels_.add_scaled(x_ + r * ld_ + d, d_end - d, T(gradient), grad_rows_ + slot * D_ + d);
      if (grad_bias_ && d == 0) grad_bias_[slot] += gradient;
    }
  }

  // scale / |x| times what is left of the gradient of the unit row without its part along it.
  void store_grad_input(int64_t first, int64_t r) {
    T* gradient = grad_x_ + r * ld_;
    if (row_[r].target_row) kernels_.add_scaled(row_[r].target_row, D_, T(row_[r].target_gradient), gradient);
    Out* out = static_cast<Out*>(out_.grad_input) + classes_.batch_rows[first + r] * D_;
    store_projected(gradient, x_ + r * ld_, 1, row_[r].inverse, out);
  }

  // out = scale * inverse * what is left of the gradient without its part along the unit row, which is factor * row.
  void store_projected(T* gradient, const T* row, double factor, double inverse, Out* out) {
    const double by = p_.scale * inverse;
    if (inverse == 0.0 || by == 0.0) return void(std::fill_n(out, D_, Out(0)));  // whatever the scale, if infinite
    T* to = gradient;
    if constexpr (std::is_same<T, Out>::value) to = out;
    if (p_.cosine) {
      kernels_.project(gradient, D_, factor * factor, row, by, to);
    } else {  // without the row, which may hold infinities: 0 times them is NaN
      kernels_.scale(gradient, D_, by, to);
    }
    if constexpr (!std::is_same<T, Out>::value) std::copy_n(gradient, D_, out);
  }

  void finish_class_rows() {
    constexpr int64_t kStep = 32;
    parallel_for(ceil_div(classes_.slots(), kStep), threads_, [&](int64_t task, int worker) {
      const int64_t begin = task * kStep;
      finish_class_rows({begin, std::min(begin + kStep, classes_.slots())}, worker);
    });
  }

  void finish_class_rows(const Slots& slots, int worker) {
    // Whether column j is slot j, and its row still there.
    const bool packed = chunk_ == N_ && N_ == classes_.slots();
    for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
      T* gradient = grad_rows_ + slot * D_;
      Out* out = static_cast<Out*>(out_.grad_rows) + slot * D_;
      if (packed) {
        store_projected(gradient, packed_row(slot, scratch(worker, 0)), class_factor_[slot], inverse_[slot], out);
      } else {
        T* unit = scratch(worker, 1);
        const double inverse = takes_part_[slot] ? read_unit(p_.weight, classes_.id(slot), unit) : 0.0;
        store_projected(gradient, unit, 1, inverse, out);
      }
    }
  }

  const T* packed_row(int64_t column, T* scratch) const {
    if constexpr (std::is_same<T, float>::value) {
      if (pairs_) {
        current_kernels().widen_bfloat16(reinterpret_cast<const uint16_t*>(w_pairs_ + column * pairs_ld_), D_, scratch);
        return scratch;
      }
    }
    return w_ + column * ld_;
  }
};

void solve(const SampledSoftmax& problem, const SampledSoftmaxResult& result, const ClassRows& classes, int threads) {
  const bool of_doubles = problem.input.dtype == DType::float64;
  const double work = double(classes.batch_rows.size()) * double(classes.columns()) * double(problem.input.cols);
  if (!of_doubles && problem.weight.dtype != DType::float64 && work > current_kernels().precise_work) {
    try {
      return Solver<float, float>(problem, result, classes, threads).solve();
    } catch (const OutOfFloatRange&) {  // nothing is lost: what was written is written again
    }
  }
  if (of_doubles) {
    Solver<double, double>(problem, result, classes, threads).solve();
  } else {
    Solver<double, float>(problem, result, classes, threads).solve();
  }
}

// Of a class that is listed under several labels the slots, which are neighbours, become one; returns how many are
// left.
template <class Out>
int64_t merge_slots(const SampledSoftmaxResult& result, int64_t slots, int64_t D) {
  Out *rows = static_cast<Out*>(result.grad_rows), *biases = static_cast<Out*>(result.grad_bias);
  int64_t to = 0;
  for (int64_t from = 1; from < slots; ++from) {
    const bool same = result.row_ids[from] == result.row_ids[to];
    if (!same) result.row_ids[++to] = result.row_ids[from];
    if (to == from) continue;
    for (int64_t d = 0; rows && d < D; ++d) rows[to * D + d] = rows[from * D + d] + (same ? rows[to * D + d] : Out(0));
    if (biases) biases[to] = biases[from] + (same ? biases[to] : Out(0));
  }
  const int64_t left = std::min(to + 1, slots);
  std::fill(result.row_ids + left, result.row_ids + slots, int64_t(-1));
  if (rows) std::fill(rows + left * D, rows + slots * D, Out(0));
  if (biases) std::fill(biases + left, biases + slots, Out(0));
  return left;
}

}  // namespace

int64_t sampled_softmax(const SampledSoftmax& problem, const SampledSoftmaxResult& result, int threads) {
  const KeepThreadsAwake awake;
  const ClassRows classes(problem);
  solve(problem, result, classes, threads);
  if (!problem.entry_labels || !result.row_ids) return classes.slots();
  return problem.input.dtype == DType::float64 ? merge_slots<double>(result, classes.slots(), problem.input.cols)
                                               : merge_slots<float>(result, classes.slots(), problem.input.cols);
}

}  // namespace fedss
