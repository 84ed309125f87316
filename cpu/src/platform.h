// What differs between operating systems.
#pragma once

#include <cstddef>

namespace fdk {

// Processors that this process may use, at least 1.
int processors_of_process();

// Calls `in_child` in every child of fork() from now on, where there is fork().
void on_fork(void (*in_child)());

// Memory aligned to `alignment`, of a multiple of it; null when there is none.
void *allocate_aligned(size_t alignment, size_t bytes);
void free_aligned(void *memory);

}  // namespace fdk
