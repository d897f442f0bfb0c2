// The only file that knows Python. Addresses come in as integers; the callers (skillfast/backends/native.py) have
// checked shapes, dtypes and strides.
#include <pybind11/pybind11.h>

#include "kernels.h"

namespace py = pybind11;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

skillfast::NeuronScaleArgs neuron_scale_args(uintptr_t x, int64_t stride_batch, int64_t stride_token, int64_t batch,
                                             int64_t tokens, int64_t width, uintptr_t scale, uintptr_t shift,
                                             uintptr_t condition, uintptr_t out, int dtype) {
  return {at<const void>(x),
          stride_batch,
          stride_token,
          batch,
          tokens,
          width,
          at<const void>(scale),
          at<const void>(shift),
          at<const int64_t>(condition),
          at<void>(out),
          static_cast<skillfast::DType>(dtype)};
}

skillfast::ActPoolArgs act_pool_args(uintptr_t x, int64_t stride_batch, int64_t stride_token, int64_t batch,
                                     int64_t tokens, int64_t width, int activation, int pool, uintptr_t scale,
                                     uintptr_t shift, uintptr_t condition, uintptr_t mask, uintptr_t center,
                                     uintptr_t out, uintptr_t pooled, int dtype) {
  return {neuron_scale_args(x, stride_batch, stride_token, batch, tokens, width, scale, shift, condition, out, dtype),
          static_cast<skillfast::Activation>(activation),
          static_cast<skillfast::Pool>(pool),
          at<const uint8_t>(mask),
          at<const void>(center),
          at<void>(pooled)};
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "skillfast's C++ and CUDA ops: addresses and sizes in. Use skillfast.ops.";

  m.def(
      "neuron_scale",
      [](uintptr_t x, int64_t stride_batch, int64_t stride_token, int64_t batch, int64_t tokens, int64_t width,
         uintptr_t scale, uintptr_t shift, uintptr_t condition, uintptr_t out, int dtype, int n_threads) {
        skillfast::neuron_scale(
            neuron_scale_args(x, stride_batch, stride_token, batch, tokens, width, scale, shift, condition, out, dtype),
            n_threads);
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "comoments_update",
      [](uintptr_t x, int64_t stride_row, int64_t n, int64_t width, int64_t columns, uintptr_t y, uintptr_t shift,
         uintptr_t sum_x, uintptr_t sum_xx, uintptr_t sum_xy, int dtype, int n_threads) {
        skillfast::comoments_update(
            {at<const void>(x), stride_row, n, width, columns, at<const float>(y), at<const float>(shift),
             at<double>(sum_x), at<double>(sum_xx), at<double>(sum_xy), width, static_cast<skillfast::DType>(dtype)},
            n_threads);
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "bins_update",
      [](uintptr_t x, int64_t stride_row, int64_t n, int64_t width, int64_t bins, int64_t metrics, int64_t counts,
         int64_t weights, uintptr_t edges, uintptr_t channels, uintptr_t hats, uintptr_t table, int dtype,
         int n_threads) {
        skillfast::bins_update({at<const void>(x), stride_row, n, width, bins, metrics, counts, weights,
                                 at<const float>(edges), at<const int16_t>(channels), at<const int16_t>(hats),
                                 at<int32_t>(table), static_cast<skillfast::DType>(dtype)},
                                n_threads);
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "act_mask_pool",
      [](uintptr_t x, int64_t stride_batch, int64_t stride_token, int64_t batch, int64_t tokens, int64_t width,
         int activation, int pool, uintptr_t scale, uintptr_t shift, uintptr_t condition, uintptr_t mask,
         uintptr_t center, uintptr_t out, uintptr_t pooled, int dtype, int n_threads) {
        skillfast::act_mask_pool(act_pool_args(x, stride_batch, stride_token, batch, tokens, width, activation, pool,
                                               scale, shift, condition, mask, center, out, pooled, dtype),
                                 n_threads);
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "act_pool_accumulate",
      [](uintptr_t x, int64_t stride_batch, int64_t stride_token, int64_t batch, int64_t tokens, int64_t width,
         int activation, int pool, uintptr_t scale, uintptr_t shift, uintptr_t condition, uintptr_t mask, uintptr_t out,
         int dtype, int64_t columns, uintptr_t y, bool y_per_token, uintptr_t center, uintptr_t sum_x, uintptr_t sum_xx,
         uintptr_t sum_xy, int64_t bins, int64_t metrics, int64_t counts, int64_t weights, uintptr_t edges,
         uintptr_t channels, uintptr_t hats, uintptr_t table, int n_threads) {
        skillfast::act_pool_accumulate(
            {act_pool_args(x, stride_batch, stride_token, batch, tokens, width, activation, pool, scale, shift,
                           condition, mask, 0, out, 0, dtype),
             at<const float>(y),
             y_per_token,
             {nullptr, 0, 0, width, columns, nullptr, at<const float>(center), at<double>(sum_x), at<double>(sum_xx),
              at<double>(sum_xy), width, skillfast::DType::float32},
             edges != 0,
             {nullptr, 0, 0, width, bins, metrics, counts, weights, at<const float>(edges),
              at<const int16_t>(channels), at<const int16_t>(hats), at<int32_t>(table), skillfast::DType::float32}},
            n_threads);
      },
      py::call_guard<py::gil_scoped_release>());

  m.def("cpu_isa", &skillfast::cpu_isa);
  m.def("set_cpu_isa", &skillfast::set_cpu_isa);
  m.def("cpu_threads_runtime", &skillfast::cpu_threads_runtime);

#ifdef SKILLFAST_HAS_CUDA
  m.attr("HAS_CUDA") = true;
  m.def("neuron_scale_cuda", [](uintptr_t x, int64_t stride_batch, int64_t stride_token, int64_t batch, int64_t tokens,
                                int64_t width, uintptr_t scale, uintptr_t shift, uintptr_t condition, uintptr_t out,
                                int dtype, int device, uintptr_t stream) {
    const char* error = nullptr;
    {
      py::gil_scoped_release release;
      error = skillfast::neuron_scale_cuda(
          neuron_scale_args(x, stride_batch, stride_token, batch, tokens, width, scale, shift, condition, out, dtype),
          device, at<void>(stream));
    }
    if (error != nullptr) throw std::runtime_error(std::string("neuron_scale on CUDA: ") + error);
  });
#else
  m.attr("HAS_CUDA") = false;
#endif
}
