// Products of integer weights with integer inputs, of one token in bfloat16.
//
// Widened weights cost more instructions than they are bytes: here two weights meet two inputs in
// one instruction. For kGroup kept rows and a group of columns the inputs x_j * scale_j, which
// bfloat16 has known to 2^-9 only, are rounded to 16 bits, the largest of them being 32767. So the
// eight rows share what the rounding loses, and no others: however large an input is, rows of other
// groups keep theirs. Two kept rows lie beside each other in 32-bit words; their sums are exact in
// 32 bits (2^15 * 2^7 * 8 rows, or 2^15 * 15 * 16^2 * 8 rows for a nibble that is not shifted down)
// and join the float32 sums of the part once for kGroup rows. The error is stated in
// docs/numerics.md.

#pragma once

#include "integers.h"

#if defined(__AVX2__) && defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define WINA_ROUNDED 1
#if defined(__AVX512F__) && !(defined(__AVX512BW__) && defined(__AVX512VL__))
#undef WINA_ROUNDED
#endif
#endif

namespace wina {
namespace {

#if defined(WINA_ROUNDED)
constexpr bool kRounded = true;
constexpr int kPairs = kGroup / 2;
typedef uint16_t Halves __attribute__((vector_size(2 * kWide * sizeof(uint16_t))));
constexpr float kLargestInput = 32767.0f;
constexpr int32_t kSmallest = 27 << 23;   // the bits of 2^-100: 32767 / 2^-100 is finite
constexpr int32_t kNotFinite = 255 << 23;  // the bits of Inf; NaNs are above

// The inputs of kGroup rows for kWide groups of columns, by lanes.
struct Rounded {
  alignas(kLine) int32_t pair[kPairs][kWide];  // rows 2k (low half) and 2k + 1
  alignas(kLine) int32_t offset[kWide];        // -8 times the sum of all: 4 bits hold q + 8
  alignas(kLine) float unit[kWide];            // what 1 stands for
};

// The first n scales of a row, n <= kWide; 0 beyond.
inline WideFloats load_scales(const at::BFloat16* p, int64_t n) {
  WideWords words;
#if defined(__AVX512F__)
  const __m256i half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
  words = (WideWords)_mm512_cvtepu16_epi32(half);
#else
  __m128i half{};
  std::memcpy(&half, p, n * sizeof *p);
  words = (WideWords)_mm256_cvtepu16_epi32(half);
#endif
  words <<= 16;
  return (WideFloats)words;
}

inline bool any(WideIntegers lanes) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes);
#else
  return !_mm256_testz_si256((__m256i)lanes, (__m256i)lanes);
#endif
}

// False if some input is NaN, Inf or too small for this.
inline bool round_inputs(const float* x, const at::BFloat16* const* scales, int64_t n,
                         Rounded& out) {
  WideFloats v[kGroup];
  WideIntegers largest{};  // bits of absolute values, which are ordered like these
#pragma GCC unroll 8
  for (int r = 0; r < kGroup; ++r) {
    v[r] = x[r] * load_scales(scales[r], n);
    const WideIntegers size = (WideIntegers)v[r] & INT32_MAX;
    largest = size > largest ? size : largest;
  }
  if (any((largest >= kNotFinite) | ((largest < kSmallest) & (largest != 0)))) return false;
  const WideIntegers held = largest > kSmallest ? largest : WideIntegers{} + kSmallest;
  const WideFloats inverse = kLargestInput / (WideFloats)held;
  constexpr float round = 12582912.0f;  // 1.5 * 2^23: its last bit is 1
  constexpr int32_t bits_of_round = 0x4b400000;
  WideIntegers u[kGroup], total{};
#pragma GCC unroll 8
  for (int r = 0; r < kGroup; ++r) {
    u[r] = (WideIntegers)(v[r] * inverse + round) - bits_of_round;
    total += u[r];
  }
#pragma GCC unroll 4
  for (int k = 0; k < kPairs; ++k) {
    const WideIntegers pair =
        (u[2 * k] & 0xffff) | (WideIntegers)((WideWords)u[2 * k + 1] << 16);
    std::memcpy(out.pair[k], &pair, sizeof pair);
  }
  const WideIntegers offset = total * -8;
  std::memcpy(out.offset, &offset, sizeof offset);
  store_wide(out.unit, (WideFloats)held * (1.0f / kLargestInput));
  return true;
}

// sums + w * u for 16-bit halves, both products of a word.
inline WideIntegers dot(WideIntegers sums, WideIntegers w, WideIntegers u) {
#if defined(__AVX512VNNI__)
  return (WideIntegers)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)w, (__m512i)u);
#elif defined(__AVX512F__)
  return sums + (WideIntegers)_mm512_madd_epi16((__m512i)w, (__m512i)u);
#else
  return sums + (WideIntegers)_mm256_madd_epi16((__m256i)w, (__m256i)u);
#endif
}

// Columns of two rows in 16 bits as words of the two, those of `low` halves of 128 bits first.
inline void interleaved(const int8_t* even, const int8_t* odd, WideIntegers& low,
                        WideIntegers& high) {
#if defined(__AVX512F__)
  const auto load = [](const int8_t* p) {
    __m256i b;
    std::memcpy(&b, p, sizeof b);
    return _mm512_cvtepi8_epi16(b);
  };
  const __m512i a = load(even), b = load(odd);
  low = (WideIntegers)_mm512_unpacklo_epi16(a, b);
  high = (WideIntegers)_mm512_unpackhi_epi16(a, b);
#else
  const auto load = [](const int8_t* p) {
    __m128i b;
    std::memcpy(&b, p, sizeof b);
    return _mm256_cvtepi8_epi16(b);
  };
  const __m256i a = load(even), b = load(odd);
  low = (WideIntegers)_mm256_unpacklo_epi16(a, b);
  high = (WideIntegers)_mm256_unpackhi_epi16(a, b);
#endif
}

inline void join(const float* before, float* sums, WideIntegers products, float unit) {
  store_wide(sums, load_wide(before) + unit * __builtin_convertvector(products, WideFloats));
}

inline WideIntegers all(int32_t v) { return WideIntegers{} + v; }

// sums = before + the product of kGroup rows with P * 2 * kWide columns, in the order of
// in_column_order(Int8) below.
template <int P>
inline void multiply_rounded(const int8_t* const* row, int64_t from, int64_t column,
                             const Rounded& in, int lane, const float* before, float* sums) {
  WideIntegers a[P][2] = {};
#pragma GCC unroll 4
  for (int k = 0; k < kPairs; ++k) {
    const WideIntegers u = all(in.pair[k][lane]);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      WideIntegers low, high;
      const int64_t at = from + column + p * 2 * kWide;
      interleaved(row[2 * k] + at, row[2 * k + 1] + at, low, high);
      a[p][0] = dot(a[p][0], low, u);
      a[p][1] = dot(a[p][1], high, u);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const int64_t at = column + (2 * p + h) * kWide;
      join(before + at, sums + at, a[p][h], in.unit[lane]);
    }
}

// sums[0 .. columns of the group) = before[..] + the product of kGroup rows with a group of columns,
// which begins at byte `from` of every row.
inline void add_rounded(Int8, const int8_t* const* row, int64_t from, int64_t bytes,
                        const Rounded& in, int lane, const float* before, float* sums) {
  constexpr int64_t whole = 4 * 2 * kWide;
  int64_t n = 0;
  for (; n + whole <= bytes; n += whole) multiply_rounded<4>(row, from, n, in, lane, before, sums);
  if (n < bytes) multiply_rounded<2>(row, from, n, in, lane, before, sums);  // half of a group
}

inline void add_rounded(Int4, const int8_t* const* row, int64_t from, int64_t, const Rounded& in,
                        int lane, const float* before, float* sums) {
  constexpr int kHalf = kNibbles / 2;  // nibbles of 16 bits
  constexpr int shift[kHalf] = {0, 4, 8, 0};  // the last is shifted down: it would be negative
  const float unit = in.unit[lane];
#pragma GCC unroll 2
  for (int first = 0; first < kWordsOfGroup; first += kWide) {
    WideIntegers a[2][kHalf];
#pragma GCC unroll 4
    for (int p = 0; p < kHalf; ++p) a[0][p] = a[1][p] = all(in.offset[lane] * (1 << shift[p]));
#pragma GCC unroll 4
    for (int k = 0; k < kPairs; ++k) {
      const WideIntegers u = all(in.pair[k][lane]);
      const int64_t at = from + first * static_cast<int64_t>(sizeof(uint32_t));
      const WideWords even = load_words(row[2 * k] + at), odd = load_words(row[2 * k + 1] + at);
      const WideWords words[2] = {(even & 0xffffu) | (odd << 16),
                                  (even >> 16) | (odd & 0xffff0000u)};
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        a[h][0] = dot(a[h][0], (WideIntegers)(words[h] & 0x000f000fu), u);
        a[h][1] = dot(a[h][1], (WideIntegers)(words[h] & 0x00f000f0u), u);
        a[h][2] = dot(a[h][2], (WideIntegers)(words[h] & 0x0f000f00u), u);
        a[h][3] = dot(a[h][3], (WideIntegers)((Halves)words[h] >> 12), u);
      }
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
#pragma GCC unroll 4
      for (int p = 0; p < kHalf; ++p) {
        const int64_t at = (h * kHalf + p) * kWordsOfGroup + first;
        join(before + at, sums + at, a[h][p], unit / static_cast<float>(1 << shift[p]));
      }
  }
}

// Where add_rounded leaves column n of a group.
inline int64_t place_of(Int8, int64_t n) {
  constexpr int64_t run = 4, both = 2 * kWide;  // 4 columns of 32 bits fill 128
  const int64_t at = n % both, lane = at / (2 * run), half = at / run % 2;
  return n - at + half * kWide + lane * run + at % run;
}
inline int64_t place_of(Int4, int64_t n) { return n; }

// The sums of whole groups from the first on, in column order.
inline void in_column_order(Int8, float* sums, int64_t width) {
  constexpr int64_t both = 2 * kWide, run = 4;
  for (int64_t n = 0; n < width; n += both) {
    float ordered[both];
#pragma GCC unroll 8
    for (int64_t at = 0; at < both; at += run)
      std::memcpy(ordered + at, sums + n + place_of(Int8{}, at), run * sizeof(float));
    std::memcpy(sums + n, ordered, sizeof ordered);
  }
}
inline void in_column_order(Int4, float*, int64_t) {}

// The same for inputs that cannot be rounded, one by one: Inf times an integer is what it is.
template <class Format>
void add_exactly(Format, const int8_t* const* row, int64_t from, int64_t bytes, const float* c,
                 const float* before, float* sums) {
  for (int64_t n = 0; n < bytes * 8 / Format::kBits; ++n) {
    const int64_t at = place_of(Format{}, n);
    float a = 0.0f;
    for (int r = 0; r < kGroup; ++r) a += c[r] * Format::value(row[r] + from, n);
    sums[at] = before[at] + a;
  }
}
#else
constexpr bool kRounded = false;
#endif

}  // namespace
}  // namespace wina
