// Which channels a token keeps: not |x| <= threshold * scale. As a list of rows, a masked copy, or a
// boolean for each channel.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <deque>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace wina {
namespace {

// The rows that at least one token keeps, in ascending order.
struct KeptRows {
  std::vector<int32_t> index;  // count entries and a repeat, which may be prefetched; and room
  std::vector<float> coef;     // [count][tokens], 0 where a token drops the row; and room
  int64_t count = 0;
};

inline float cutoff(float threshold, float scale) {
  // FLT_MAX, so that |Inf| > cutoff even when the threshold is +inf. A NaN passes and keeps.
  const float t = threshold * scale;
  return t > FLT_MAX ? FLT_MAX : t;
}

constexpr int64_t kSelected = 16;  // entries that a list of kept rows may be written beyond its end

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
inline __m512 load_some(const float* p, __mmask16 which) { return _mm512_maskz_loadu_ps(which, p); }
inline __m512 load_some(const at::BFloat16* p, __mmask16 which) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}
inline __m512 load_some(const at::Half* p, __mmask16 which) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(which, p));
}

// Which of the 16 channels from x[0] on are kept, of those that are there; `wide` gets them.
template <class T>
inline __mmask16 keep_some(const T* x, const float* threshold, __m512 factor, __mmask16 there,
                           __m512& wide) {
  wide = load_some(x, there);
  // The minimum is its second operand if that is a NaN; a comparison with a NaN keeps.
  const __m512 cut = _mm512_min_ps(
      _mm512_set1_ps(FLT_MAX), _mm512_mul_ps(_mm512_maskz_loadu_ps(there, threshold), factor));
  return _mm512_mask_cmp_ps_mask(there, _mm512_abs_ps(wide), cut, _CMP_NLE_UQ);
}

inline __mmask16 first_of_16(int64_t n) {
  return static_cast<__mmask16>(n < 16 ? (1u << n) - 1 : 0xffffu);
}

// The rows that one token keeps and their coefficients; returns how many. Both lists are written in
// whole vectors.
template <class T>
int64_t select_of_one_token(const T* x, int64_t K, const float* threshold, float scale,
                            int32_t* index, float* coef) {
  const __m512 factor = _mm512_set1_ps(scale);
  __m512i at = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  int64_t count = 0;
  for (int64_t first = 0; first < K; first += 16) {
    __m512 wide;
    const __mmask16 keep =
        keep_some(x + first, threshold + first, factor, first_of_16(K - first), wide);
    _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(keep, at));
    _mm512_storeu_ps(coef + count, _mm512_maskz_compress_ps(keep, wide));
    count += __builtin_popcount(keep);
    at = _mm512_add_epi32(at, _mm512_set1_epi32(16));
  }
  return count;
}

inline void store_some(float* y, const float* x, __mmask16 there, __mmask16 keep) {
  _mm512_mask_storeu_ps(y, there, _mm512_maskz_loadu_ps(keep, x));
}
template <class T>  // of 16 bits
inline void store_some(T* y, const T* x, __mmask16 there, __mmask16 keep) {
  static_assert(sizeof(T) == 2);
  _mm256_mask_storeu_epi16(y, there, _mm256_maskz_loadu_epi16(keep, x));
}

// put(first, there, keep) for every 16 channels from `first` on.
template <class T, class Put>
void for_kept(const T* x, int64_t K, const float* threshold, float scale, const Put& put) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t first = 0; first < K; first += 16) {
    const __mmask16 there = first_of_16(K - first);
    __m512 wide;
    put(first, there, keep_some(x + first, threshold + first, factor, there, wide));
  }
}

// y = x with the dropped channels set to zero, of one token.
template <class T>
void mask_of_one_token(const T* x, int64_t K, const float* threshold, float scale, T* y) {
  for_kept(x, K, threshold, scale, [&](int64_t first, __mmask16 there, __mmask16 keep) {
    store_some(y + first, x + first, there, keep);
  });
}

// Which channels one token keeps.
template <class T>
void keep_of_one_token(const T* x, int64_t K, const float* threshold, float scale, bool* kept) {
  for_kept(x, K, threshold, scale, [&](int64_t first, __mmask16 there, __mmask16 keep) {
    _mm_mask_storeu_epi8(kept + first, there, _mm_maskz_set1_epi8(keep, 1));
  });
}
#else
// The same in blocks: first what is done in vectors, then, branch-free, a list: always write,
// advance only when kept.
template <class T>
int64_t select_of_one_token(const T* x, int64_t K, const float* threshold, float scale,
                            int32_t* index, float* coef) {
  constexpr int64_t block = 128;
  float wide[block];
  int32_t keep[block];
  int64_t count = 0;
  for (int64_t first = 0; first < K; first += block) {
    const int64_t n = std::min(block, K - first);
    for (int64_t i = 0; i < n; ++i) wide[i] = static_cast<float>(x[first + i]);
    for (int64_t i = 0; i < n; ++i)
      keep[i] = !(std::fabs(wide[i]) <= cutoff(threshold[first + i], scale));
    for (int64_t i = 0; i < n; ++i) {
      index[count] = static_cast<int32_t>(first + i);
      coef[count] = wide[i];
      count += keep[i];
    }
  }
  return count;
}

template <class T>
void mask_of_one_token(const T* x, int64_t K, const float* threshold, float scale, T* y) {
  for (int64_t j = 0; j < K; ++j) {
    const bool drop = std::fabs(static_cast<float>(x[j])) <= cutoff(threshold[j], scale);
    y[j] = drop ? T(0) : x[j];
  }
}

template <class T>
void keep_of_one_token(const T* x, int64_t K, const float* threshold, float scale, bool* kept) {
  for (int64_t j = 0; j < K; ++j)
    kept[j] = !(std::fabs(static_cast<float>(x[j])) <= cutoff(threshold[j], scale));
}
#endif

template <class T>
void select_rows(KeptRows& rows, const T* x, int64_t K, int tokens, const float* threshold,
                 const float* scale) {
  // Grow only: no allocation from the second call on.
  const auto grow = [](auto& v, int64_t n) {
    if (static_cast<int64_t>(v.size()) < n) v.resize(n);
  };
  grow(rows.index, K + kSelected);
  grow(rows.coef, K * tokens + kSelected);
  int32_t* index = rows.index.data();
  float* coef = rows.coef.data();
  int64_t count = 0;
  if (tokens == 1) {
    count = select_of_one_token(x, K, threshold, scale ? scale[0] : 1.0f, index, coef);
  } else {
    for (int64_t j = 0; j < K; ++j) {
      float* c = coef + count * tokens;
      bool any = false;
      for (int t = 0; t < tokens; ++t) {
        const float v = static_cast<float>(x[t * K + j]);
        const bool keep = !(std::fabs(v) <= cutoff(threshold[j], scale ? scale[t] : 1.0f));
        c[t] = keep ? v : 0.0f;
        any |= keep;
      }
      index[count] = static_cast<int32_t>(j);
      count += any;
    }
  }
  index[count] = count ? index[count - 1] : 0;
  rows.count = count;
}

// The calling thread's lists: one for each projection of a call that has its own.
KeptRows& kept_rows(size_t which) {
  static thread_local std::deque<KeptRows> rows;  // never moves one
  while (rows.size() <= which) rows.emplace_back();
  return rows[which];
}

}  // namespace
}  // namespace wina
