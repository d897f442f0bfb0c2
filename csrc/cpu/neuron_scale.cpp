#include "cpu/isa.h"

namespace skillfast::SKILLFAST_ISA {
namespace {

template <typename T, typename S>
void scale_row(const T* __restrict x, const S* __restrict scale, const S* __restrict shift, T* __restrict out,
               int64_t width) {
  if (shift == nullptr) {
    for (int64_t d = 0; d < width; ++d) {
      const S factor = scale[d];
      const S value = to_float(x[d]) * factor;
      out[d] = from_float<T>(factor == S(0) ? S(0) : value);
    }
    return;
  }
  for (int64_t d = 0; d < width; ++d) {
    const S factor = scale[d];
    const S value = to_float(x[d]) * factor;
    out[d] = from_float<T>((factor == S(0) ? S(0) : value) + shift[d]);
  }
}

template <typename T, typename S>
void scale_rows(const NeuronScaleArgs& args, int64_t begin, int64_t end) {
  const Flow& flow = args.flow;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / flow.tokens, token = row % flow.tokens;
    const int64_t condition = args.condition == nullptr ? 0 : args.condition[sample];
    const S* shift = static_cast<const S*>(args.shift);
    scale_row<T, S>(static_cast<const T*>(flow.x) + sample * flow.stride_batch + token * flow.stride_token,
                    static_cast<const S*>(args.scale) + condition * flow.width,
                    shift == nullptr ? nullptr : shift + condition * flow.width,
                    static_cast<T*>(flow.out) + row * flow.width, flow.width);
  }
}

}  // namespace

void neuron_scale_rows(const NeuronScaleArgs& args, int64_t begin, int64_t end) {
  by_type(args.flow.dtype, [&](auto x, auto s) { scale_rows<decltype(x), decltype(s)>(args, begin, end); });
}

}  // namespace skillfast::SKILLFAST_ISA
