// An activation whose tokens go straight into the co-moments: one panel of neurons at a time passes all samples, and
// what it leaves is a few rows in cache, which the sums take from there.
#include "cpu/activation.h"

namespace skillfast::SKILLFAST_ISA {
namespace {

constexpr int kLanes = kAccumulatePanel;
constexpr int kRows = 32;             // observations collected before they are added
constexpr int kStride = kLanes + 16;  // not a power of two: a column of them must not fall into one cache set

// Tokens with a row of y each, collected until comoments_lanes takes them.
struct Observations {
  alignas(64) float x[kRows * kStride];
  int rows = 0;
  int64_t first = 0;  // its number, which is its row of y; rows of one batch follow each other

  void add_to(const CoMomentsArgs& state, int64_t d0, int width) {
    if (rows == 0) return;
    CoMomentsArgs sums = state;
    sums.x = x, sums.stride_row = kStride, sums.n = rows, sums.width = width;
    sums.y += first * sums.columns;
    sums.shift += d0, sums.sum_x += d0, sums.sum_xx += d0, sums.sum_xy += d0;
    sums.dtype = DType::float32;
    comoments_lanes(sums, 0, width);
    rows = 0;
  }
  // A row for observation `number`; what came before is added first where it does not fit or does not follow.
  float* next(const CoMomentsArgs& state, int64_t number, int64_t d0, int width) {
    if (rows == kRows || first + rows != number) add_to(state, d0, width);
    if (rows == 0) first = number;
    return x + kStride * rows++;
  }
};

// Tokens whose row of y is that of their sample: summed over the tokens first, multiplied once.
struct SampleSums {
  alignas(64) float sums[kLanes], squares[kLanes];
  alignas(64) double total[kLanes], total_squares[kLanes];
  int waiting = 0;

  explicit SampleSums(int width) {
    for (int d = 0; d < width; ++d) sums[d] = squares[d] = 0.0f, total[d] = total_squares[d] = 0.0;
  }

  void add(const float* __restrict row, const float* __restrict shift, int width) {
    for (int d = 0; d < width; ++d) {
      const float value = row[d] - shift[d];
      sums[d] += value;
      squares[d] += value * value;
    }
    if (++waiting == 16) flush(width);
  }
  void flush(int width) {
    for (int d = 0; d < width; ++d) {
      total[d] += static_cast<double>(sums[d]), total_squares[d] += static_cast<double>(squares[d]);
      sums[d] = squares[d] = 0.0f;
    }
    waiting = 0;
  }
  void add_to(const CoMomentsArgs& state, const float* y, int64_t d0, int width) {
    flush(width);
    for (int d = 0; d < width; ++d) {
      state.sum_x[d0 + d] += total[d];
      state.sum_xx[d0 + d] += total_squares[d];
    }
    for (int64_t m = 0; m < state.columns; ++m) {
      double* __restrict sum_xy = state.sum_xy + m * state.stride_xy + d0;
      const double value = static_cast<double>(y[m]);
      for (int d = 0; d < width; ++d) sum_xy[d] += value * total[d];
    }
  }
};

template <typename T>
void tokens_of_sample(const ActPoolAccumulateArgs& args, int64_t sample, int64_t d0, int width, Observations& seen) {
  const int64_t tokens = args.flow.tokens;
  alignas(64) float passing[kLanes];
  SampleSums sums(args.y_per_token ? 0 : width);
  bool any = false;
  for (int64_t token = 0; token < tokens; ++token) {
    const bool here = is_kept(args.mask, args.flow, sample, token);
    if (!here && args.flow.out == nullptr) continue;
    float* row = here && args.y_per_token ? seen.next(args.sums, sample * tokens + token, d0, width) : passing;
    flow_row<T, float>(args.flow, args.activation, sample, token, d0, width, row);
    if (!here) continue;
    if (!args.y_per_token) sums.add(row, args.sums.shift + d0, width);
    any = true;
  }
  if (any && !args.y_per_token) sums.add_to(args.sums, args.sums.y + sample * args.sums.columns, d0, width);
}

template <typename T>
void lanes(const ActPoolAccumulateArgs& args, int64_t begin, int64_t end) {
  Observations seen;
  for (int64_t d0 = begin; d0 < end; d0 += kLanes) {
    const int width = end - d0 < kLanes ? static_cast<int>(end - d0) : kLanes;
    for (int64_t sample = 0; sample < args.flow.batch; ++sample) tokens_of_sample<T>(args, sample, d0, width, seen);
    seen.add_to(args.sums, d0, width);
  }
}

}  // namespace

void act_pool_accumulate_lanes(const ActPoolAccumulateArgs& args, int64_t begin, int64_t end) {
  by_type(args.flow.dtype, [&](auto x, auto) {
    if constexpr (sizeof(x) < sizeof(double)) lanes<decltype(x)>(args, begin, end);
  });
}

}  // namespace skillfast::SKILLFAST_ISA
