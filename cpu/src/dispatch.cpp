#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "isas.h"
#include "plan.h"
#include "platform.h"

namespace fdk {
namespace {

// The best first. A build without an ISA's translation unit leaves it out (FDK_WITHOUT_SIMD).
constexpr const Isa *kIsas[] = {
#if defined(__x86_64__) && !defined(FDK_WITHOUT_SIMD)
    &kAmxIsa,    &kAvx512Bf16Isa, &kAvx512VnniIsa, &kAvx2Isa,
#endif
#if defined(__aarch64__) && !defined(FDK_WITHOUT_SIMD)
#if defined(__linux__)
    &kSve2Isa,
#endif
    &kBf16Isa,   &kI8mmIsa,       &kDotprodIsa,    &kNeonIsa,
#endif
    &kScalarIsa,
};

bool is_preferred(const Isa &isa) { return isa.preferred == nullptr || isa.preferred(); }

const Isa *best_isa() {
  for (const Isa *isa : kIsas)
    if (isa->available() && is_preferred(*isa)) return isa;
  return &kScalarIsa;
}

const Isa *initial_isa() {
  const char *name = std::getenv("FDK_CPU_ISA");
  if (name == nullptr || *name == '\0') return best_isa();
  const Isa *isa = find_isa(name);
  // An unusable request must not end in an illegal instruction; fdk_set_isa reports it.
  return isa != nullptr && isa->available() ? isa : best_isa();
}

std::atomic<const Isa *> g_isa{nullptr};

// Calls use(isa) for the current ISA and those below it that are preferred, until one returns
// true.
template <typename Use>
bool any_usable_isa(Use use) {
  const Isa *current = &current_isa();
  bool below = false;
  for (const Isa *isa : kIsas) {
    below = below || isa == current;
    if (below && (isa == current || is_preferred(*isa)) && use(*isa)) return true;
  }
  return false;
}

struct FreeAligned {
  void operator()(void *p) const { free_aligned(p); }
};
using Buffer = std::unique_ptr<void, FreeAligned>;

constexpr size_t kAlignment = 64;

size_t round_up(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

Buffer allocate(size_t bytes) {
  if (bytes == 0) return nullptr;
  void *p = allocate_aligned(kAlignment, round_up(bytes));
  if (p == nullptr) throw std::bad_alloc();
  return Buffer(p);
}

// Everything the members of a team share.
struct Job {
  const Plan &plan;
  const Kernel &kernel;
  void *prepared;
  char *scratch;
  size_t scratch_stride;
  std::atomic<int> members{0};
  WorkQueue tokens;
  Latch tokens_ready;
  int64_t token_parts;  // pieces of m that are handed out with each piece of tiles
  WorkQueue tiles;      // over token_parts * tiles

  Job(const Plan &plan_, const Kernel &kernel_, void *prepared_, char *scratch_, size_t stride,
      int64_t token_parts_, int threads)
      : plan(plan_),
        kernel(kernel_),
        prepared(prepared_),
        scratch(scratch_),
        scratch_stride(stride),
        tokens(plan_.m, 1, threads),
        tokens_ready(plan_.m),
        token_parts(token_parts_),
        tiles(token_parts_ * plan_.tiles, kernel_.preferred_tiles, threads) {}
};

// Tiles [begin, end) for a range of tokens, cut where the codebook changes.
void run_tiles(const Job &job, void *scratch, Range range, int64_t begin, int64_t end) {
  const Plan &plan = job.plan;
  const int64_t rows = plan.n / plan.num_codebooks;
  const int64_t last_row = std::min(end * kTileRows, plan.n);
  for (int64_t row = begin * kTileRows; row < last_row;) {
    range.codebook = row / rows;
    range.row_begin = row;
    range.row_end = std::min((range.codebook + 1) * rows, last_row);
    range.tile_begin = row / kTileRows;
    range.tile_end = ceil_div(range.row_end, kTileRows);
    job.kernel.run(plan, job.prepared, scratch, range);
    row = range.row_end;
  }
}

void take_part(void *context) {
  Job &job = *static_cast<Job *>(context);
  const Plan &plan = job.plan;
  int64_t begin = 0;
  int64_t end = 0;
  while (job.tokens.take(begin, end)) {
    job.kernel.prepare(plan, job.prepared, begin, end);
    job.tokens_ready.report(end - begin);
  }
  job.tokens_ready.wait();
  char *scratch = job.scratch + static_cast<size_t>(job.members.fetch_add(1)) * job.scratch_stride;
  while (job.tiles.take(begin, end)) {
    while (begin < end) {  // a piece may reach into the next part of the tokens
      const int64_t part = begin / plan.tiles;
      const int64_t tile = begin % plan.tiles;
      const int64_t count = std::min(end - begin, plan.tiles - tile);
      Range range{};
      const int64_t groups = ceil_div(plan.m, kTokenGroup);
      range.token_begin = part * groups / job.token_parts * kTokenGroup;
      range.token_end = std::min((part + 1) * groups / job.token_parts * kTokenGroup, plan.m);
      run_tiles(job, scratch, range, tile, tile + count);
      begin += count;
    }
  }
}

// With few tiles and many tokens, the tokens are divided as well.
int64_t choose_token_parts(const Plan &plan, const Kernel &kernel, int threads) {
  constexpr int64_t smallest_part = 32;
  const int64_t pieces = ceil_div(plan.tiles, kernel.preferred_tiles);
  const int64_t wanted = ceil_div(int64_t{4} * threads, pieces);
  return threads == 1 ? 1 : std::clamp(wanted, int64_t{1}, ceil_div(plan.m, smallest_part));
}

// The first entry that a usable ISA has.
template <typename T>
T first_of(T Isa::*member) {
  T found = nullptr;
  if (any_usable_isa([&](const Isa &isa) { return (found = isa.*member) != nullptr; }))
    return found;
  throw Error(FDK_INTERNAL, "no ISA offers the function");
}

}  // namespace

std::span<const Isa *const> all_isas() { return kIsas; }

const Isa *find_isa(const char *name) {
  for (const Isa *isa : kIsas)
    if (std::strcmp(isa->name, name) == 0) return isa;
  return nullptr;
}

const Isa &current_isa() {
  const Isa *isa = g_isa.load(std::memory_order_relaxed);
  if (isa == nullptr) {
    isa = initial_isa();
    g_isa.store(isa, std::memory_order_relaxed);
  }
  return *isa;
}

void set_isa(const char *name) {
  if (name == nullptr) {
    g_isa.store(initial_isa());
    return;
  }
  const Isa *isa = find_isa(name);
  if (isa == nullptr) invalid(std::string("no such ISA: ") + name);
  if (!isa->available())
    throw Error(FDK_UNSUPPORTED, std::string("this machine lacks the ISA ") + name);
  g_isa.store(isa);
}

const Kernel &choose_kernel(const Plan &plan) {
  const Kernel *found = nullptr;
  const auto has_kernel = [&](const Isa &isa) {
    for (const Kernel &kernel : isa.kernels)
      if (found == nullptr && kernel.supports(plan)) found = &kernel;
    return found != nullptr;
  };
  if (any_usable_isa(has_kernel)) return *found;
  throw Error(FDK_INTERNAL, "no kernel supports the plan");
}

void run_plan(const Plan &plan, const Team &team, int threads) {
  const Kernel &kernel = choose_kernel(plan);
  const int64_t token_parts = choose_token_parts(plan, kernel, threads);
  const int64_t pieces = ceil_div(token_parts * plan.tiles, kernel.preferred_tiles);
  threads = static_cast<int>(std::min<int64_t>(threads, std::max(pieces, int64_t{1})));
  const size_t stride = kernel.scratch_bytes == nullptr ? 0 : round_up(kernel.scratch_bytes(plan));
  const Buffer prepared = allocate(kernel.prepared_bytes(plan));
  const Buffer scratch = allocate(stride * static_cast<size_t>(threads));
  Job job(plan, kernel, prepared.get(), static_cast<char *>(scratch.get()), stride, token_parts,
          threads);
  team.run(team, threads, take_part, &job);
}

void run_dense(const fdk_dense_args &args, const Team &team, int threads) {
  const DenseRows rows = first_of(&Isa::dense_rows);
  for_pieces(team, threads, args.out_features, kTileRows,
             [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

// work(i, scratch) for i in [0, count), in any order on the threads, each with scratch of its own.
template <typename Work>
void for_each_with_scratch(const Team &team, int threads, int64_t count, int64_t floats,
                           const Work &work) {
  const size_t stride = round_up(static_cast<size_t>(floats) * sizeof(float));
  const Buffer scratch = allocate(stride * static_cast<size_t>(threads));
  std::atomic<int> members{0};
  WorkQueue queue(count, 1, threads);
  auto take = [&] {
    const size_t first = stride * static_cast<size_t>(members.fetch_add(1));
    auto *own = reinterpret_cast<float *>(static_cast<char *>(scratch.get()) + first);
    int64_t begin = 0;
    int64_t end = 0;
    while (queue.take(begin, end))
      for (int64_t i = begin; i < end; ++i) work(i, own);
  };
  team.run(team, threads, [](void *data) { (*static_cast<decltype(take) *>(data))(); }, &take);
}

// As many threads as have enough multiply-adds to be worth waking.
int threads_for(int64_t work, int threads) {
  constexpr int64_t worth_a_thread = int64_t{1} << 17;
  return static_cast<int>(std::clamp(work / worth_a_thread, int64_t{1}, int64_t{threads}));
}

void run_attention(const Attention &args, const Team &team, int threads) {
  const Decoding &loops = *first_of(&Isa::decoding);
  int64_t longest = 0;
  int64_t slots = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    longest = std::max(longest, args.slot(b) + 1);
    slots += args.slot(b) + 1;
  }
  threads = threads_for(slots * args.heads * args.head_dim, threads);
  for_each_with_scratch(team, threads, args.batch * args.kv_heads, args.scratch(longest),
                        [&](int64_t i, float *scratch) {
                          loops.attend(args, i / args.kv_heads, i % args.kv_heads, scratch);
                        });
}

void run_prompt_attention(const PromptAttention &args, const Team &team, int threads) {
  const Decoding &loops = *first_of(&Isa::decoding);
  const int64_t blocks = ceil_div(args.tokens, args.block_tokens());
  const int64_t heads = args.batch * args.kv_heads;
  threads =
      threads_for(args.batch * args.tokens * args.tokens * args.heads * args.head_dim, threads);
  // The last tokens see the most keys: they begin.
  for_each_with_scratch(
      team, threads, blocks * heads, args.scratch(), [&](int64_t i, float *scratch) {
        const int64_t token = (blocks - 1 - i / heads) * args.block_tokens();
        const int64_t head = i % heads;
        loops.attend_block(args, head / args.kv_heads, head % args.kv_heads, token, scratch);
      });
}

void run_few_tokens(const FewTokens &args, const Team &team, int threads) {
  const Decoding &loops = *first_of(&Isa::decoding);
  const int64_t step = args.rows ? args.n : kDenseColumns;
  for_pieces(team, threads, args.n, args.rows ? kTileRows : kDenseColumns,
             [&](int64_t begin, int64_t end) {
               for (; begin < end; begin += step)
                 loops.dense(args, begin, std::min(begin + step, end));
             });
}

void run_probe_copy(const void *source, void *target, size_t bytes, const Team &team, int threads) {
  const ProbeCopy copy = first_of(&Isa::probe_copy);
  for_pieces(team, threads, static_cast<int64_t>(bytes), int64_t{1} << 18,
             [&](int64_t begin, int64_t end) {
               copy(static_cast<const char *>(source) + begin, static_cast<char *>(target) + begin,
                    static_cast<size_t>(end - begin));
             });
}

int64_t run_probe_sum(const int32_t *source, size_t count, const Team &team, int threads) {
  const ProbeSum sum = first_of(&Isa::probe_sum);
  // Streams lie near one another, as those of a product do.
  constexpr auto kPiece = int64_t{1} << 16;
  const auto all = static_cast<int64_t>(count);
  std::atomic<int64_t> total{0};
  for_pieces(team, threads, ceil_div(all, kPiece), 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * kPiece; at < std::min(end * kPiece, all); at += kPiece)
      total.fetch_add(sum(source + at, static_cast<size_t>(std::min(kPiece, all - at))));
  });
  return total.load();
}

}  // namespace fdk
