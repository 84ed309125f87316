// Threads that stay: after a body they look for the next one for a moment before they sleep. A step
// of a model is hundreds of products of some ten microseconds each; to wake a thread that sleeps
// can take as long.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>

#include "parallel.h"
#include "platform.h"

namespace fdk {

// One team for the process; it works for one caller at a time. It is never destroyed: its threads
// wait for work until the process ends.
class Residents {
 public:
  static Residents &team() {
    static Residents *const residents = new Residents;
    return *residents;
  }

  // Runs body(context) on this thread and up to `threads` - 1 others, and returns when all have
  // returned. False, with nothing run, where the team works for another caller, or fork() did not
  // copy it.
  bool run(int threads, Body body, void *context) {
    std::unique_lock<std::mutex> lock(caller_, std::try_to_lock);
    if (!lock.owns_lock() || lost().load(std::memory_order_relaxed)) return false;
    start(threads - 1);
    body_ = body;
    context_ = context;
    tickets_.store(std::min(threads - 1, count_), std::memory_order_relaxed);
    inside_.fetch_and(~kClosed, std::memory_order_release);
    job_.fetch_add(1);
    for (int sleeping = asleep_.load(); sleeping > 0; --sleeping) job_.notify_one();
    body(context);
    inside_.fetch_or(kClosed, std::memory_order_acq_rel);
    for (int spins = 0; inside_.load(std::memory_order_acquire) != kClosed; ++spins)
      if (spins > 2000) std::this_thread::yield();
    return true;
  }

 private:
  static constexpr int kClosed = 1 << 30;
  // A layer's other operations take less; a team that nobody calls burns no more than this.
  static constexpr std::chrono::microseconds kPatience{200};

  Residents() {
    on_fork([] { lost().store(true); });
  }

  static std::atomic<bool> &lost() {
    static std::atomic<bool> lost{false};
    return lost;
  }

  void start(int wanted) {
    try {
      for (; count_ < wanted; ++count_) std::thread([this] { work(); }).detach();
    } catch (const std::system_error &) {
      // The process may start no more threads: those that there are do the work.
    }
  }

  [[noreturn]] void work() {
    unsigned seen = 0;
    for (;;) {
      seen = next(seen);
      // Who finds the door closed leaves: the work was done without it.
      if ((inside_.fetch_add(1, std::memory_order_acq_rel) & kClosed) == 0 &&
          tickets_.fetch_sub(1, std::memory_order_relaxed) > 0)
        body_(context_);
      inside_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  // Waits for a job other than the one seen.
  unsigned next(unsigned seen) {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    do {
      for (int i = 0; i < 64; ++i)
        if (const unsigned job = job_.load(std::memory_order_acquire); job != seen) return job;
      std::this_thread::yield();
    } while (std::chrono::steady_clock::now() < end);
    asleep_.fetch_add(1);
    job_.wait(seen);
    asleep_.fetch_sub(1);
    return job_.load(std::memory_order_acquire);
  }

  std::mutex caller_;
  Body body_ = nullptr;
  void *context_ = nullptr;
  int count_ = 0;  // threads, changed by callers only
  std::atomic<int> tickets_{0}, asleep_{0}, inside_{kClosed};
  std::atomic<unsigned> job_{0};
};

}  // namespace fdk
