// A row of activations: read, apply the activation, write, and leave what was written as floats for the pooling. Each
// step is a loop over a short row in cache, which compilers turn into vectors.
#pragma once
#include "cpu/isa.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace skillfast::SKILLFAST_ISA {

// exp(y) for y <= 0: 2^n times a polynomial in what is left, |r| <= ln(2) / 2; off by 1e-8 of the result.
static inline float exp_negative(float y) {
  const float shifted = y * 1.442695041f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are n
  const float n = shifted - 12582912.0f;
  const float r = (y - n * 0.693145752f) - n * 1.42860677e-06f;
  float p = 1.392618181e-03f;
  p = p * r + 8.363177630e-03f;
  p = p * r + 4.166655463e-02f;
  p = p * r + 1.666657700e-01f;
  p = p * r + 5.000000000e-01f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3f800000u;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  const float value = (1.0f + r + r * r * p) * power;
  return y < -87.0f ? 0.0f : value;
}
static inline double exp_negative(double y) { return __builtin_exp(y); }

// Phi(-a) for a >= 0, exact in the far tail, too: a rational function of a times exp(-a^2 / 2).
static inline float normal_tail(float a) {
  const float near = a > 13.0f ? 13.0f : a;
  float p = 3.994377921e-03f, q = 1.001227046e-02f;
  p = p * near + 3.980893972e-02f, q = q * near + 9.979386541e-02f;
  p = p * near + 1.807844522e-01f, q = q * near + 4.630019648e-01f;
  p = p * near + 4.349767837e-01f, q = q * near + 1.192307499e+00f;
  p = p * near + 5.000000024e-01f, q = q * near + 1.667838471e+00f;
  q = q * near + 1.0f;
  return exp_negative(-0.5f * a * a) * (p / q);
}

// x * Phi(x), off by at most 1.4e-7 of x.
static inline float gelu(float x) {
  const float tail = normal_tail(x < 0.0f ? -x : x);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// x * Phi(x), off by at most 3e-6 of x, for results that are rounded to half a float, which is a thousand times
// coarser: Phi(x) - 1/2 = x * P(x^2) / Q(x^2), and constant beyond 4.6.
static inline float gelu_coarse(float x) {
  const float t = x * x;
  float p = 3.319611671e-05f, q = 1.163337615e-03f;
  p = p * t + 3.822425401e-03f, q = q * t + 2.373123916e-02f;
  p = p * t + 2.728782767e-02f, q = q * t + 2.350751517e-01f;
  p = p * t + 3.989407911e-01f, q = q * t + 1.0f;
  const float inside = x * p / q;
  return x * (0.5f + (x > 4.6f ? 0.5f : (x < -4.6f ? -0.5f : inside)));
}

static inline double gelu(double x) { return 0.5 * x * __builtin_erfc(x * -0.7071067811865475244); }

// x / (1 + exp(-u)): the exponential of the negative one of u and -u, so that small results are exact, too.
template <typename S>
static inline S times_sigmoid(S x, S u) {
  const S e = exp_negative(u < S(0) ? u : -u);
  return x * ((u < S(0) ? e : S(1)) / (S(1) + e));
}

template <Activation activation, bool coarse, typename S>
static inline S activated(S x) {
  if constexpr (activation == Activation::gelu && coarse) return gelu_coarse(x);
  if constexpr (activation == Activation::gelu) return gelu(x);
  if constexpr (activation == Activation::gelu_tanh) {
    return times_sigmoid(x, S(1.5957691216057307118) * (x + S(0.044715) * x * x * x));
  }
  if constexpr (activation == Activation::relu) return x < S(0) ? S(0) : x;
  if constexpr (activation == Activation::silu) return times_sigmoid(x, x);
  return x;
}

template <Activation activation, bool coarse, typename S>
static inline void activate_row(S* __restrict row, int64_t width) {
  if constexpr (activation == Activation::identity) return;
  for (int64_t d = 0; d < width; ++d) row[d] = activated<activation, coarse, S>(row[d]);
}

template <bool coarse, typename S>
static inline void activate(Activation activation, S* row, int64_t width) {
  switch (activation) {
    case Activation::identity:
      return;
    case Activation::gelu:
      return activate_row<Activation::gelu, coarse, S>(row, width);
    case Activation::gelu_tanh:
      return activate_row<Activation::gelu_tanh, coarse, S>(row, width);
    case Activation::relu:
      return activate_row<Activation::relu, coarse, S>(row, width);
    case Activation::silu:
      return activate_row<Activation::silu, coarse, S>(row, width);
  }
}

// Writes a row in its own type, and leaves it as it was rounded.
template <typename T, typename S>
static inline void store_row(S* __restrict row, T* __restrict out, int64_t width) {
  for (int64_t d = 0; d < width; ++d) {
    out[d] = from_float<T>(row[d]);
    if constexpr (sizeof(T) != sizeof(S)) row[d] = to_float(out[d]);
  }
}

#if defined(__AVX512F__)
// GCC packs 32 bits to 16 in a dozen instructions; there is one.
static inline void store_row(float* __restrict row, bf16* __restrict out, int64_t width) {
  int64_t d = 0;
  for (; d + 16 <= width; d += 16) {
    const __m512 value = _mm512_loadu_ps(row + d);
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + d), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    _mm512_storeu_si512(row + d, _mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  for (; d < width; ++d) {
    out[d] = from_float<bf16>(row[d]);
    row[d] = to_float(out[d]);
  }
}
#endif

// Where `width` neurons from d0 of one token are read, and written (null where they are not).
template <typename T>
static inline const T* token_in(const Flow& flow, int64_t sample, int64_t token, int64_t d0) {
  return static_cast<const T*>(flow.x) + sample * flow.stride_batch + token * flow.stride_token + d0;
}
template <typename T>
static inline T* token_out(const Flow& flow, int64_t sample, int64_t token, int64_t d0) {
  return flow.out == nullptr ? nullptr : static_cast<T*>(flow.out) + (sample * flow.tokens + token) * flow.width + d0;
}

static inline bool is_kept(const uint8_t* mask, const Flow& flow, int64_t sample, int64_t token) {
  return mask == nullptr || mask[sample * flow.tokens + token] != 0;
}

// Reads `width` neurons from d0 of one token, writes what flows on, and leaves it in `row` as written (rounded).
template <typename T, typename S>
static inline void flow_row(const Flow& flow, Activation activation, int64_t sample, int64_t token, int64_t d0,
                            int64_t width, S* __restrict row) {
  const T* __restrict x = token_in<T>(flow, sample, token, d0);
  T* __restrict out = token_out<T>(flow, sample, token, d0);
  for (int64_t d = 0; d < width; ++d) row[d] = to_float(x[d]);
  activate<sizeof(T) != sizeof(S)>(activation, row, width);
  if (out != nullptr) {
    store_row(row, out, width);
  } else if (sizeof(T) != sizeof(S) && activation != Activation::identity) {
    for (int64_t d = 0; d < width; ++d) row[d] = to_float(from_float<T>(row[d]));
  }
}

}  // namespace skillfast::SKILLFAST_ISA
