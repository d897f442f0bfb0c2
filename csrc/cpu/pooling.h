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

// The common case in one loop: what flows on is written (or not), and added to the sums as written.
template <Activation activation, Pool pool, typename T, typename S>
static inline void stream_row(const T* __restrict x, T* __restrict out, const S* __restrict center, S* __restrict sums,
                              S* __restrict squares, int64_t width) {
  for (int64_t d = 0; d < width; ++d) {
    const T rounded = from_float<T>(activated<activation, false, S>(to_float(x[d])));
    if (out != nullptr) out[d] = rounded;
    if constexpr (pool == Pool::moments) {
      const S value = static_cast<S>(to_float(rounded)) - center[d];
      sums[d] += value;
      squares[d] += value * value;
    } else {
      sums[d] += to_float(rounded);
    }
  }
}

template <Pool pool, typename T, typename S>
static inline void stream(const ActPoolArgs& args, int64_t sample, int64_t token, int64_t d0, const S* center, S* sums,
                          S* squares, int64_t width) {
  const T* x = token_in<T>(args.flow, sample, token, d0);
  T* out = token_out<T>(args.flow, sample, token, d0);
  switch (args.activation) {
    case Activation::identity:
      return stream_row<Activation::identity, pool, T, S>(x, out, center, sums, squares, width);
    case Activation::gelu:
      return stream_row<Activation::gelu, pool, T, S>(x, out, center, sums, squares, width);
    case Activation::gelu_tanh:
      return stream_row<Activation::gelu_tanh, pool, T, S>(x, out, center, sums, squares, width);
    case Activation::relu:
      return stream_row<Activation::relu, pool, T, S>(x, out, center, sums, squares, width);
    case Activation::silu:
      return stream_row<Activation::silu, pool, T, S>(x, out, center, sums, squares, width);
  }
}

// The mean's sums where nothing is applied or written: kRowsInFloat tokens at a time stay in registers.
template <typename T, typename S>
static inline void sum_tokens(const ActPoolArgs& args, int64_t sample, int64_t d0, int64_t width, double* total) {
  const Flow& flow = args.flow;
  const T* first = token_in<T>(flow, sample, 0, d0);
  for (int64_t token = 0; token < flow.tokens; token += kRowsInFloat) {
    const int64_t left = flow.tokens - token;
    const T* __restrict x = first + token * flow.stride_token;
    if (left >= kRowsInFloat) {
      for (int64_t d = 0; d < width; ++d) {
        S sum = S(0);
#pragma GCC unroll 16
        for (int r = 0; r < kRowsInFloat; ++r) sum += to_float(x[r * flow.stride_token + d]);
        total[d] += static_cast<double>(sum);
      }
    } else {
      for (int64_t d = 0; d < width; ++d) {
        S sum = S(0);
        for (int64_t r = 0; r < left; ++r) sum += to_float(x[r * flow.stride_token + d]);
        total[d] += static_cast<double>(sum);
      }
    }
  }
}

// One panel of neurons of one sample, all tokens; `pooled_squares` for Pool::moments alone.
template <typename T, typename S>
static inline void pool_panel(const ActPoolArgs& args, int64_t sample, int64_t d0, int64_t width, S* pooled,
                              S* pooled_squares) {
  alignas(64) S row[kActPanel], sums[kActPanel], squares[kActPanel], zeros[kActPanel];
  alignas(64) double total[kActPanel], total_squares[kActPanel];
  const bool moments = args.pool == Pool::moments;
  const S nan = static_cast<S>(__builtin_nan(""));
  for (int64_t d = 0; d < width; ++d) sums[d] = S(0), total[d] = 0.0;
  for (int64_t d = 0; moments && d < width; ++d) squares[d] = zeros[d] = S(0), total_squares[d] = 0.0;
  const S* center = args.center == nullptr ? zeros : static_cast<const S*>(args.center) + d0;
  int64_t counted = 0, token = 0;
  if (args.pool == Pool::mean && args.activation == Activation::identity && args.flow.out == nullptr &&
      args.mask == nullptr) {
    sum_tokens<T, S>(args, sample, d0, width, total);
    counted = token = args.flow.tokens;
  }
  for (; token < args.flow.tokens; ++token) {
    const bool here = is_kept(args.mask, args.flow, sample, token);
    if (!here && args.flow.out == nullptr) continue;
    // Rounding to half a float keeps compilers from making one loop of it all a vector's.
    const bool streams = here && sizeof(T) == sizeof(S);
    if (streams && args.pool == Pool::mean) {
      stream<Pool::mean, T, S>(args, sample, token, d0, center, sums, squares, width);
    } else if (streams && args.pool == Pool::moments) {
      stream<Pool::moments, T, S>(args, sample, token, d0, center, sums, squares, width);
    } else {
      flow_row<T, S>(args.flow, args.activation, sample, token, d0, width, row);
    }
    if (!here) continue;
    if (streams && (args.pool == Pool::mean || args.pool == Pool::moments)) {
      // added already
    } else if (args.pool == Pool::mean) {
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
