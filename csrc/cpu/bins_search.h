// Which bin a value falls into: a binary search over a neuron's edges laid out level by level (node i's children are
// 2i and 2i + 1), so that each level is a few registers that a permute looks up for a whole vector of values at once.
#pragma once
#include "cpu/isa.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace skillfast::SKILLFAST_ISA {

constexpr int kMaxLevels = 8;  // 256 bins

constexpr int kTile = 8;

// out[j][i] = in[i][j] for a square of kTile floats; the strides are in floats.
#if defined(__AVX2__)
static inline void transpose_tile(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m256 pair[8], quad[8];
  for (int i = 0; i < 8; i += 2) {
    const __m256 a = _mm256_loadu_ps(in + i * in_stride), b = _mm256_loadu_ps(in + (i + 1) * in_stride);
    pair[i] = _mm256_unpacklo_ps(a, b);
    pair[i + 1] = _mm256_unpackhi_ps(a, b);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      quad[i + 2 * j] = _mm256_shuffle_ps(pair[i + j], pair[i + j + 2], 0x44);
      quad[i + 2 * j + 1] = _mm256_shuffle_ps(pair[i + j], pair[i + j + 2], 0xEE);
    }
  }
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(out + j * out_stride, _mm256_permute2f128_ps(quad[j], quad[j + 4], 0x20));
    _mm256_storeu_ps(out + (j + 4) * out_stride, _mm256_permute2f128_ps(quad[j], quad[j + 4], 0x31));
  }
}
#else
static inline void transpose_tile(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int j = 0; j < kTile; ++j) {
    for (int i = 0; i < kTile; ++i) out[j * out_stride + i] = in[i * in_stride + j];
  }
}
#endif

// Edges in level order, 2^kLevels floats, slot 0 unused; missing edges are NaN, which no value reaches.
template <int kLevels>
static inline void build_tree(const float* edges, int n_edges, float* tree) {
  constexpr int kNodes = 1 << kLevels;
  float padded[kNodes];
  std::memcpy(padded, edges, sizeof(float) * n_edges);
  for (int i = n_edges; i < kNodes; ++i) padded[i] = __builtin_nanf("");
  tree[0] = 0.0f;
  for (int level = 0; level < kLevels; ++level) {
    const int step = kNodes >> level;
    const float* __restrict from = padded + (step >> 1) - 1;
    float* __restrict to = tree + (1 << level);
    for (int j = 0; j < 1 << level; ++j) to[j] = from[j * step];
  }
}

#if defined(__AVX512F__)

// The entry of `tree` at each lane's index, which has its highest bit at kLevel.
template <int kLevel>
static inline __m512 node_edges(const float* tree, __m512i index) {
  if constexpr (kLevel < 4) {
    return _mm512_permutexvar_ps(index, _mm512_loadu_ps(tree));
  } else if constexpr (kLevel == 4) {
    return _mm512_permutexvar_ps(index, _mm512_loadu_ps(tree + 16));
  } else {
    constexpr int kPairs = 1 << (kLevel - 5);
    const float* level = tree + (1 << kLevel);
    __m512 found = _mm512_permutex2var_ps(_mm512_loadu_ps(level), index, _mm512_loadu_ps(level + 16));
    for (int pair = 1; pair < kPairs; ++pair) {
      const __mmask16 here = _mm512_cmpeq_epi32_mask(_mm512_srli_epi32(index, 5), _mm512_set1_epi32(kPairs + pair));
      const __m512 other =
          _mm512_permutex2var_ps(_mm512_loadu_ps(level + 32 * pair), index, _mm512_loadu_ps(level + 32 * pair + 16));
      found = _mm512_mask_mov_ps(found, here, other);
    }
    return found;
  }
}

template <int kLevel, int kLevels>
static inline __m512i descend(const float* tree, __m512 x, __m512i index) {
  if constexpr (kLevel == kLevels) {
    return index;
  } else {
    const __mmask16 above = _mm512_cmp_ps_mask(x, node_edges<kLevel>(tree, index), _CMP_GE_OQ);
    const __m512i twice = _mm512_add_epi32(index, index);
    index = _mm512_mask_add_epi32(twice, above, twice, _mm512_set1_epi32(1));
    return descend<kLevel + 1, kLevels>(tree, x, index);
  }
}

// Bins of `rows` values; reads and writes whole vectors, so both arrays are padded to a multiple of 16.
template <int kLevels>
static inline void find_bins(const float* tree, const float* x, int rows, int32_t* bins) {
  for (int r = 0; r < rows; r += 16) {
    const __m512i leaf = descend<0, kLevels>(tree, _mm512_loadu_ps(x + r), _mm512_set1_epi32(1));
    _mm512_storeu_si512(bins + r, _mm512_sub_epi32(leaf, _mm512_set1_epi32(1 << kLevels)));
  }
}

#elif defined(__AVX2__)

// Looks up kVectors * 8 consecutive entries by the low bits of the index.
template <int kVectors>
static inline __m256 entries(const float* table, __m256i index) {
  if constexpr (kVectors == 1) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  } else {
    constexpr int kBit = 3 + __builtin_ctz(kVectors) - 1;  // tells the upper half from the lower
    const __m256 low = entries<kVectors / 2>(table, index);
    const __m256 high = entries<kVectors / 2>(table + kVectors * 4, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 31 - kBit)));
  }
}

template <int kLevel, int kLevels>
static inline __m256i descend(const float* tree, __m256 x, __m256i index) {
  if constexpr (kLevel == kLevels) {
    return index;
  } else {
    constexpr int kVectors = kLevel <= 3 ? 1 : 1 << (kLevel - 3);
    const __m256 edge = entries<kVectors>(tree + (kLevel < 3 ? 0 : 1 << kLevel), index);
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(x, edge, _CMP_GE_OQ));  // -1 where true
    return descend<kLevel + 1, kLevels>(tree, x, _mm256_sub_epi32(_mm256_add_epi32(index, index), above));
  }
}

template <int kLevels>
static inline void find_bins(const float* tree, const float* x, int rows, int32_t* bins) {
  for (int r = 0; r < rows; r += 8) {
    const __m256i leaf = descend<0, kLevels>(tree, _mm256_loadu_ps(x + r), _mm256_set1_epi32(1));
    const __m256i bin = _mm256_sub_epi32(leaf, _mm256_set1_epi32(1 << kLevels));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bins + r), bin);
  }
}

#else

template <int kLevels>
static inline void find_bins(const float* tree, const float* x, int rows, int32_t* bins) {
  for (int r = 0; r < rows; ++r) bins[r] = 1;
  for (int level = 0; level < kLevels; ++level) {  // level outside: the rows are independent
    for (int r = 0; r < rows; ++r) bins[r] = 2 * bins[r] + (x[r] >= tree[bins[r]] ? 1 : 0);
  }
  for (int r = 0; r < rows; ++r) bins[r] -= 1 << kLevels;
}

#endif

}  // namespace skillfast::SKILLFAST_ISA
