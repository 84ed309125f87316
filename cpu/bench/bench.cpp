// Benchmark of the library: bandwidth probes, dense bfloat16 and codebook products.
//
// All cases of a run take turns, round by round, so that a machine whose speed drifts treats them
// alike. Weights rotate through copies that no cache holds. Prints a table; --output FILE takes
// what was measured of each case as a line of JSON, of which fdk_jax/benchmark/records.py makes
// rows.
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <memory>
#include <regex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cases.h"
#include "options.h"
#include "report.h"

namespace {

using namespace fdk::bench;

double now_us() {
  const auto t = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::micro>(t).count();
}

// One sample: the mean of as many calls as fill round_ms.
void sample(Case &c, double round_ms, int64_t &copy, bool keep) {
  int64_t calls = 0;
  const double start = now_us();
  double passed = 0;
  do {
    c.call(copy++);
    ++calls;
    passed = now_us() - start;
  } while (passed < round_ms * 1000.0);
  if (keep) c.samples_us.push_back(passed / static_cast<double>(calls));
}

// Keeps processors busy with arithmetic: the last ones of those that the process may use.
class BusyCores {
 public:
  explicit BusyCores(int64_t count) {
#if !defined(__linux__)
    if (count > 0) fail("--busy_cores needs Linux");
#else
    cpu_set_t allowed;
    if (count == 0 || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    for (int cpu = CPU_SETSIZE - 1; cpu >= 0 && count > 0; --cpu)
      if (CPU_ISSET(cpu, &allowed)) {
        threads_.emplace_back([this, cpu] { spin(cpu); });
        --count;
      }
#endif
  }
  ~BusyCores() {
    stop_ = true;
    for (std::thread &thread : threads_) thread.join();
  }
  BusyCores(const BusyCores &) = delete;
  BusyCores &operator=(const BusyCores &) = delete;

 private:
#if defined(__linux__)
  void spin(int cpu) const {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (sched_setaffinity(0, sizeof one, &one) != 0) fail("cannot bind a busy thread");
    while (!stop_) continue;
  }
#endif
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

// Every element of one with every one of the other.
std::vector<std::pair<std::string, std::string>> pairs(const std::vector<std::string> &first,
                                                       const std::vector<std::string> &second) {
  std::vector<std::pair<std::string, std::string>> all;
  for (const std::string &a : first)
    for (const std::string &b : second) all.emplace_back(a, b);
  return all;
}

std::vector<Case> make_cases(const Options &o, int64_t threads) {
  std::vector<Case> cases;
  const std::regex include(o.include);
  auto memory =
      std::make_shared<Buffer>(std::max(static_cast<size_t>(o.rotate_mib) << 20, 2 * kProbeBytes));
  fill_random(*memory);
  cases.push_back(probe_case(memory, false, threads));
  cases.push_back(probe_case(memory, true, threads));
  for (const int64_t k : o.k)
    for (const int64_t n : o.n.empty() ? std::vector<int64_t>{k} : o.n) {
      for (const int64_t m : o.m)
        if (std::regex_search("dense", include)) cases.push_back(dense_case(o, m, k, n, threads));
      for (const int64_t bits : o.bits)
        for (const std::string &kind : o.codebook) {
          std::shared_ptr<Weights> weights;
          size_t probe = 0;
          for (const int64_t m : o.m)
            for (const auto &[arithmetic, isa] : pairs(o.arithmetic, o.isa)) {
              Case c = codebook_case(o, m, k, n, bits, arithmetic, kind, threads);
              c.isa = isa;
              if (!std::regex_search(c.name, include)) continue;
              if (weights == nullptr) {
                weights = make_weights(o, n, k, static_cast<int>(bits), kind);
                probe = cases.size();
                cases.push_back(weights_probe(c, weights));
              }
              c.probe = probe;
              if (o.busy_cores > 0 && m == 1 && threads > 1 && o.dtype == "bfloat16") {
                cases.push_back(c);
                bind_equal_split(cases.back(), weights);
              }
              bind_codebook(c, weights);
              cases.push_back(std::move(c));
            }
        }
    }
  return cases;
}

double rate(const Case &c) { return c.bytes / quantile(c.samples_us, 0.5) * 1e-3; }

void run(const Options &o, int64_t threads, std::ofstream &output) {
  const std::string isa = fdk_isa();
  std::vector<Case> cases = make_cases(o, threads);
  int64_t copy = 0;
  for (int round = -1; round < o.rounds; ++round)
    for (Case &c : cases) sample(c, o.round_ms, copy, round >= 0);
  std::printf("\n%s, ISA %s, %d thread(s)\n", processor_name().c_str(), isa.c_str(),
              static_cast<int>(threads));
  std::printf("%-28s %-10s %5s %6s %6s %4s %-8s %10s %9s %9s %7s %9s\n", "case", "ISA", "m", "k",
              "n", "bits", "codebook", "median us", "GB/s", "GFLOP/s", "of read", "error");
  for (const Case &c : cases) {
    // The share of the bandwidth is taken round by round, neighbours in time.
    const Case &probe = cases[c.probe];
    std::vector<double> shares;
    for (size_t i = 0; i < c.samples_us.size(); ++i)
      shares.push_back(c.bytes / c.samples_us[i] / (probe.bytes / probe.samples_us[i]));
    const double median = quantile(c.samples_us, 0.5);
    std::printf("%-28s %-10s %5lld %6lld %6lld %4lld %-8s %10.1f %9.2f %9.1f %6.1f%% %9.2g\n",
                c.name.c_str(), c.isa.c_str(), static_cast<long long>(c.m),
                static_cast<long long>(c.k), static_cast<long long>(c.n),
                static_cast<long long>(c.bits), c.codebook.c_str(), median, rate(c),
                c.ops / median * 1e-3, 100.0 * quantile(shares, 0.5), c.error);
    if (output.is_open())
      output << to_json(o, c, {rate(cases[1]), rate(probe)}) << "\n" << std::flush;
  }
}

}  // namespace

int main(int argc, char **argv) {
  Options options = parse(argc, argv);
  if (options.threads.empty()) options.threads = {fdk_default_num_threads()};
  std::ofstream output;
  if (!options.output.empty()) {
    output.open(options.output, std::ios::app);
    if (!output) fail("cannot write " + options.output);
  }
  const BusyCores busy(options.busy_cores);
  for (const int64_t threads : options.threads) run(options, threads, output);
  return 0;
}
