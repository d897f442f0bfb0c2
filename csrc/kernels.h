// One flat declaration per op. Addresses and sizes in, no torch, no Python.
#pragma once
#include <cstdint>

namespace skillfast {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// out[b, t, d] = x[b, t, d] * scale[condition[b], d] + shift[condition[b], d]; scale 0 removes even a non-finite x.
struct NeuronScaleArgs {
  const void* x;  // [batch, tokens, width], unit stride in the last dimension
  int64_t stride_batch, stride_token;
  int64_t batch, tokens, width;
  const void* scale;         // [conditions, width], contiguous; float64 with a float64 x, else float32
  const void* shift;         // like scale, or null
  const int64_t* condition;  // [batch], or null: every sample uses row 0
  void* out;                 // [batch, tokens, width], contiguous, of x's dtype
  DType dtype;
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
  double* sum_xy;      // [columns, width]
  DType dtype;
};

// Counts n rows of x into the cell table of each neuron. A neuron's table is [cells, counts] then [cells, weights].
struct CellsArgs {
  const void* x;  // [n, width], unit stride in the last dimension
  int64_t stride_row;
  int64_t n, width;
  int64_t cells, metrics, counts, weights;  // cells in [2, 256]; weights a multiple of 8
  const float* edges;                       // [width, cells - 1], ascending
  const int16_t* channels;                  // [n, metrics]: which of `counts` each metric's row adds one to, -1: none
  const int16_t* hats;                      // [n, weights]
  int32_t* table;                           // [width, cells * (counts + weights)]
  DType dtype;
};

// CPU ops: the widest instruction set that the processor has, on n_threads of the process's OpenMP threads.
void neuron_scale(const NeuronScaleArgs& args, int n_threads);
void comoments_update(const CoMomentsArgs& args, int n_threads);
void cells_update(const CellsArgs& args, int n_threads);

const char* cpu_isa();               // "baseline", "avx2" or "avx512"
bool set_cpu_isa(const char* name);  // for tests; false where it was not built or the processor lacks it
const char* cpu_threads_runtime();   // "openmp" where the process already runs one, else "std"

#ifdef SKILLFAST_HAS_CUDA
// Runs on `stream` of `device`; returns null, or CUDA's message for what failed.
const char* neuron_scale_cuda(const NeuronScaleArgs& args, int device, void* stream);
#endif

}  // namespace skillfast
