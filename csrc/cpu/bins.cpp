#include "cpu/bins_search.h"

namespace skillfast::SKILLFAST_ISA {
namespace {

constexpr int kPanel = 32;           // neurons transposed at once
constexpr int kRows = 1024;          // rows that pass by while a neuron's table stays in cache
constexpr int kTries = 4;            // blocks in which a bin that many rows share is looked for
constexpr int kBlock = 64;           // rows whose bins are found, then counted
constexpr int kStride = kRows + 16;  // not a power of two: a column of the panel must not fall into one cache set

typedef int32_t Sums8 __attribute__((vector_size(32)));
typedef int16_t Weights8 __attribute__((vector_size(16)));
typedef int32_t Sums16 __attribute__((vector_size(64)));
typedef int16_t Weights16 __attribute__((vector_size(32)));

// panel[d][r] = x[r][d] as float32, kTile rows at a time: each row is widened, then the square is turned.
template <typename T>
void load_panel(const BinsArgs& args, int64_t row0, int rows, int64_t d0, int width, float* panel) {
  alignas(64) float tile[kTile * kPanel];
  for (int r = 0; r < rows; r += kTile) {
    const int height = rows - r < kTile ? rows - r : kTile;
    for (int i = 0; i < height; ++i) {
      const T* __restrict x = static_cast<const T*>(args.x) + (row0 + r + i) * args.stride_row + d0;
      float* __restrict out = tile + i * kPanel;
      if (width == kPanel) {
        for (int d = 0; d < kPanel; ++d) out[d] = static_cast<float>(to_float(x[d]));
      } else {
        for (int d = 0; d < width; ++d) out[d] = static_cast<float>(to_float(x[d]));
      }
    }
    for (int d = 0; d < width; d += kTile) transpose_tile(tile + d, kPanel, panel + d * kStride + r, kStride);
  }
}

// One count per row, in the channel that the row names; -1 counts nothing.
void add_counts(const int32_t* bins, int rows, const int16_t* channels, int64_t stride, int64_t width, int32_t* table) {
  int32_t place[kBlock], once[kBlock];
  for (int r = 0; r < rows; ++r) {
    const int32_t channel = channels[r * stride], none = channel >> 31;
    place[r] = bins[r] * static_cast<int32_t>(width) + (channel & ~none);
    once[r] = 1 + none;
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) table[place[r]] += once[r];
}

template <typename Sums, typename Weights>
Sums load_weights(const int16_t* weights) {
  Weights narrow;
  std::memcpy(&narrow, weights, sizeof(narrow));
  return __builtin_convertvector(narrow, Sums);
}

template <typename Sums>
void add_to(int32_t* entry, const Sums& added) {
  Sums sums;
  std::memcpy(&sums, entry, sizeof(sums));
  sums += added;
  std::memcpy(entry, &sums, sizeof(sums));
}

template <typename Sums, typename Weights>
void add_weights(const int32_t* bins, int rows, const int16_t* weights, int64_t width, int32_t* table) {
  int32_t place[kBlock];
  for (int r = 0; r < rows; ++r) place[r] = bins[r] * static_cast<int32_t>(width);
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) add_to(table + place[r], load_weights<Sums, Weights>(weights + r * width));
}

// add_weights where many rows share a bin (a ReLU's zeros): there each addition would wait for the one before it to
// reach memory, so those rows are summed in a register.
template <typename Sums, typename Weights>
void add_weights_shared(const int32_t* bins, int rows, int32_t common, const int16_t* weights, int64_t width,
                        int32_t* table) {
  int32_t order[kBlock];
  int others = 0;
  Sums shared = {};
  for (int r = 0; r < rows; ++r) {
    const bool is_other = bins[r] != common;
    const int32_t kept = static_cast<int32_t>(is_other) - 1;  // all bits, or none
    shared += load_weights<Sums, Weights>(weights + r * width) & kept;
    order[others] = r;
    others += is_other;
  }
  add_to(table + common * width, shared);
  for (int i = 0; i < others; ++i) {
    const int r = order[i];
    add_to(table + bins[r] * width, load_weights<Sums, Weights>(weights + r * width));
  }
}

template <typename Sums, typename Weights>
void add_lanes(const int32_t* bins, int rows, int32_t common, const int16_t* weights, int64_t width, int32_t* table) {
  if (common < 0) return add_weights<Sums, Weights>(bins, rows, weights, width, table);
  return add_weights_shared<Sums, Weights>(bins, rows, common, weights, width, table);
}

void add_block(const BinsArgs& args, const int32_t* bins, int64_t row0, int rows, int32_t common, int32_t* counts) {
  for (int64_t k = 0; k < args.metrics; ++k) {
    add_counts(bins, rows, args.channels + row0 * args.metrics + k, args.metrics, args.counts, counts);
  }
  int32_t* sums = counts + args.bins * args.counts;
  const int16_t* weights = args.hats + row0 * args.weights;
  int64_t lane = 0;
  for (; lane + 16 <= args.weights; lane += 16) {
    add_lanes<Sums16, Weights16>(bins, rows, common, weights + lane, args.weights, sums + lane);
  }
  if (lane < args.weights) {
    add_lanes<Sums8, Weights8>(bins, rows, common, weights + lane, args.weights, sums + lane);
  }
}

bool is_common(const int32_t* bins, int rows, int32_t bin) {
  int found = 0;
  for (int r = 0; r < rows; ++r) found += bins[r] == bin;
  return found * 4 >= rows;
}

// Adds one neuron's rows; meanwhile the next neuron's table is fetched, a part per block.
template <int kLevels>
void neuron_update(const BinsArgs& args, int64_t d, const float* x, int64_t row0, int rows) {
  alignas(64) float tree[1 << kMaxLevels];
  alignas(64) int32_t bins[kBlock];
  build_tree<kLevels>(args.edges + d * (args.bins - 1), static_cast<int>(args.bins) - 1, tree);
  const int64_t entries = args.bins * (args.counts + args.weights);
  int32_t* table = args.table + d * entries;
  const char* next = reinterpret_cast<const char*>(table + entries);
  const int64_t part = (entries * 4 * kBlock / rows + 63) & ~int64_t(63);
  int32_t guess = 0, tries = 0;  // a bin that many rows share, if there is one
  for (int r = 0; r < rows; r += kBlock) {
    const int block = rows - r < kBlock ? rows - r : kBlock;
    find_bins<kLevels>(tree, x + r, block, bins);
    if (d + 1 < args.width) {
      for (int64_t line = 0; line < part; line += 64) __builtin_prefetch(next + line, 1, 3);
      next += part;
    }
    const bool common = tries < kTries && is_common(bins, block, guess);
    if (!common) guess = bins[block / 2], ++tries;
    add_block(args, bins, row0 + r, block, common ? guess : -1, table);
  }
}

template <typename T, int kLevels>
void lanes(const BinsArgs& args, int64_t begin, int64_t end) {
  alignas(64) float panel[kPanel * kStride];
  std::memset(panel, 0, sizeof(panel));  // vectors read past the last row
  for (int64_t d0 = begin; d0 < end; d0 += kPanel) {
    const int width = end - d0 < kPanel ? static_cast<int>(end - d0) : kPanel;
    for (int64_t row0 = 0; row0 < args.n; row0 += kRows) {
      const int rows = args.n - row0 < kRows ? static_cast<int>(args.n - row0) : kRows;
      load_panel<T>(args, row0, rows, d0, width, panel);
      for (int d = 0; d < width; ++d) neuron_update<kLevels>(args, d0 + d, panel + d * kStride, row0, rows);
    }
  }
}

template <typename T>
void lanes_of(const BinsArgs& args, int64_t begin, int64_t end) {
  return args.bins <= 128 ? lanes<T, 7>(args, begin, end) : lanes<T, 8>(args, begin, end);
}

}  // namespace

void bins_lanes(const BinsArgs& args, int64_t begin, int64_t end) {
  by_type(args.dtype, [&](auto x, auto) { lanes_of<decltype(x)>(args, begin, end); });
}

}  // namespace skillfast::SKILLFAST_ISA
