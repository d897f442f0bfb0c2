// A row of activations: read, apply the activation, the condition's scale and shift, write, and leave what was written
// as floats for the pooling. Each step is a loop over a short row in cache, which compilers turn into vectors.
#pragma once
#include "cpu/isa.h"

namespace skillfast::SKILLFAST_ISA {

// Phi(x) - 1/2 and tanh(x) as x * P(x^2) / Q(x^2), fitted by reweighted least squares; off by at most 8e-9 and 2e-8,
// in float32 arithmetic by 2e-7 and 4e-7. Beyond the limits both are constant.
static inline float phi(float x) {
  const float t = x * x;
  float p = 2.274936998e-08f, q = 1.197498921e-06f;
  p = p * t + 6.352048587e-06f, q = q * t + 7.364610642e-05f;
  p = p * t + 1.688220490e-04f, q = q * t + 1.884424497e-03f;
  p = p * t + 4.677238023e-03f, q = q * t + 2.864568666e-02f;
  p = p * t + 3.385234083e-02f, q = q * t + 2.515211534e-01f;
  p = p * t + 3.989422347e-01f, q = q * t + 1.0f;
  const float inside = x * p / q;
  return x > 5.5f ? 0.5f : (x < -5.5f ? -0.5f : inside);
}

static inline float tanh_of(float x) {
  const float t = x * x;
  float p = 1.409924611e-08f, q = 8.073619921e-07f;
  p = p * t + 2.112157235e-05f, q = q * t + 3.335690540e-04f;
  p = p * t + 3.525819424e-03f, q = q * t + 2.599113617e-02f;
  p = p * t + 1.340620618e-01f, q = q * t + 4.673951757e-01f;
  p = p * t + 9.999999455e-01f, q = q * t + 1.0f;
  const float inside = x * p / q;
  return x > 8.5f ? 1.0f : (x < -8.5f ? -1.0f : inside);
}

static inline double phi(double x) { return 0.5 * __builtin_erf(x * 0.7071067811865475244); }
static inline double tanh_of(double x) { return __builtin_tanh(x); }

template <Activation activation, typename S>
static inline S activated(S x) {
  if constexpr (activation == Activation::gelu) return x * (S(0.5) + phi(x));
  if constexpr (activation == Activation::gelu_tanh) {
    const S inner = S(0.7978845608028653559) * (x + S(0.044715) * x * x * x);
    return x * (S(0.5) + S(0.5) * tanh_of(inner));
  }
  if constexpr (activation == Activation::relu) return x < S(0) ? S(0) : x;
  if constexpr (activation == Activation::silu) return x * (S(0.5) + S(0.5) * tanh_of(S(0.5) * x));
  return x;
}

template <Activation activation, typename S>
static inline void activate_row(S* __restrict row, int64_t width) {
  if constexpr (activation == Activation::identity) return;
  for (int64_t d = 0; d < width; ++d) row[d] = activated<activation, S>(row[d]);
}

template <typename S>
static inline void activate(Activation activation, S* row, int64_t width) {
  switch (activation) {
    case Activation::identity:
      return;
    case Activation::gelu:
      return activate_row<Activation::gelu, S>(row, width);
    case Activation::gelu_tanh:
      return activate_row<Activation::gelu_tanh, S>(row, width);
    case Activation::relu:
      return activate_row<Activation::relu, S>(row, width);
    case Activation::silu:
      return activate_row<Activation::silu, S>(row, width);
  }
}

// Reads `width` neurons from d0 of one token, writes what flows on, and leaves it in `row` as written (rounded).
template <typename T, typename S>
static inline void flow_row(const ActPoolArgs& args, int64_t sample, int64_t token, int64_t d0, int64_t width,
                            S* __restrict row) {
  const NeuronScaleArgs& flow = args.flow;
  const T* __restrict x = static_cast<const T*>(flow.x) + sample * flow.stride_batch + token * flow.stride_token + d0;
  for (int64_t d = 0; d < width; ++d) row[d] = to_float(x[d]);
  activate(args.activation, row, width);
  if (flow.scale != nullptr) {
    const int64_t at = (flow.condition == nullptr ? 0 : flow.condition[sample]) * flow.width + d0;
    const S* __restrict scale = static_cast<const S*>(flow.scale) + at;
    for (int64_t d = 0; d < width; ++d) row[d] = scale[d] == S(0) ? S(0) : row[d] * scale[d];
    if (flow.shift != nullptr) {
      const S* __restrict shift = static_cast<const S*>(flow.shift) + at;
      for (int64_t d = 0; d < width; ++d) row[d] += shift[d];
    }
  }
  const bool changed = args.activation != Activation::identity || flow.scale != nullptr;
  if (flow.out == nullptr && (sizeof(T) == sizeof(S) || !changed)) return;
  T* __restrict out =
      flow.out == nullptr ? nullptr : static_cast<T*>(flow.out) + (sample * flow.tokens + token) * flow.width + d0;
  if (out != nullptr) {
    for (int64_t d = 0; d < width; ++d) out[d] = from_float<T>(row[d]);
  }
  if constexpr (sizeof(T) != sizeof(S)) {
    for (int64_t d = 0; d < width; ++d) row[d] = to_float(from_float<T>(row[d]));
  }
}

}  // namespace skillfast::SKILLFAST_ISA
