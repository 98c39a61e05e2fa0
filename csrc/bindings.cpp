// Argument checks and the Python module `fedss_kernels._C`; no arithmetic.
//
// Tensors arrive as Python objects and are asked for pointer, shape, strides and dtype, as Python would ask them: no
// torch header, so one build serves every torch. Shapes are checked here, so that no kernel can leave a tensor's
// memory.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "row_momentum.hpp"
#include "sampled_softmax.hpp"
#include "scatter_add.hpp"

namespace py = pybind11;

namespace fedss {
namespace {

DType dtype_of(const std::string& name, const py::handle& tensor) {
  static const struct {
    const char* name;
    DType dtype;
  } kNames[] = {{"torch.float32", DType::float32},
                {"torch.float64", DType::float64},
                {"torch.float16", DType::float16},
                {"torch.bfloat16", DType::bfloat16},
                {"torch.int64", DType::int64}};
  const std::string dtype = py::str(tensor.attr("dtype"));
  for (const auto& known : kNames) {
    if (dtype == known.name) return known.dtype;
  }
  throw py::type_error(name + ": expected a floating or int64 tensor, got " + dtype);
}

void* address_of(const py::handle& tensor) {
  return reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
}

void expect(bool holds, const std::string& name, const std::string& expected) {
  if (!holds) throw py::value_error(name + ": expected " + expected);
}

bool floating(DType dtype) { return dtype != DType::int64; }

void expect_dims(const std::string& name, const py::handle& tensor, int64_t dims) {
  expect(tensor.attr("device").attr("type").cast<std::string>() == "cpu", name, "a CPU tensor");
  expect(tensor.attr("dim")().cast<int64_t>() == dims, name, std::to_string(dims) + " dimensions");
}

Matrix matrix(const std::string& name, const py::handle& tensor) {
  expect_dims(name, tensor, 2);
  const py::tuple shape = tensor.attr("shape"), stride = tensor.attr("stride")();
  const DType dtype = dtype_of(name, tensor);
  expect(floating(dtype), name, "a floating tensor");
  return {address_of(tensor),        dtype,
          shape[0].cast<int64_t>(),  shape[1].cast<int64_t>(),
          stride[0].cast<int64_t>(), stride[1].cast<int64_t>()};
}

Vector vector(const std::string& name, const py::handle& tensor, bool of_ids) {
  if (tensor.is_none()) return {};
  expect_dims(name, tensor, 1);
  const py::tuple shape = tensor.attr("shape"), stride = tensor.attr("stride")();
  const DType dtype = dtype_of(name, tensor);
  expect(floating(dtype) != of_ids, name, of_ids ? "an int64 tensor" : "a floating tensor");
  return {address_of(tensor), dtype, shape[0].cast<int64_t>(), stride[0].cast<int64_t>()};
}

// Where a result goes: contiguous, of the given type and at least the given size.
void* output(const std::string& name, const py::handle& tensor, DType dtype, int64_t elements) {
  if (tensor.is_none()) return nullptr;
  expect(dtype_of(name, tensor) == dtype && tensor.attr("is_contiguous")().cast<bool>() &&
             tensor.attr("numel")().cast<int64_t>() >= elements,
         name, "a contiguous tensor of the accumulating type with " + std::to_string(elements) + " elements");
  return address_of(tensor);
}

template <class T>
T choice(const std::string& name, const std::string& value, std::initializer_list<std::pair<const char*, T>> choices) {
  for (const auto& [known, meaning] : choices) {
    if (value == known) return meaning;
  }
  throw py::value_error(name + ": unknown value " + value);
}

void run_sampled_softmax(const py::object& input, const py::object& weight, const py::object& target,
                         const py::object& class_ids, const py::object& log_expected_count,
                         const py::object& target_log_expected_count, const py::object& bias, double scale,
                         const std::string& similarity, int64_t ignore_index, const std::string& rounding,
                         const std::string& reduction, const py::object& grad_loss, const py::object& loss,
                         const py::object& grad_input, const py::object& grad_rows, const py::object& row_ids,
                         const py::object& grad_bias, const py::object& grad_scale, int threads) {
  SampledSoftmax p;
  p.input = matrix("input", input);
  p.weight = matrix("weight", weight);
  p.target = vector("target", target, true);
  p.class_ids = vector("class_ids", class_ids, true);
  p.all_classes = class_ids.is_none();
  p.log_expected_count = vector("log_expected_count", log_expected_count, false);
  p.target_log_expected_count = vector("target_log_expected_count", target_log_expected_count, false);
  p.bias = vector("bias", bias, false);
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
  expect_size(p.grad_loss, "grad_loss", B, !grad_loss.is_none());

  SampledSoftmaxResult result;
  const DType accumulating = p.input.dtype == DType::float64 ? DType::float64 : DType::float32;
  result.capacity = p.all_classes ? C : std::min(S + B, C);
  result.loss = output("loss", loss, accumulating, p.reduction == Reduction::none ? B : 1);
  result.grad_input = output("grad_input", grad_input, accumulating, B * D);
  result.grad_rows = output("grad_rows", grad_rows, accumulating, result.capacity * D);
  result.row_ids = static_cast<int64_t*>(output("row_ids", row_ids, DType::int64, p.all_classes ? 0 : result.capacity));
  if (p.all_classes) result.row_ids = nullptr;
  result.grad_bias = output("grad_bias", grad_bias, accumulating, result.capacity);
  result.grad_scale = static_cast<double*>(output("grad_scale", grad_scale, DType::float64, 1));

  const py::gil_scoped_release release;
  sampled_softmax(p, result, threads);
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

}  // namespace
}  // namespace fedss

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ kernels. Internal: fedss_kernels' functions check and explain what these only refuse.";
  using py::arg;
  m.def("sampled_softmax", &fedss::run_sampled_softmax, arg("input"), arg("weight"), arg("target"), arg("class_ids"),
        arg("log_expected_count"), arg("target_log_expected_count"), arg("bias"), arg("scale"), arg("similarity"),
        arg("ignore_index"), arg("rounding"), arg("reduction"), py::kw_only(), arg("grad_loss") = py::none(),
        arg("loss") = py::none(), arg("grad_input") = py::none(), arg("grad_rows") = py::none(),
        arg("row_ids") = py::none(), arg("grad_bias") = py::none(), arg("grad_scale") = py::none(), arg("threads") = 1);
  m.def("scatter_add", &fedss::run_scatter_add, arg("out"), arg("class_ids"), arg("rows"), arg("scale"),
        arg("threads") = 1);
  m.def("row_momentum_step", &fedss::run_row_momentum_step, arg("weight"), arg("velocity"), arg("class_ids"),
        arg("rows"), arg("lr"), arg("momentum"), arg("weight_decay"), arg("nesterov"), arg("threads") = 1);
}
