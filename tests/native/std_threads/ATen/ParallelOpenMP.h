// Stands in for torch's header of this name when the kernels are built for ThreadSanitizer: the
// same split of the range, on threads that the sanitizer follows. It sees neither the starts nor the
// barriers of an OpenMP runtime that was built without it.

#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#define INTRA_OP_PARALLEL

namespace at::internal {

template <typename F>
inline void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  int64_t count = at::get_num_threads();
  if (grain_size > 0) count = std::min(count, divup(end - begin, grain_size));
  const int64_t chunk = divup(end - begin, count);
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += chunk)
    threads.emplace_back([&f, first, last = std::min(end, first + chunk)] { f(first, last); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace at::internal
