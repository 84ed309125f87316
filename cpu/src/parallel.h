// Threads: a team that runs one body, and the division of work among whoever takes part.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fdk {

// Runs body(context) on at most `threads` threads at once, the caller among them, and returns when
// every call has returned. A team may turn out smaller than asked for, down to the caller alone.
using Body = void (*)(void *context);
struct Team {
  void (*run)(const Team &team, int threads, Body body, void *context);
  const void *handle;  // for run
};

// OpenMP, or threads of its own where this file is compiled without it. Calls from several threads
// at once share the processors instead of multiplying the threads; in a forked child whose OpenMP
// runtime does not survive fork() the caller works alone.
const Team &openmp_team();

// FDK_NUM_THREADS, else OpenMP's number (OMP_NUM_THREADS), bounded by the processors that the
// process may use.
int default_num_threads();

// Hands out [0, total) in pieces that shrink towards the end, so that a slow core takes fewer of
// them and never holds up the others for long.
class WorkQueue {
 public:
  WorkQueue(int64_t total, int64_t smallest, int threads)
      : total_(total), smallest_(smallest), divisor_(int64_t{2} * threads) {}

  // False when nothing is left.
  bool take(int64_t &begin, int64_t &end) {
    int64_t current = next_.load(std::memory_order_relaxed);
    while (current < total_) {
      const int64_t fair = (total_ - current) / divisor_ / smallest_ * smallest_;
      const int64_t size = fair > smallest_ ? fair : smallest_;
      const int64_t last = size < total_ - current ? current + size : total_;
      if (next_.compare_exchange_weak(current, last, std::memory_order_relaxed)) {
        begin = current;
        end = last;
        return true;
      }
    }
    return false;
  }

 private:
  const int64_t total_, smallest_, divisor_;
  std::atomic<int64_t> next_{0};
};

// Waits until `count` reports of completion came; those who wait spin briefly, then yield.
class Latch {
 public:
  explicit Latch(int64_t count) : missing_(count) {}
  void report(int64_t count) { missing_.fetch_sub(count, std::memory_order_acq_rel); }
  void wait() const;

 private:
  std::atomic<int64_t> missing_;
};

// Runs work(begin, end) over pieces of [0, total), each `smallest` or more.
template <typename Work>
void for_pieces(const Team &team, int threads, int64_t total, int64_t smallest, Work work) {
  const int64_t pieces = (total + smallest - 1) / smallest;
  threads = static_cast<int>(std::clamp<int64_t>(pieces, 1, threads));
  struct Context {
    WorkQueue queue;
    Work &work;
  } context{WorkQueue(total, smallest, threads), work};
  team.run(
      team, threads,
      [](void *p) {
        Context &c = *static_cast<Context *>(p);
        int64_t begin = 0;
        int64_t end = 0;
        while (c.queue.take(begin, end)) c.work(begin, end);
      },
      &context);
}

}  // namespace fdk
