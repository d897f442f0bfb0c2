#include "cpu/parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace skillfast {
namespace {

// libgomp's stable entry point; libomp and libiomp5 export it too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

GompParallel find_gomp_parallel() {
  static const GompParallel found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

struct Work {
  std::atomic<int64_t> next{0};
  int64_t n, grain;
  ChunkBody body;
  const void* context;
};

// Each thread takes the next chunk until none is left, so any number of threads does all the work.
void take_chunks(void* pointer) {
  Work& work = *static_cast<Work*>(pointer);
  for (;;) {
    const int64_t begin = work.next.fetch_add(work.grain);
    if (begin >= work.n) return;
    work.body(work.context, begin, std::min(begin + work.grain, work.n));
  }
}

}  // namespace

bool openmp_found() { return find_gomp_parallel() != nullptr; }

void parallel_for(int n_threads, int64_t n, int64_t grain, ChunkBody body, const void* context) {
  Work work;
  work.n = n;
  work.grain = std::max<int64_t>(grain, 1);
  work.body = body;
  work.context = context;
  const int64_t chunks = (n + work.grain - 1) / work.grain;
  const int threads = static_cast<int>(std::min<int64_t>(std::max(n_threads, 1), chunks));
  if (threads <= 1) return take_chunks(&work);
  if (const GompParallel gomp_parallel = find_gomp_parallel()) {
    return gomp_parallel(take_chunks, &work, static_cast<unsigned>(threads), 0);
  }
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(take_chunks, &work);
  take_chunks(&work);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace skillfast
