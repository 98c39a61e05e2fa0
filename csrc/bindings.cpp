// Argument checks and the Python module `fedss_kernels._C`; no arithmetic.
//
// Tensors arrive as Python objects and are asked for pointer, shape, strides and dtype, as Python would ask them: no
// torch header, so one build serves every torch. Shapes are checked here, so that no kernel can leave a tensor's
// memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "gpu_launches.hpp"
#include "instruction_sets.hpp"
#include "lazy_momentum.hpp"
#include "row_adam.hpp"
#include "row_momentum.hpp"
#include "sampled_softmax.hpp"
#include "scale_to_bfloat16.hpp"
#include "scatter_add.hpp"
#include "xor_rows.hpp"

namespace py = pybind11;

namespace fedss {
namespace {

// DLPack's C exchange API (version 1): a tensor's fields in one call. Only what is used here is spelled out.
struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void *allocator, *from_py_object, *to_py_object;
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
};

const DLPackExchangeAPI& exchange_api() {
  static const DLPackExchangeAPI* const api = [] {
    const py::object capsule = py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
    const auto* found =
        static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (found == nullptr) throw py::error_already_set();
    if (found->version.major != 1) throw py::import_error("torch's DLPack exchange API has another version than 1");
    return found;
  }();
  return *api;
}

void expect(bool holds, const std::string& name, const std::string& expected) {
  if (!holds) throw py::value_error(name + ": expected " + expected);
}

DType dtype_of(const char* name, const DLTensor& tensor) {
  constexpr int kSigned = 0, kFloat = 2, kBfloat = 4;
  const int code = tensor.dtype.code, bits = tensor.dtype.bits;
  if (code == kFloat && bits == 32) return DType::float32;
  if (code == kFloat && bits == 64) return DType::float64;
  if (code == kFloat && bits == 16) return DType::float16;
  if (code == kBfloat && bits == 16) return DType::bfloat16;
  if (code == kSigned && bits == 64) return DType::int64;
  throw py::type_error(std::string(name) + ": expected a floating or int64 tensor");
}

int64_t elements_of(const DLTensor& tensor) {
  int64_t elements = 1;
  for (int d = 0; d < tensor.ndim; ++d) elements *= tensor.shape[d];
  return elements;
}

DLTensor fields_of(const char* name, const py::handle& tensor) {
  constexpr int kCpu = 1;
  DLTensor fields;
  if (exchange_api().dltensor_from_py_object_no_sync(tensor.ptr(), &fields) != 0) {
    PyErr_Clear();
    throw py::type_error(std::string(name) + ": expected a dense CPU tensor");
  }
  if (fields.device.type != kCpu) throw py::value_error(std::string(name) + ": expected a CPU tensor");
  if (fields.data == nullptr && elements_of(fields) > 0) {  // FSDP frees what it has cut into shards
    throw py::value_error(std::string(name) + ": expected a tensor with memory, got one whose memory is freed");
  }
  fields.data = static_cast<char*>(fields.data) + fields.byte_offset;
  return fields;
}

bool floating(DType dtype) { return dtype != DType::int64; }

Matrix matrix(const char* name, const py::handle& tensor) {
  const DLTensor t = fields_of(name, tensor);
  const DType dtype = dtype_of(name, t);
  if (t.ndim != 2 || !floating(dtype)) throw py::value_error(std::string(name) + ": expected a floating matrix");
  return {t.data, dtype, t.shape[0], t.shape[1], t.strides[0], t.strides[1]};
}

Vector vector(const char* name, const py::handle& tensor, bool of_ids) {
  if (tensor.is_none()) return {};
  const DLTensor t = fields_of(name, tensor);
  const DType dtype = dtype_of(name, t);
  if (t.ndim != 1 || floating(dtype) == of_ids) {
    throw py::value_error(std::string(name) + ": expected a vector of " + (of_ids ? "int64" : "a floating dtype"));
  }
  return {t.data, dtype, t.shape[0], t.strides[0]};
}

// Where a result goes: contiguous, of the given type and at least the given size.
void* output(const char* name, const py::handle& tensor, DType dtype, int64_t elements) {
  if (tensor.is_none()) return nullptr;
  const DLTensor t = fields_of(name, tensor);
  int64_t size = 1;
  bool contiguous = true;
  for (int d = t.ndim - 1; d >= 0; --d) {
    contiguous = contiguous && (t.shape[d] <= 1 || t.strides[d] == size);
    size *= t.shape[d];
  }
  if (dtype_of(name, t) != dtype || !(contiguous || size == 0) || size < elements) {
    throw py::value_error(std::string(name) + ": expected a contiguous tensor of the accumulating type with " +
                          std::to_string(elements) + " elements");
  }
  return t.data;
}

template <class T>
T choice(const char* name, const std::string& value, std::initializer_list<std::pair<const char*, T>> choices) {
  for (const auto& [known, meaning] : choices) {
    if (value == known) return meaning;
  }
  throw py::value_error(std::string(name) + ": unknown value " + value);
}

int64_t run_sampled_softmax(const py::object& input, const py::object& weight, const py::object& target,
                            const py::object& class_ids, const py::object& log_expected_count,
                            const py::object& target_log_expected_count, const py::object& bias, double scale,
                            const std::string& similarity, int64_t ignore_index, const std::string& rounding,
                            const std::string& reduction, const py::object& grad_loss, const py::object& loss,
                            const py::object& grad_input, const py::object& grad_rows, const py::object& row_ids,
                            const py::object& grad_bias, const py::object& grad_scale, int threads,
                            const py::object& entry_labels, const py::object& target_labels,
                            const py::object& target_logit) {
  SampledSoftmax p;
  p.input = matrix("input", input);
  p.weight = matrix("weight", weight);
  p.target = vector("target", target, true);
  p.class_ids = vector("class_ids", class_ids, true);
  p.all_classes = class_ids.is_none();
  p.log_expected_count = vector("log_expected_count", log_expected_count, false);
  p.target_log_expected_count = vector("target_log_expected_count", target_log_expected_count, false);
  p.bias = vector("bias", bias, false);
  p.entry_labels = vector("entry_labels", entry_labels, true);
  p.target_labels = vector("target_labels", target_labels, true);
  p.target_logit = vector("target_logit", target_logit, false);
  p.scale = scale;
  p.cosine = choice<bool>("similarity", similarity, {{"cosine", true}, {"dot", false}});
  p.ignore_index = ignore_index;
  p.rounding = choice<Rounding>(
      "rounding", rounding,
      {{"none", Rounding::none}, {"float16", Rounding::to_float16}, {"bfloat16", Rounding::to_bfloat16}});
  p.reduction = choice<Reduction>("reduction", reduction,
                                  {{"none", Reduction::none}, {"mean", Reduction::mean}, {"sum", Reduction::sum}});
  p.grad_loss = vector("grad_loss", grad_loss, false);

  const int64_t B = p.input.rows, C = p.weight.rows, D = p.input.cols;
  const int64_t S = p.all_classes ? C : p.class_ids.size;
  expect(p.weight.cols == D, "weight", "as many columns as input");
  expect(p.target.size == B, "target", "one entry for each row of input");
  const auto expect_size = [](const Vector& v, const char* name, int64_t size, bool given) {
    expect(!given || v.size == size, name, std::to_string(size) + " entries");
  };
  expect_size(p.log_expected_count, "log_expected_count", S, !log_expected_count.is_none());
  expect_size(p.target_log_expected_count, "target_log_expected_count", B, !target_log_expected_count.is_none());
  expect_size(p.bias, "bias", C, !bias.is_none());
  expect_size(p.entry_labels, "entry_labels", S, !entry_labels.is_none());
  expect_size(p.target_labels, "target_labels", B, !target_labels.is_none());
  expect_size(p.target_logit, "target_logit", B, !target_logit.is_none());
  expect(target_logit.is_none() || p.reduction == Reduction::none, "reduction", "none where target_logit is given");
  expect_size(p.grad_loss, "grad_loss", B, !grad_loss.is_none());

  SampledSoftmaxResult result;
  const DType accumulating = p.input.dtype == DType::float64 ? DType::float64 : DType::float32;
  result.capacity = p.all_classes ? C : !entry_labels.is_none() ? S + B : std::min(S + B, C);
  result.loss = output("loss", loss, accumulating, p.reduction == Reduction::none ? B : 1);
  result.grad_input = output("grad_input", grad_input, accumulating, B * D);
  result.grad_rows = output("grad_rows", grad_rows, accumulating, result.capacity * D);
  result.row_ids = static_cast<int64_t*>(output("row_ids", row_ids, DType::int64, p.all_classes ? 0 : result.capacity));
  if (p.all_classes) result.row_ids = nullptr;
  result.grad_bias = output("grad_bias", grad_bias, accumulating, result.capacity);
  result.grad_scale = static_cast<double*>(output("grad_scale", grad_scale, DType::float64, 1));

  const py::gil_scoped_release release;
  return sampled_softmax(p, result, threads);
}

// A matrix that is changed row by row, and the rows that come for it.
void expect_state(const std::string& name, const Matrix& state) {
  expect(state.dtype == DType::float32 || state.dtype == DType::float64, name, "float32 or float64");
}

void expect_rows(const Matrix& rows, const Matrix& state, const std::string& state_name, const Vector& class_ids) {
  expect(rows.dtype == state.dtype || size_of(rows.dtype) == 2, "rows", state_name + "'s dtype or a 16-bit one");
  expect(rows.cols == state.cols, "rows", "as many columns as " + state_name);
  expect(class_ids.size == rows.rows, "class_ids", "one entry for each row");
}

void run_scatter_add(const py::object& out, const py::object& class_ids, const py::object& rows,
                     const py::object& scale, int threads) {
  const Matrix to = matrix("out", out), from = matrix("rows", rows);
  const Vector ids = vector("class_ids", class_ids, true), factors = vector("scale", scale, false);
  expect_state("out", to);
  expect_rows(from, to, "out", ids);
  expect(scale.is_none() || factors.size == from.rows, "scale", "one entry for each row");
  const py::gil_scoped_release release;
  scatter_add(to, ids, from, factors, threads);
}

void run_scale_to_bfloat16(const py::object& values, double factor, const py::object& out, int threads) {
  const DLTensor from = fields_of("values", values);
  int64_t n = 1;
  for (int d = 0; d < from.ndim; ++d) n *= from.shape[d];
  const auto* numbers = static_cast<const float*>(output("values", values, DType::float32, n));
  auto* to = static_cast<uint16_t*>(output("out", out, DType::bfloat16, n));
  const py::gil_scoped_release release;
  scale_to_bfloat16(numbers, n, float(factor), to, threads);
}

BitVectors bit_vectors(const char* name, const py::handle& tensor, int64_t num_bits) {
  constexpr int kUnsigned = 1;
  const DLTensor t = fields_of(name, tensor);
  expect(t.ndim == 2 && t.dtype.code == kUnsigned && t.dtype.bits == 8, name, "a matrix of uint8");
  expect(t.shape[1] == (num_bits + 7) / 8 && (t.shape[1] <= 1 || t.strides[1] == 1), name,
         std::to_string((num_bits + 7) / 8) + " bytes side by side for each query");
  return {static_cast<const uint8_t*>(t.data), t.shape[0], t.strides[0]};
}

void run_xor_rows(const py::object& table, const py::object& bits, const py::object& answers, int threads) {
  const Matrix rows = matrix("table", table);
  expect(rows.cols <= 1 || rows.col_stride == 1, "table", "rows whose elements lie side by side");
  const BitVectors queries = bit_vectors("bits", bits, rows.rows);
  void* const to = output("answers", answers, rows.dtype, queries.rows * rows.cols);
  const py::gil_scoped_release release;
  xor_rows(rows, queries, to, threads);
}

void run_row_momentum_step(const py::object& weight, const py::object& velocity, const py::object& class_ids,
                           const py::object& rows, double lr, double momentum, double weight_decay, bool nesterov,
                           int threads) {
  RowMomentum step;
  step.weight = matrix("weight", weight);
  if (!velocity.is_none()) step.velocity = matrix("velocity", velocity);
  step.class_ids = vector("class_ids", class_ids, true);
  step.rows = matrix("rows", rows);
  step.lr = lr;
  step.momentum = momentum;
  step.weight_decay = weight_decay;
  step.nesterov = nesterov;
  expect_state("weight", step.weight);
  expect_rows(step.rows, step.weight, "weight", step.class_ids);
  if (velocity.is_none()) {
    expect(momentum == 0, "velocity", "a tensor, as momentum is not 0");
  } else {
    expect(step.velocity.dtype == step.weight.dtype, "velocity", "weight's dtype");
    expect(step.velocity.rows == step.weight.rows && step.velocity.cols == step.weight.cols, "velocity",
           "weight's shape");
  }
  const py::gil_scoped_release release;
  row_momentum_step(step, threads);
}

void run_row_adam_step(const py::object& weight, const py::object& exp_avg, const py::object& exp_avg_sq,
                       const py::object& row_steps, const py::object& class_ids, const py::object& rows, double lr,
                       double beta1, double beta2, double eps, double weight_decay, int threads) {
  RowAdam step;
  step.weight = matrix("weight", weight);
  step.exp_avg = matrix("exp_avg", exp_avg);
  step.exp_avg_sq = matrix("exp_avg_sq", exp_avg_sq);
  step.row_steps = vector("row_steps", row_steps, true);
  step.class_ids = vector("class_ids", class_ids, true);
  step.rows = matrix("rows", rows);
  step.lr = lr;
  step.beta1 = beta1;
  step.beta2 = beta2;
  step.eps = eps;
  step.weight_decay = weight_decay;
  expect_state("weight", step.weight);
  expect_rows(step.rows, step.weight, "weight", step.class_ids);
  for (const Matrix* m : {&step.exp_avg, &step.exp_avg_sq}) {
    const char* const name = m == &step.exp_avg ? "exp_avg" : "exp_avg_sq";
    expect(m->dtype == step.weight.dtype, name, "weight's dtype");
    expect(m->rows == step.weight.rows && m->cols == step.weight.cols, name, "weight's shape");
  }
  expect(step.row_steps.size == step.weight.rows, "row_steps", "an entry for each row of weight");
  const py::gil_scoped_release release;
  row_adam_step(step, threads);
}

LazyMomentum lazy_momentum(const py::object& weight, const py::object& velocity, const py::object& stepped, int64_t now,
                           double lr, double momentum) {
  LazyMomentum table;
  table.weight = matrix("weight", weight);
  table.velocity = matrix("velocity", velocity);
  table.stepped = vector("stepped", stepped, true);
  table.lr = lr;
  table.momentum = momentum;
  table.now = now;
  for (const Matrix* m : {&table.weight, &table.velocity}) {
    const char* const name = m == &table.weight ? "weight" : "velocity";
    expect(m->dtype == DType::float32 && m->col_stride == 1, name, "float32 rows whose elements lie side by side");
    expect(m->rows == table.weight.rows && m->cols == table.weight.cols, name, "weight's shape");
  }
  expect(table.stepped.size == table.weight.rows, "stepped", "an entry for each row");
  expect(momentum >= 0 && momentum < 1, "momentum", "a number in [0, 1)");
  return table;
}

// The rows that are read or that come for a step.
Matrix lazy_rows(const char* name, const py::object& rows, const LazyMomentum& table, const Vector& class_ids) {
  const Matrix m = matrix(name, rows);
  expect(m.dtype == DType::float32 && m.col_stride == 1, name, "float32 rows whose elements lie side by side");
  expect(m.rows == class_ids.size && m.cols == table.weight.cols, name, "a row of weight's length for each id");
  return m;
}

void run_lazy_momentum_read(const py::object& weight, const py::object& velocity, const py::object& stepped,
                            int64_t now, double lr, double momentum, const py::object& class_ids, const py::object& out,
                            int threads) {
  const LazyMomentum table = lazy_momentum(weight, velocity, stepped, now, lr, momentum);
  const Vector ids = vector("class_ids", class_ids, true);
  const Matrix to = lazy_rows("out", out, table, ids);
  const py::gil_scoped_release release;
  lazy_momentum_read(table, ids, to, threads);
}

bool run_lazy_momentum_step(const py::object& weight, const py::object& velocity, const py::object& stepped,
                            int64_t now, double lr, double momentum, const py::object& class_ids,
                            const py::object& rows, int threads) {
  const LazyMomentum table = lazy_momentum(weight, velocity, stepped, now, lr, momentum);
  const Vector ids = vector("class_ids", class_ids, true);
  const Matrix from = lazy_rows("rows", rows, table, ids);
  const py::gil_scoped_release release;
  return lazy_momentum_step(table, ids, from, threads);
}

void add_gpu_launch(GpuLaunches& launches, uint64_t function, const std::array<unsigned, 3>& grid, unsigned threads,
                    unsigned shared, const std::vector<std::tuple<int, int, int64_t>>& parameters) {
  std::vector<GpuLaunches::Parameter> found;
  for (const auto& [bytes, source, value] : parameters) {
    expect(bytes == 4 || bytes == 8, "parameters", "4 or 8 bytes each");
    found.push_back({bytes, source, value});
  }
  launches.add(function, grid, threads, shared, found);
}

// memories: tensors on the device, and None for those that no kernel reads.
void run_gpu_launches(GpuLaunches& launches, uint64_t stream, double factor, const py::args& memories) {
  const DLPackExchangeAPI& api = exchange_api();
  std::vector<uint64_t> addresses;
  addresses.reserve(memories.size());
  for (const py::handle& memory : memories) {
    DLTensor fields{};
    if (!memory.is_none() && api.dltensor_from_py_object_no_sync(memory.ptr(), &fields) != 0) {
      throw py::error_already_set();
    }
    addresses.push_back(reinterpret_cast<uint64_t>(fields.data) + fields.byte_offset);
  }
  launches.run(stream, factor, addresses);
}

}  // namespace
}  // namespace fedss

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ kernels. Internal: fedss_kernels' functions check and explain what these only refuse.";
  using py::arg;
  m.def("scale_to_bfloat16", &fedss::run_scale_to_bfloat16, arg("values"), arg("factor"), arg("out"),
        arg("threads") = 1);
  m.def("instruction_sets", &fedss::instruction_sets, "Names of the instruction sets that this machine can run.");
  m.def("instruction_set", [] { return std::string(fedss::current_kernels().name); }, "The one in use.");
  m.def("use_instruction_set", &fedss::use_instruction_set, arg("name"));
  m.def("fma_peak", &fedss::fma_peak, arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("sampled_softmax", &fedss::run_sampled_softmax, arg("input"), arg("weight"), arg("target"), arg("class_ids"),
        arg("log_expected_count"), arg("target_log_expected_count"), arg("bias"), arg("scale"), arg("similarity"),
        arg("ignore_index"), arg("rounding"), arg("reduction"), arg("grad_loss") = py::none(), arg("loss") = py::none(),
        arg("grad_input") = py::none(), arg("grad_rows") = py::none(), arg("row_ids") = py::none(),
        arg("grad_bias") = py::none(), arg("grad_scale") = py::none(), arg("threads") = 1,
        arg("entry_labels") = py::none(), arg("target_labels") = py::none(), arg("target_logit") = py::none());
  m.def("scatter_add", &fedss::run_scatter_add, arg("out"), arg("class_ids"), arg("rows"), arg("scale"),
        arg("threads") = 1);
  m.def("xor_rows", &fedss::run_xor_rows, arg("table"), arg("bits"), arg("answers"), arg("threads") = 1);
  m.def("row_momentum_step", &fedss::run_row_momentum_step, arg("weight"), arg("velocity"), arg("class_ids"),
        arg("rows"), arg("lr"), arg("momentum"), arg("weight_decay"), arg("nesterov"), arg("threads") = 1);
  m.def("row_adam_step", &fedss::run_row_adam_step, arg("weight"), arg("exp_avg"), arg("exp_avg_sq"), arg("row_steps"),
        arg("class_ids"), arg("rows"), arg("lr"), arg("beta1"), arg("beta2"), arg("eps"), arg("weight_decay"),
        arg("threads") = 1);
  m.def("lazy_momentum_read", &fedss::run_lazy_momentum_read, arg("weight"), arg("velocity"), arg("stepped"),
        arg("now"), arg("lr"), arg("momentum"), arg("class_ids"), arg("out"), arg("threads") = 1);
  m.def("lazy_momentum_step", &fedss::run_lazy_momentum_step, arg("weight"), arg("velocity"), arg("stepped"),
        arg("now"), arg("lr"), arg("momentum"), arg("class_ids"), arg("rows"), arg("threads") = 1);
  py::class_<fedss::GpuLaunches>(m, "GpuLaunches")
      .def(py::init<const std::string&>(), arg("library") = "libcuda.so.1")
      .def("add", &fedss::add_gpu_launch, arg("function"), arg("grid"), arg("threads"), arg("shared"),
           arg("parameters"), "Each parameter: (bytes, source, value), see gpu_launches.hpp.")
      .def("run", &fedss::run_gpu_launches, arg("stream"), arg("factor"));
}
