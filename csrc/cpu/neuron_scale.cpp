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
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / args.tokens, token = row % args.tokens;
    const int64_t condition = args.condition == nullptr ? 0 : args.condition[sample];
    const S* shift = static_cast<const S*>(args.shift);
    scale_row<T, S>(static_cast<const T*>(args.x) + sample * args.stride_batch + token * args.stride_token,
                    static_cast<const S*>(args.scale) + condition * args.width,
                    shift == nullptr ? nullptr : shift + condition * args.width,
                    static_cast<T*>(args.out) + row * args.width, args.width);
  }
}

}  // namespace

void neuron_scale_rows(const NeuronScaleArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::float32:
      return scale_rows<float, float>(args, begin, end);
    case DType::bfloat16:
      return scale_rows<bf16, float>(args, begin, end);
    case DType::float16:
      return scale_rows<half, float>(args, begin, end);
    case DType::float64:
      return scale_rows<double, double>(args, begin, end);
  }
}

}  // namespace skillfast::SKILLFAST_ISA
