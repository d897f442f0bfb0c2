// Picks the widest instruction set of this processor and splits each op over threads.
#include <cstring>

#include "cpu/parallel.h"
#include "kernels.h"

namespace skillfast {

#define SKILLFAST_DECLARE(isa)                                                              \
  namespace isa {                                                                           \
  void neuron_scale_rows(const NeuronScaleArgs&, int64_t begin, int64_t end);               \
  void comoments_lanes(const CoMomentsArgs&, int64_t begin, int64_t end);                   \
  void bins_lanes(const BinsArgs&, int64_t begin, int64_t end);                             \
  void act_pool_items(const ActPoolArgs&, int64_t begin, int64_t end);                      \
  void act_pool_accumulate_lanes(const ActPoolAccumulateArgs&, int64_t begin, int64_t end); \
  }
#define SKILLFAST_KERNELS(isa) \
  isa::neuron_scale_rows, isa::comoments_lanes, isa::bins_lanes, isa::act_pool_items, isa::act_pool_accumulate_lanes
SKILLFAST_DECLARE(baseline)
#ifdef SKILLFAST_HAS_avx2
SKILLFAST_DECLARE(avx2)
#endif
#ifdef SKILLFAST_HAS_avx512
SKILLFAST_DECLARE(avx512)
#endif
#undef SKILLFAST_DECLARE

namespace {

struct Kernels {
  const char* isa;
  bool (*supported)();
  void (*neuron_scale_rows)(const NeuronScaleArgs&, int64_t, int64_t);
  void (*comoments_lanes)(const CoMomentsArgs&, int64_t, int64_t);
  void (*bins_lanes)(const BinsArgs&, int64_t, int64_t);
  void (*act_pool_items)(const ActPoolArgs&, int64_t, int64_t);
  void (*act_pool_accumulate_lanes)(const ActPoolAccumulateArgs&, int64_t, int64_t);
};

// Widest first.
const Kernels kKernels[] = {
#ifdef SKILLFAST_HAS_avx512
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     SKILLFAST_KERNELS(avx512)},
#endif
#ifdef SKILLFAST_HAS_avx2
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, SKILLFAST_KERNELS(avx2)},
#endif
    {"baseline", [] { return true; }, SKILLFAST_KERNELS(baseline)},
};
#undef SKILLFAST_KERNELS

const Kernels* widest() {
  for (const Kernels& kernels : kKernels) {
    if (kernels.supported()) return &kernels;
  }
  return nullptr;
}

const Kernels*& current() {
  static const Kernels* kernels = widest();
  return kernels;
}

constexpr int64_t kElements = 1 << 15;  // per chunk: below this a thread costs more than it saves

// Runs one kernel over [0, n) on the process's threads, `grain` at a time.
template <auto kernel, typename Args>
void split(const Args& args, int n_threads, int64_t n, int64_t grain) {
  parallel_for(
      n_threads, n, grain,
      [](const void* context, int64_t begin, int64_t end) {
        (current()->*kernel)(*static_cast<const Args*>(context), begin, end);
      },
      &args);
}

}  // namespace

const char* cpu_isa() { return current()->isa; }

bool set_cpu_isa(const char* name) {
  for (const Kernels& kernels : kKernels) {
    if (std::strcmp(kernels.isa, name) == 0 && kernels.supported()) {
      current() = &kernels;
      return true;
    }
  }
  return false;
}

const char* cpu_threads_runtime() { return openmp_found() ? "openmp" : "std"; }

void neuron_scale(const NeuronScaleArgs& args, int n_threads) {
  const int64_t width = args.flow.width > 0 ? args.flow.width : 1;
  split<&Kernels::neuron_scale_rows>(args, n_threads, args.flow.batch * args.flow.tokens, kElements / width + 1);
}

void comoments_update(const CoMomentsArgs& args, int n_threads) {
  split<&Kernels::comoments_lanes>(args, n_threads, args.width, 256);
}

void bins_update(const BinsArgs& args, int n_threads) {
  split<&Kernels::bins_lanes>(args, n_threads, args.width, 64);  // a multiple of the panel's width
}

void act_mask_pool(const ActPoolArgs& args, int n_threads) {
  const int64_t panels = (args.flow.width + kActPanel - 1) / kActPanel;
  const int64_t width = args.flow.width < kActPanel ? args.flow.width : kActPanel;
  const int64_t grain = kElements / (width * args.flow.tokens + 1) + 1;
  split<&Kernels::act_pool_items>(args, n_threads, args.flow.batch * panels, grain);
}

void act_pool_accumulate(const ActPoolAccumulateArgs& args, int n_threads) {
  constexpr int64_t kNeurons = 64;
  const int64_t width = args.flow.width, threads = n_threads > 1 ? n_threads : 1;
  const int64_t share = (width + threads - 1) / threads;  // strips as wide as leave none of the threads idle
  const int64_t strip = (share + kNeurons - 1) / kNeurons * kNeurons;
  split<&Kernels::act_pool_accumulate_lanes>(args, n_threads, width,
                                             strip < kAccumulatePanel ? strip : kAccumulatePanel);
}

}  // namespace skillfast
