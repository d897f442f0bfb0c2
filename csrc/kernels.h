// One flat declaration per op. Addresses and sizes in, no torch, no Python.
#pragma once
#include <cstdint>

namespace skillfast {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// Where activations are read and where they are written.
struct Flow {
  const void* x;  // [batch, tokens, width], unit stride in the last dimension
  int64_t stride_batch, stride_token;
  int64_t batch, tokens, width;
  void* out;  // [batch, tokens, width], contiguous, of x's dtype; null where an op need not write
  DType dtype;
};

// out[b, t, d] = x[b, t, d] * scale[condition[b], d] + shift[condition[b], d]; scale 0 removes even a non-finite x.
struct NeuronScaleArgs {
  Flow flow;
  const void* scale;         // [conditions, width], contiguous; float64 with a float64 x, else float32
  const void* shift;         // like scale, or null
  const int64_t* condition;  // [batch], or null: every sample uses row 0
};

enum class Activation : int { identity = 0, gelu = 1, gelu_tanh = 2, relu = 3, silu = 4 };
enum class Pool : int { none = 0, mean = 1, cls = 2, max = 3, last = 4, moments = 5 };

// Neurons of one sample that a thread captures at a time. Rows cut into strips are read at half the speed or less, so
// this is the width of most models' rows, not that of the first cache.
constexpr int64_t kActPanel = 4096;
constexpr int64_t kAccumulatePanel = 1024;  // at most, where all samples pass a strip of neurons

// out = act(x), and its tokens pooled as they were rounded.
struct ActPoolArgs {
  Flow flow;
  Activation activation;
  Pool pool;
  const uint8_t* mask;  // [batch, tokens], 0: left out of the pooling; or null
  const void* center;   // [width], subtracted before `moments` are summed, or null; float64 with a float64 x
  void* pooled;         // [batch, width], for `moments` [2, batch, width]; float64 with a float64 x, else float32
};

// Adds the co-moments of n rows of x, shifted, against n rows of y.
struct CoMomentsArgs {
  const void* x;  // [n, width], unit stride in the last dimension
  int64_t stride_row;
  int64_t n, width, columns;
  const float* y;      // [n, columns], contiguous
  const float* shift;  // [width]: subtracted from x before anything is summed
  double* sum_x;       // [width]
  double* sum_xx;      // [width]
  double* sum_xy;      // [columns, width], stride_xy between columns
  int64_t stride_xy;
  DType dtype;
};

// Counts n rows of x into the bin table of each neuron. A neuron's table is [bins, counts] then [bins, weights].
struct BinsArgs {
  const void* x;  // [n, width], unit stride in the last dimension
  int64_t stride_row;
  int64_t n, width;
  int64_t bins, metrics, counts, weights;  // bins in [2, 256]; weights a multiple of 8
  const float* edges;                      // [width, bins - 1], ascending
  const int16_t* channels;                 // [n, metrics]: which of `counts` each metric's row adds one to, -1: none
  const int16_t* hats;                     // [n, weights]
  int32_t* table;                          // [width, bins * (counts + weights)]
  DType dtype;
};

// out = act(x), and each token that the mask leaves is a row that is added to the co-moments.
struct ActPoolAccumulateArgs {
  Flow flow;  // not float64
  Activation activation;
  const uint8_t* mask;  // [batch, tokens], 0: no observation; or null
  bool y_per_token;     // y is [batch, tokens, columns], else [batch, columns]
  CoMomentsArgs sums;   // its x, n and dtype are not used
};

// CPU ops: the widest instruction set that the processor has, on n_threads of the process's OpenMP threads.
void neuron_scale(const NeuronScaleArgs& args, int n_threads);
void comoments_update(const CoMomentsArgs& args, int n_threads);
void bins_update(const BinsArgs& args, int n_threads);
void act_mask_pool(const ActPoolArgs& args, int n_threads);
void act_pool_accumulate(const ActPoolAccumulateArgs& args, int n_threads);

const char* cpu_isa();               // "baseline", "avx2" or "avx512"
bool set_cpu_isa(const char* name);  // for tests; false where it was not built or the processor lacks it
const char* cpu_threads_runtime();   // "openmp" where the process already runs one, else "std"

#ifdef SKILLFAST_HAS_CUDA
// Runs on `stream` of the current device; returns null, or CUDA's message for what failed.
const char* neuron_scale_cuda(const NeuronScaleArgs& args, void* stream);
const char* bins_update_cuda(const BinsArgs& args, void* stream);
#endif

}  // namespace skillfast
