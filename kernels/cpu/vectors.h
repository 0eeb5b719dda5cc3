// Vectors of floats, and weights of every float type as pairs of them.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace wina {
namespace {

// GCC and Clang lower these to whatever the machine has (AVX2, AVX-512, NEON, SSE2).
constexpr int kLanes = 8;
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

// The sum of the lanes, always in the same order.
inline float sum(Floats v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// Two vectors: kStep consecutive columns, in the type's own order (see in_column_order).
constexpr int kStep = 2 * kLanes;
struct Pair {
  Floats a, b;
};

inline Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }

// A bfloat16 is the upper half of a float32. Seen as 32-bit words, the even columns are a shift
// away and the odd ones a mask: two instructions for two vectors, where widening would take a
// shuffle each. Accumulators keep that even/odd order until the last row.
inline Pair load_pair(const at::BFloat16* p) {
  Words w;
  std::memcpy(&w, p, sizeof w);
  const Words low = w << 16, high = w & 0xffff0000u;
  Pair v;
  std::memcpy(&v.a, &low, sizeof low);
  std::memcpy(&v.b, &high, sizeof high);
  return v;
}

inline Pair load_pair(const at::Half* p) {
#if defined(__F16C__)
  __m128i h[2];
  std::memcpy(h, p, sizeof h);
  const __m256 f[2] = {_mm256_cvtph_ps(h[0]), _mm256_cvtph_ps(h[1])};
  Pair v;
  std::memcpy(&v, f, sizeof v);
  return v;
#else
  float f[kStep];
  for (int i = 0; i < kStep; ++i) f[i] = static_cast<float>(p[i]);
  return load_pair(f);
#endif
}

inline void store_pair(float* p, Pair v) {
  store(p, v.a);
  store(p + kLanes, v.b);
}

// Undoes the even/odd order (on a big-endian machine odd/even) of whole steps.
template <class T>
void in_column_order(float* acc, int64_t width) {
  if (!std::is_same_v<T, at::BFloat16>) return;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  constexpr int even = kLanes, odd = 0;
#else
  constexpr int even = 0, odd = kLanes;
#endif
  for (int64_t n = 0; n + kStep <= width; n += kStep) {
    float step[kStep];
    for (int i = 0; i < kLanes; ++i) {
      step[2 * i] = acc[n + even + i];
      step[2 * i + 1] = acc[n + odd + i];
    }
    std::memcpy(acc + n, step, sizeof step);
  }
}

}  // namespace
}  // namespace wina
