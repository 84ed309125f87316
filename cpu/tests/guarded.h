// Memory between two pages that nobody may touch: reading or writing past either end kills the
// test. A buffer is placed against one end of its pages, so each case runs against both ends.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

namespace fdk_test {

enum class Side { kFront, kBack };

class Guarded {
 public:
  Guarded(size_t bytes, Side side) : bytes_(bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inner = (bytes + page - 1) / page * page;
    mapped_ = inner + 2 * page;
    base_ = static_cast<char *>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) {
      std::perror("mmap");
      std::exit(2);
    }
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + page + inner, page, PROT_NONE);
    data_ = side == Side::kFront ? base_ + page : base_ + page + inner - bytes;
    std::memset(data_, 0xff, bytes);  // NaN in every floating-point format
  }
  template <typename T>
  Guarded(const std::vector<T> &values, Side side) : Guarded(values.size() * sizeof(T), side) {
    if (bytes_ > 0) std::memcpy(data_, values.data(), bytes_);
  }
  Guarded(Guarded &&other) noexcept
      : bytes_(other.bytes_),
        mapped_(other.mapped_),
        base_(std::exchange(other.base_, nullptr)),
        data_(other.data_) {}
  ~Guarded() {
    if (base_ != nullptr) munmap(base_, mapped_);
  }
  Guarded(const Guarded &) = delete;
  Guarded &operator=(const Guarded &) = delete;

  template <typename T>
  T *as() const { return reinterpret_cast<T *>(data_); }
  void *get() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  size_t bytes_;
  size_t mapped_ = 0;
  char *base_ = nullptr;
  char *data_ = nullptr;
};

}  // namespace fdk_test
