#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/bins_block.h"
#include "kernels.h"

namespace skillfast {
namespace {

struct Atomic {
  __host__ __device__ static void add(int32_t* at, int32_t value) {
#ifdef __CUDA_ARCH__
    atomicAdd(at, value);
#else
    *at += value;
#endif
  }
};

template <typename T>
struct Reader {
  const T* x;
  __host__ __device__ float operator()(int64_t at) const { return static_cast<float>(x[at]); }
};

// Activations of the next tile are on their way, and its payload is read, while one is counted.
template <typename T, bool kShared>
__global__ void __launch_bounds__(1024, 1) bins_kernel(BinsArgs args, bins_block::Shape shape) {
  extern __shared__ int32_t memory[];
  bins_block::Block<Atomic, kShared> block{args, shape, static_cast<int64_t>(blockIdx.x) * shape.neurons, memory};
  const Reader<T> read{static_cast<const T*>(args.x)};
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t tiles = (args.n + shape.rows - 1) / shape.rows;
  block.begin(thread);
  block.read_payload(thread, 0);
  float value = block.value_of(thread, 0, read);
  __syncthreads();
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const float next = block.value_of(thread, tile + 1, read);
    block.read_payload(thread, tile + 1);
    block.count(thread, tile, value);
    value = next;
    __syncthreads();
  }
  block.end(thread);
}

template <typename T>
cudaError_t launch(const BinsArgs& args, cudaStream_t stream) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const bins_block::Shape shape = bins_block::shape_of(args, most);
  const auto kernel = shape.shared ? bins_kernel<T, true> : bins_kernel<T, false>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error != cudaSuccess) return error;
  const int64_t blocks = (args.width + shape.neurons - 1) / shape.neurons;
  kernel<<<static_cast<unsigned>(blocks), shape.threads, shape.bytes, stream>>>(args, shape);
  return cudaGetLastError();
}

}  // namespace

const char* bins_update_cuda(const BinsArgs& args, void* stream) {
  if (args.n == 0 || args.width == 0) return nullptr;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  switch (args.dtype) {
    case DType::float32:
      error = launch<float>(args, on);
      break;
    case DType::bfloat16:
      error = launch<__nv_bfloat16>(args, on);
      break;
    case DType::float16:
      error = launch<__half>(args, on);
      break;
    case DType::float64:
      error = launch<double>(args, on);
      break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace skillfast
