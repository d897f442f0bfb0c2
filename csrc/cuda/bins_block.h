// What one block of the CUDA `bins_update` does, in phases with a barrier between them. Plain C++ as well, so that a
// host can run the threads of a phase one after the other, and test all of it but the barriers and the atomics.
#pragma once
#include "kernels.h"

#ifdef __CUDACC__
#define SKILLFAST_EITHER __host__ __device__ __forceinline__
#else
#define SKILLFAST_EITHER inline
#endif

namespace skillfast {
namespace bins_block {

constexpr int kMostNeurons = 16;  // of a block: with 8 or more, each sector of float32 rows is read by one block alone
constexpr int kMostRows = 128;    // of a tile

SKILLFAST_EITHER int64_t entries_of(const BinsArgs& args) { return args.bins * (args.counts + args.weights); }

// A block owns the tables of its neurons: they are zeroed in shared memory, counted there, and added to the state once.
// Where not even one fits, entries are added to the state itself. Each thread has one row and neuron of a tile.
struct Shape {
  int neurons, rows, threads;
  bool shared;
  int64_t bytes;
};

inline Shape shape_of(const BinsArgs& args, int64_t shared_bytes) {
  for (int neurons = kMostNeurons; neurons >= 0; neurons /= 2) {
    const bool shared = neurons > 0;
    const int threads = 1024, own = shared ? neurons : 8;
    const int rows = threads / own < kMostRows ? threads / own : kMostRows;
    const int64_t words = (shared ? entries_of(args) * own : 0) + args.bins * own +
                          2 * rows * (args.metrics + args.weights + 1);  // tables, edges, the payload of two tiles
    if (!shared || words * 4 <= shared_bytes) return {own, rows, rows * own, shared, words * 4};
  }
  return {};
}

template <typename Adder, bool kShared>
struct Block {
  const BinsArgs& args;
  const Shape& shape;
  int64_t first;    // neuron
  int32_t* memory;  // shared

  // Entry e of neuron g lies at e * neurons + g: different neurons meet in few banks.
  SKILLFAST_EITHER int32_t* tables() const { return memory; }
  SKILLFAST_EITHER float* edges() const {
    return reinterpret_cast<float*>(memory + (kShared ? entries_of(args) * shape.neurons : 0));
  }
  // Of tile 0, 2, ... or 1, 3, ...: how many items each row has, and the items.
  SKILLFAST_EITHER int32_t* item_counts(int64_t tile) const {
    const int64_t words = shape.rows * (args.metrics + args.weights + 1);
    return reinterpret_cast<int32_t*>(edges()) + args.bins * shape.neurons + tile % 2 * words;
  }
  SKILLFAST_EITHER int32_t* items(int64_t tile, int row) const {
    return item_counts(tile) + shape.rows + row * (args.metrics + args.weights);
  }

  SKILLFAST_EITHER int neuron_of(int thread) const { return thread % shape.neurons; }
  SKILLFAST_EITHER bool has(int neuron) const { return first + neuron < args.width; }

  // Zeroed tables, and the edges of the neurons.
  SKILLFAST_EITHER void begin(int thread) {
    if (kShared) {
      const int64_t n = entries_of(args) * shape.neurons;
      for (int64_t i = thread; i < n; i += shape.threads) tables()[i] = 0;
    }
    const int neuron = neuron_of(thread);
    if (!has(neuron)) return;
    const float* own = args.edges + (first + neuron) * (args.bins - 1);
    for (int64_t edge = thread / shape.neurons; edge < args.bins - 1; edge += shape.threads / shape.neurons) {
      edges()[edge * shape.neurons + neuron] = own[edge];
    }
  }

  // What each of a tile's rows adds, as items: a metric's channel above 16 bits of 0, or a lane above its weight.
  SKILLFAST_EITHER void read_payload(int thread, int64_t tile) {
    const int64_t row = tile * shape.rows + thread;
    if (thread >= shape.rows || row >= args.n) return;
    int32_t* own = items(tile, thread);
    int n = 0;
    for (int64_t k = 0; k < args.metrics; ++k) {
      const int channel = args.channels[row * args.metrics + k];
      if (channel >= 0) own[n++] = channel << 16;
    }
    for (int64_t lane = 0; lane < args.weights; ++lane) {
      const int weight = args.hats[row * args.weights + lane];
      if (weight != 0) own[n++] = static_cast<int32_t>(lane << 16) | (weight & 0xffff);
    }
    item_counts(tile)[thread] = n;
  }

  // A thread's activation of a tile; 0 beyond the last row or neuron.
  template <typename Read>
  SKILLFAST_EITHER float value_of(int thread, int64_t tile, Read read) const {
    const int64_t row = tile * shape.rows + thread / shape.neurons;
    const int neuron = neuron_of(thread);
    return row < args.n && has(neuron) ? read(row * args.stride_row + first + neuron) : 0.0f;
  }

  // How many of a neuron's edges are at or below the value.
  SKILLFAST_EITHER int bin_of(float value, int neuron) const {
    const int bins = static_cast<int>(args.bins);
    int found = 0;
    for (int step = 128; step > 0; step /= 2) {
      const int reach = found + step;
      if (reach < bins && value >= edges()[(reach - 1) * shape.neurons + neuron]) found = reach;
    }
    return found;
  }

  SKILLFAST_EITHER void count(int thread, int64_t tile, float value) {
    const int r = thread / shape.neurons, neuron = neuron_of(thread);
    if (tile * shape.rows + r >= args.n || !has(neuron)) return;
    const int bin = bin_of(value, neuron), counts = static_cast<int>(args.counts);
    const int weights = static_cast<int>(args.weights), sums = static_cast<int>(args.bins) * counts;
    const int32_t* own = items(tile, r);
    const int n = item_counts(tile)[r];
    for (int i = 0; i < n; ++i) {
      const int where = own[i] >> 16, weight = static_cast<int16_t>(own[i] & 0xffff);
      const int entry = weight == 0 ? bin * counts + where : sums + bin * weights + where;
      if constexpr (kShared) {
        Adder::add(tables() + entry * shape.neurons + neuron, weight == 0 ? 1 : weight);
      } else {
        Adder::add(args.table + (first + neuron) * entries_of(args) + entry, weight == 0 ? 1 : weight);
      }
    }
  }

  // Adds the tables to the state, which no other block touches here.
  SKILLFAST_EITHER void end(int thread) {
    const int neuron = neuron_of(thread);
    if (!kShared || !has(neuron)) return;
    const int64_t entries = entries_of(args);
    int32_t* state = args.table + (first + neuron) * entries;
    for (int64_t e = thread / shape.neurons; e < entries; e += shape.threads / shape.neurons) {
      const int32_t counted = tables()[e * shape.neurons + neuron];
      if (counted != 0) state[e] += counted;
    }
  }
};

}  // namespace bins_block
}  // namespace skillfast
