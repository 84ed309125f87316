#include "parallel.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "platform.h"

namespace fdk {
namespace {

// Processors busy with teams of this process, over all calling threads.
std::atomic<int> g_busy{0};
std::atomic<bool> g_alone{false};

void in_forked_child() {
  g_busy.store(0);
#if defined(_OPENMP) && !defined(KMP_VERSION_MAJOR)
  g_alone.store(true);  // GNU's runtime waits forever for threads that fork() did not copy
#endif
}

// The positive number that an environment variable begins with, 0 if it is none.
int number_in(const char *variable) {
  const char *text = std::getenv(variable);
  const long value = text ? std::strtol(text, nullptr, 10) : 0;
  return static_cast<int>(std::clamp<long>(value, 0, std::numeric_limits<int>::max()));
}

// Takes up to `wanted` processors out of those not in use, always at least one.
class Share {
 public:
  Share(int wanted, int available) {
    int busy = g_busy.load();
    do {
      taken_ = std::clamp(available - busy, 1, wanted);
    } while (!g_busy.compare_exchange_weak(busy, busy + taken_));
  }
  ~Share() { g_busy.fetch_sub(taken_); }
  Share(const Share &) = delete;
  Share &operator=(const Share &) = delete;
  int taken() const { return taken_; }

 private:
  int taken_ = 1;
};

void run_openmp(const Team &, int threads, Body body, void *context) {
  static std::once_flag once;
  std::call_once(once, [] { on_fork(in_forked_child); });
  if (threads <= 1 || g_alone.load(std::memory_order_relaxed)) return body(context);
  const Share share(threads, std::max(threads, processors_of_process()));
  if (share.taken() == 1) return body(context);
#if defined(_OPENMP)
#pragma omp parallel num_threads(share.taken())
  body(context);
#else
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(share.taken()));
  try {
    while (static_cast<int>(others.size()) + 1 < share.taken()) others.emplace_back(body, context);
  } catch (const std::system_error &) {
    // The process may start no more threads: those that there are do the work.
  }
  body(context);
  for (std::thread &other : others) other.join();
#endif
}

}  // namespace

const Team &openmp_team() {
  static constexpr Team team{run_openmp, nullptr};
  return team;
}

int default_num_threads() {
  const int processors = processors_of_process();
  if (const int wanted = number_in("FDK_NUM_THREADS")) return std::min(wanted, processors);
#if defined(_OPENMP)
  return std::clamp(omp_get_max_threads(), 1, processors);
#else
  if (const int wanted = number_in("OMP_NUM_THREADS")) return std::min(wanted, processors);
  return processors;
#endif
}

void Latch::wait() const {
  for (int spins = 0; missing_.load(std::memory_order_acquire) > 0; ++spins)
    if (spins > 2000) std::this_thread::yield();
}

}  // namespace fdk
