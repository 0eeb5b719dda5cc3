// Mistakes that the sanitizers must find, each called once by the test that shows it.

#include <ATen/Parallel.h>

#include <climits>
#include <cstdint>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {
volatile int sink;
}

EXPORTED void plant_overflow() {
  std::vector<int> values(13);
  const int* data = values.data();
  sink = data[13];
}

EXPORTED void plant_undefined() {
  volatile int large = INT_MAX;
  sink = large + 1;
}

// Two chunks add to one number.
EXPORTED void plant_race() {
  int64_t sum = 0;
  at::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sum += i;
  });
  sink = static_cast<int>(sum);
}
