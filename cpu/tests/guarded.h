// Memory between two pages that nobody may touch: reading or writing past either end kills the
// test. A buffer is placed against one end of its pages, so each case runs against both ends.
#pragma once

#if defined(_WIN32)
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

namespace fdk_test {

enum class Side { kFront, kBack };

#if defined(_WIN32)
inline size_t page_size() {
  SYSTEM_INFO info;
  GetSystemInfo(&info);
  return info.dwPageSize;
}
inline void *map_pages(size_t bytes) {
  return VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
}
inline void forbid_page(void *page, size_t bytes) {
  DWORD before = 0;
  VirtualProtect(page, bytes, PAGE_NOACCESS, &before);
}
inline void unmap_pages(void *pages, size_t) { VirtualFree(pages, 0, MEM_RELEASE); }
#else
inline size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
inline void *map_pages(size_t bytes) {
  void *pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return pages == MAP_FAILED ? nullptr : pages;
}
inline void forbid_page(void *page, size_t bytes) { mprotect(page, bytes, PROT_NONE); }
inline void unmap_pages(void *pages, size_t bytes) { munmap(pages, bytes); }
#endif

class Guarded {
 public:
  Guarded(size_t bytes, Side side) : bytes_(bytes) {
    const size_t page = page_size();
    const size_t inner = (bytes + page - 1) / page * page;
    mapped_ = inner + 2 * page;
    base_ = static_cast<char *>(map_pages(mapped_));
    if (base_ == nullptr) {
      std::fputs("no memory for a guarded buffer\n", stderr);
      std::exit(2);
    }
    forbid_page(base_, page);
    forbid_page(base_ + page + inner, page);
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
    if (base_ != nullptr) unmap_pages(base_, mapped_);
  }
  Guarded(const Guarded &) = delete;
  Guarded &operator=(const Guarded &) = delete;

  template <typename T>
  T *as() const {
    return reinterpret_cast<T *>(data_);
  }
  void *get() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  size_t bytes_;
  size_t mapped_ = 0;
  char *base_ = nullptr;
  char *data_ = nullptr;
};

}  // namespace fdk_test
