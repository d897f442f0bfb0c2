#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels.h"

namespace skillfast {
namespace {

__device__ inline float to_float(float value) { return value; }
__device__ inline double to_float(double value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ inline T from_float(float value) {
  return static_cast<T>(value);
}
template <typename T>
__device__ inline T from_float(double value) {
  return static_cast<T>(value);
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

constexpr int kThreads = 256;
constexpr int kBytes = 16;  // what one thread reads and writes at a time

template <typename T, int n>
struct alignas(sizeof(T) * n) Pack {
  T values[n];
};

// Values that lie one after the other, kBytes at a time where they are that many.
template <typename S, int n>
__device__ inline Pack<S, n> load(const S* from) {
  constexpr int each = n * sizeof(S) < kBytes ? n : kBytes / sizeof(S);
  Pack<S, n> found;
#pragma unroll
  for (int i = 0; i < n; i += each) {
    reinterpret_cast<Pack<S, each>*>(found.values + i)[0] = *reinterpret_cast<const Pack<S, each>*>(from + i);
  }
  return found;
}

// One block row per (sample, token), n neurons a thread: scale and shift are read once per row from cache.
template <typename T, typename S, int n>
__global__ void scale_kernel(NeuronScaleArgs args) {
  const Flow& flow = args.flow;
  const unsigned row = blockIdx.x, tokens = static_cast<unsigned>(flow.tokens);  // a division of 64 bits is slow
  const int64_t sample = row / tokens, token = row % tokens;
  const int64_t condition = args.condition == nullptr ? 0 : args.condition[sample];
  const T* x = static_cast<const T*>(flow.x) + sample * flow.stride_batch + token * flow.stride_token;
  const S* scale = static_cast<const S*>(args.scale) + condition * flow.width;
  const S* shift = args.shift == nullptr ? nullptr : static_cast<const S*>(args.shift) + condition * flow.width;
  T* out = static_cast<T*>(flow.out) + static_cast<int64_t>(row) * flow.width;
  for (int64_t d = static_cast<int64_t>(threadIdx.x) * n; d < flow.width; d += kThreads * n) {
    Pack<T, n> pack = *reinterpret_cast<const Pack<T, n>*>(x + d);
    const Pack<S, n> factors = load<S, n>(scale + d);
    Pack<S, n> shifts = {};
    if (shift != nullptr) shifts = load<S, n>(shift + d);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      S value = factors.values[i] == S(0) ? S(0) : to_float(pack.values[i]) * factors.values[i];
      if (shift != nullptr) value += shifts.values[i];
      pack.values[i] = from_float<T>(value);
    }
    *reinterpret_cast<Pack<T, n>*>(out + d) = pack;
  }
}

template <typename T, typename S>
void launch(const NeuronScaleArgs& args, cudaStream_t stream) {
  constexpr int n = kBytes / sizeof(T);
  const Flow& flow = args.flow;
  const unsigned rows = static_cast<unsigned>(flow.batch * flow.tokens);
  const bool aligned =
      flow.width % n == 0 && flow.stride_batch % n == 0 && flow.stride_token % n == 0 &&
      reinterpret_cast<uintptr_t>(flow.x) % kBytes == 0 && reinterpret_cast<uintptr_t>(args.scale) % kBytes == 0 &&
      reinterpret_cast<uintptr_t>(args.shift) % kBytes == 0 && reinterpret_cast<uintptr_t>(flow.out) % kBytes == 0;
  if (aligned) {
    scale_kernel<T, S, n><<<rows, kThreads, 0, stream>>>(args);
  } else {
    scale_kernel<T, S, 1><<<rows, kThreads, 0, stream>>>(args);
  }
}

}  // namespace

const char* neuron_scale_cuda(const NeuronScaleArgs& args, void* stream) {
  const int64_t rows = args.flow.batch * args.flow.tokens;
  if (rows == 0 || args.flow.width == 0) return nullptr;
  if (rows > 0x7fffffff) return "more than 2^31 - 1 rows in one call";
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (args.flow.dtype) {
    case DType::float32:
      launch<float, float>(args, cuda_stream);
      break;
    case DType::bfloat16:
      launch<__nv_bfloat16, float>(args, cuda_stream);
      break;
    case DType::float16:
      launch<__half, float>(args, cuda_stream);
      break;
    case DType::float64:
      launch<double, double>(args, cuda_stream);
      break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace skillfast
