// The only file that knows Python. Addresses come in as integers: that is the cheapest call (ARCHITECTURE.md, The
// seam). The callers (skillfast/backends/native.py) have checked shapes, dtypes and strides.
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>

#include "kernels.h"

namespace py = pybind11;
using namespace skillfast;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A Flow as Python gives it: x, stride_batch, stride_token, batch, tokens, width, out, dtype.
using FlowTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, int>;

Flow flow_of(const FlowTuple& given) {
  const auto& [x, stride_batch, stride_token, batch, tokens, width, out, dtype] = given;
  return {at<const void>(x),        stride_batch, stride_token, batch, tokens, width, at<void>(out),
          static_cast<DType>(dtype)};
}

NeuronScaleArgs neuron_scale_args(const FlowTuple& flow, uintptr_t scale, uintptr_t shift, uintptr_t condition) {
  return {flow_of(flow), at<const void>(scale), at<const void>(shift), at<const int64_t>(condition)};
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "skillfast's C++ and CUDA ops: addresses and sizes in. Use skillfast.ops.";

  m.def(
      "neuron_scale",
      [](const FlowTuple& flow, uintptr_t scale, uintptr_t shift, uintptr_t condition, int n_threads) {
        neuron_scale(neuron_scale_args(flow, scale, shift, condition), n_threads);
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "comoments_update",
      [](uintptr_t x, int64_t stride_row, int64_t n, int64_t width, int64_t columns, uintptr_t y, uintptr_t shift,
         uintptr_t sum_x, uintptr_t sum_xx, uintptr_t sum_xy, int dtype, int n_threads) {
        comoments_update({at<const void>(x), stride_row, n, width, columns, at<const float>(y), at<const float>(shift),
                          at<double>(sum_x), at<double>(sum_xx), at<double>(sum_xy), width, static_cast<DType>(dtype)},
                         n_threads);
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "bins_update",
      [](uintptr_t x, int64_t stride_row, int64_t n, int64_t width, int64_t bins, int64_t metrics, int64_t counts,
         int64_t weights, uintptr_t edges, uintptr_t channels, uintptr_t hats, uintptr_t table, int dtype,
         int n_threads) {
        bins_update(
            {at<const void>(x), stride_row, n, width, bins, metrics, counts, weights, at<const float>(edges),
             at<const int16_t>(channels), at<const int16_t>(hats), at<int32_t>(table), static_cast<DType>(dtype)},
            n_threads);
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "act_mask_pool",
      [](const FlowTuple& flow, int activation, int pool, uintptr_t mask, uintptr_t center, uintptr_t pooled,
         int n_threads) {
        act_mask_pool({flow_of(flow), static_cast<Activation>(activation), static_cast<Pool>(pool),
                       at<const uint8_t>(mask), at<const void>(center), at<void>(pooled)},
                      n_threads);
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "act_pool_accumulate",
      [](const FlowTuple& flow, int activation, uintptr_t mask, bool y_per_token, int64_t columns, uintptr_t y,
         uintptr_t center, uintptr_t sum_x, uintptr_t sum_xx, uintptr_t sum_xy, int n_threads) {
        const Flow rows = flow_of(flow);
        const CoMomentsArgs sums = {nullptr,
                                    0,
                                    0,
                                    rows.width,
                                    columns,
                                    at<const float>(y),
                                    at<const float>(center),
                                    at<double>(sum_x),
                                    at<double>(sum_xx),
                                    at<double>(sum_xy),
                                    rows.width,
                                    DType::float32};
        act_pool_accumulate({rows, static_cast<Activation>(activation), at<const uint8_t>(mask), y_per_token, sums},
                            n_threads);
      },
      py::call_guard<py::gil_scoped_release>());

  m.def("cpu_isa", &cpu_isa);
  m.def("set_cpu_isa", &set_cpu_isa);
  m.def("cpu_threads_runtime", &cpu_threads_runtime);

#ifdef SKILLFAST_HAS_CUDA
  m.attr("HAS_CUDA") = true;
  m.def("neuron_scale_cuda",
        [](const FlowTuple& flow, uintptr_t scale, uintptr_t shift, uintptr_t condition, uintptr_t stream) {
          const char* error = nullptr;
          {
            py::gil_scoped_release release;
            error = neuron_scale_cuda(neuron_scale_args(flow, scale, shift, condition), at<void>(stream));
          }
          if (error != nullptr) throw std::runtime_error(std::string("neuron_scale on CUDA: ") + error);
        });
  m.def("bins_update_cuda", [](uintptr_t x, int64_t stride_row, int64_t n, int64_t width, int64_t bins, int64_t metrics,
                               int64_t counts, int64_t weights, uintptr_t edges, uintptr_t channels, uintptr_t hats,
                               uintptr_t table, int dtype, uintptr_t stream) {
    const char* error = nullptr;
    {
      py::gil_scoped_release release;
      error = bins_update_cuda(
          {at<const void>(x), stride_row, n, width, bins, metrics, counts, weights, at<const float>(edges),
           at<const int16_t>(channels), at<const int16_t>(hats), at<int32_t>(table), static_cast<DType>(dtype)},
          at<void>(stream));
    }
    if (error != nullptr) throw std::runtime_error(std::string("bins_update on CUDA: ") + error);
  });
#else
  m.attr("HAS_CUDA") = false;
#endif
}
