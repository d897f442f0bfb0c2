// act_mask_pool whose observations go straight into the statistics: one panel of neurons at a time passes all samples,
// and what it leaves is a few rows in cache, which the co-moments and the bins take from there.
#include "cpu/pooling.h"

namespace skillfast::SKILLFAST_ISA {
namespace {

constexpr int kLanes = kAccumulatePanel;
constexpr int kRows = 32;             // observations collected before they are added
constexpr int kStride = kLanes + 16;  // not a power of two: a column of them must not fall into one cache set

struct Observations {
  alignas(64) float x[kRows * kStride];
  int rows = 0;
  int64_t first = 0;  // its number, which is its row of y, channels and hats; rows of one batch follow each other
};

// Tokens whose metrics are those of their sample: SampleSums takes their sums.
bool y_of_sample(const ActPoolAccumulateArgs& args) { return args.capture.pool == Pool::none && !args.y_per_token; }

void add_observations(const ActPoolAccumulateArgs& args, Observations& seen, int64_t d0, int width) {
  if (seen.rows == 0) return;
  if (!y_of_sample(args)) {
    CoMomentsArgs sums = args.sums;
    sums.x = seen.x, sums.stride_row = kStride, sums.n = seen.rows, sums.width = width;
    sums.y = args.y + seen.first * sums.columns;
    sums.shift += d0, sums.sum_x += d0, sums.sum_xx += d0, sums.sum_xy += d0;
    sums.dtype = DType::float32;
    comoments_lanes(sums, 0, width);
  }
  if (args.has_bins) {
    BinsArgs bins = args.bins;
    bins.x = seen.x, bins.stride_row = kStride, bins.n = seen.rows, bins.width = width;
    bins.channels += seen.first * bins.metrics, bins.hats += seen.first * bins.weights;
    bins.edges += d0 * (bins.bins - 1), bins.table += d0 * bins.bins * (bins.counts + bins.weights);
    bins.dtype = DType::float32;
    bins_lanes(bins, 0, width);
  }
  seen.rows = 0;
}

// A row for observation `number`; what came before is added first where it does not fit or does not follow.
float* next_row(const ActPoolAccumulateArgs& args, Observations& seen, int64_t number, int64_t d0, int width) {
  if (seen.rows == kRows || (seen.rows > 0 && seen.first + seen.rows != number)) {
    add_observations(args, seen, d0, width);
  }
  if (seen.rows == 0) seen.first = number;
  return seen.x + kStride * seen.rows++;
}

// Tokens as observations whose metrics are those of their sample: sum over the tokens first, multiply once.
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
  const ActPoolArgs& capture = args.capture;
  const int64_t tokens = capture.flow.tokens;
  const bool sum_first = y_of_sample(args);
  bool any = false;
  SampleSums sums(sum_first ? width : 0);
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t number = sample * tokens + token;
    const bool here = capture.mask == nullptr || capture.mask[number] != 0;
    if (!here) {
      alignas(64) float unused[kLanes];
      if (capture.flow.out != nullptr) flow_row<T, float>(capture, sample, token, d0, width, unused);
      continue;
    }
    float* row = next_row(args, seen, number, d0, width);
    flow_row<T, float>(capture, sample, token, d0, width, row);
    if (sum_first) sums.add(row, args.sums.shift + d0, width);
    any = true;
  }
  if (sum_first && any) sums.add_to(args.sums, args.y + sample * args.sums.columns, d0, width);
}

template <typename T>
void lanes(const ActPoolAccumulateArgs& args, int64_t begin, int64_t end) {
  Observations seen;
  for (int64_t d0 = begin; d0 < end; d0 += kLanes) {
    const int width = end - d0 < kLanes ? static_cast<int>(end - d0) : kLanes;
    for (int64_t sample = 0; sample < args.capture.flow.batch; ++sample) {
      if (args.capture.pool == Pool::none) {
        tokens_of_sample<T>(args, sample, d0, width, seen);
      } else {
        float* row = next_row(args, seen, sample, d0, width);
        pool_panel<T, float>(args.capture, sample, d0, width, row, nullptr);
      }
    }
    add_observations(args, seen, d0, width);
  }
}

}  // namespace

void act_pool_accumulate_lanes(const ActPoolAccumulateArgs& args, int64_t begin, int64_t end) {
  switch (args.capture.flow.dtype) {
    case DType::float32:
      return lanes<float>(args, begin, end);
    case DType::bfloat16:
      return lanes<bf16>(args, begin, end);
    case DType::float16:
      return lanes<half>(args, begin, end);
    case DType::float64:
      return;  // refused above
  }
}

}  // namespace skillfast::SKILLFAST_ISA
