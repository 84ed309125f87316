#include "platform.h"

#include <algorithm>
#include <cstdlib>
#include <thread>

#if defined(_WIN32)
#include <malloc.h>
#include <windows.h>
#else
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace fdk {

int processors_of_process() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#elif defined(_WIN32)
  DWORD_PTR process = 0;
  DWORD_PTR system = 0;
  if (GetProcessAffinityMask(GetCurrentProcess(), &process, &system) != 0 && process != 0)
    return __builtin_popcountll(process);
#endif
  // macOS has no affinity: all processors.
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

void on_fork([[maybe_unused]] void (*in_child)()) {
#if !defined(_WIN32)
  pthread_atfork(nullptr, nullptr, in_child);
#endif
}

void *allocate_aligned(size_t alignment, size_t bytes) {
#if defined(_WIN32)
  return _aligned_malloc(bytes, alignment);
#else
  return std::aligned_alloc(alignment, bytes);
#endif
}

void free_aligned(void *memory) {
#if defined(_WIN32)
  _aligned_free(memory);
#else
  std::free(memory);
#endif
}

}  // namespace fdk
