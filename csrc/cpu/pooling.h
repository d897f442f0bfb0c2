// The tokens of one sample pooled as they flow by.
#pragma once
#include "cpu/activation.h"

namespace skillfast::SKILLFAST_ISA {

constexpr int kRowsInFloat = 16;  // tokens summed in the row's own type before they are added to the total

template <typename S>
static inline void add_row(const S* __restrict row, S* __restrict sums, int64_t width) {
  for (int64_t d = 0; d < width; ++d) sums[d] += row[d];
}

template <typename S>
static inline void add_centered(const S* __restrict row, const S* __restrict center, S* __restrict sums,
                                S* __restrict squares, int64_t width) {
  for (int64_t d = 0; d < width; ++d) {
    const S value = row[d] - center[d];
    sums[d] += value;
    squares[d] += value * value;
  }
}

template <typename S>
static inline void max_row(const S* __restrict row, S* __restrict best, int64_t width) {
  for (int64_t d = 0; d < width; ++d) best[d] = row[d] > best[d] || row[d] != row[d] ? row[d] : best[d];
}

template <typename S>
static inline void flush(S* __restrict sums, double* __restrict total, int64_t width) {
  for (int64_t d = 0; d < width; ++d) {
    total[d] += static_cast<double>(sums[d]);
    sums[d] = S(0);
  }
}

// One panel of neurons of one sample, all tokens; `pooled_squares` for Pool::moments alone.
template <typename T, typename S>
static inline void pool_panel(const ActPoolArgs& args, int64_t sample, int64_t d0, int64_t width, S* pooled,
                              S* pooled_squares) {
  alignas(64) S row[kActPanel], sums[kActPanel] = {}, squares[kActPanel] = {}, zeros[kActPanel];
  alignas(64) double total[kActPanel] = {}, total_squares[kActPanel] = {};
  const S nan = static_cast<S>(__builtin_nan(""));
  const S* center = args.center == nullptr ? nullptr : static_cast<const S*>(args.center) + d0;
  if (center == nullptr) {
    for (int64_t d = 0; d < width; ++d) zeros[d] = S(0);
    center = zeros;
  }
  int64_t counted = 0;
  for (int64_t token = 0; token < args.flow.tokens; ++token) {
    const bool here = args.mask == nullptr || args.mask[sample * args.flow.tokens + token] != 0;
    if (!here && args.flow.out == nullptr) continue;
    flow_row<T, S>(args, sample, token, d0, width, row);
    if (!here) continue;
    if (args.pool == Pool::mean) {
      add_row(row, sums, width);
    } else if (args.pool == Pool::moments) {
      add_centered(row, center, sums, squares, width);
    } else if (args.pool == Pool::max && counted > 0) {
      max_row(row, sums, width);
    } else if (args.pool != Pool::cls || counted == 0) {  // the first token's, or so far the last one's
      std::memcpy(sums, row, sizeof(S) * width);
    }
    ++counted;
    if (counted % kRowsInFloat == 0 && (args.pool == Pool::mean || args.pool == Pool::moments)) {
      flush(sums, total, width);
      if (args.pool == Pool::moments) flush(squares, total_squares, width);
    }
  }
  if (args.pool == Pool::none) return;
  if (args.pool == Pool::moments) {
    flush(sums, total, width);
    flush(squares, total_squares, width);
    for (int64_t d = 0; d < width; ++d) {
      pooled[d] = static_cast<S>(total[d]);
      pooled_squares[d] = static_cast<S>(total_squares[d]);
    }
  } else if (counted == 0) {
    for (int64_t d = 0; d < width; ++d) pooled[d] = nan;
  } else if (args.pool == Pool::mean) {
    flush(sums, total, width);
    const double share = 1.0 / static_cast<double>(counted);
    for (int64_t d = 0; d < width; ++d) pooled[d] = static_cast<S>(total[d] * share);
  } else {
    std::memcpy(pooled, sums, sizeof(S) * width);
  }
}

}  // namespace skillfast::SKILLFAST_ISA
