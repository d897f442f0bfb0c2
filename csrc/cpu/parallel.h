#pragma once
#include <cstdint>

namespace skillfast {

// Calls body(context, begin, end) for consecutive chunks of [0, n), at most `grain` long, on up to n_threads threads.
// The threads are those of the OpenMP runtime that the process already has (torch's), so that two pools never
// compete for the cores; where there is none, std::thread.
using ChunkBody = void (*)(const void* context, int64_t begin, int64_t end);
void parallel_for(int n_threads, int64_t n, int64_t grain, ChunkBody body, const void* context);

bool openmp_found();

}  // namespace skillfast
