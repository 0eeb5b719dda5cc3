// Integer weights: the formats of kernels/quantization.py, their checks, and back to floats.

#pragma once

#include "common.h"

namespace wina {
namespace {

constexpr int64_t kColumns = 128;  // of a group: one scale a row

// Integers take several instructions each vector, so its width counts for more than with floats: as
// wide as the machine has it.
#if defined(__AVX512F__)
constexpr int kWide = 16;
#else
constexpr int kWide = kLanes;
#endif
typedef float WideFloats __attribute__((vector_size(kWide * sizeof(float))));
typedef int32_t WideIntegers __attribute__((vector_size(kWide * sizeof(int32_t))));
typedef uint32_t WideWords __attribute__((vector_size(kWide * sizeof(uint32_t))));
typedef int8_t Bytes __attribute__((vector_size(kWide)));

inline WideFloats load_wide(const float* p) {
  WideFloats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store_wide(float* p, WideFloats v) { std::memcpy(p, &v, sizeof v); }

// The two halves of wide lanes added, where there are two.
inline Floats folded(WideFloats v) {
  Floats part[kWide / kLanes];
  std::memcpy(part, &v, sizeof v);
  return kWide == kLanes ? part[0] : part[0] + part[kWide / kLanes - 1];
}

// kWide 8-bit weights. GCC 12 widens them one by one where it is not told how.
inline WideFloats load_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  __m128i b;
  std::memcpy(&b, p, sizeof b);
  const __m512i words = _mm512_cvtepi8_epi32(b);
#elif defined(__AVX2__)
  int64_t b;
  std::memcpy(&b, p, sizeof b);
  const __m256i words = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(b));
#else
  Bytes words;
  std::memcpy(&words, p, sizeof words);
#endif
#if defined(__AVX2__)
  WideIntegers q;
  std::memcpy(&q, &words, sizeof q);
  return __builtin_convertvector(q, WideFloats);
#else
  return __builtin_convertvector(words, WideFloats);
#endif
}

struct Int8 {
  static constexpr int64_t kBits = 8, kBytes = kColumns;  // of a weight, of a group

  static float value(const int8_t* group, int64_t column) { return group[column]; }
};

struct Int4 {
  static constexpr int64_t kBits = 4, kBytes = kColumns / 2;

  static float value(const int8_t* group, int64_t column) {
    const int64_t word = column % 16, nibble = column / 16;
    const auto byte = static_cast<uint8_t>(group[4 * word + nibble / 2]);
    return static_cast<float>((nibble % 2 ? byte >> 4 : byte & 15) - 8);
  }
};

// Nibble p of a vector of words without shifting it down: q + 8, times 16^p, which the other factor
// makes up for (nibble_unit). Only the last nibble is shifted, to keep it off the sign bit.
constexpr int kNibbles = 8;
constexpr int kWordsOfGroup = 16;
constexpr int nibble_shift(int p) { return p == kNibbles - 1 ? 4 : 0; }
constexpr int nibble_at(int p) { return 4 * p - nibble_shift(p); }
constexpr float nibble_unit(int p) { return 1.0f / static_cast<float>(int64_t{1} << nibble_at(p)); }

inline WideWords load_words(const int8_t* p) {
  WideWords w;
  std::memcpy(&w, p, sizeof w);
  return w;
}

inline WideFloats nibbles(WideWords w, int p) {
  const WideWords bits = (w >> nibble_shift(p)) & (15u << nibble_at(p));
  WideIntegers q;
  std::memcpy(&q, &bits, sizeof q);
  return __builtin_convertvector(q, WideFloats);
}

template <class F>
void with_format(int64_t bits, const F& f) {
  if (bits == Int8::kBits)
    f(Int8{});
  else
    f(Int4{});
}

// A checked matrix of integers.
struct Packed {
  Tensor packed;  // [rows, row bytes] int8
  Tensor scales;  // [rows, scales of a row] bfloat16
  int64_t columns;
  int64_t bits;

  int64_t groups() const { return (columns + kColumns - 1) / kColumns; }
};

Packed check_packed(const char* op, const char* prefix, int64_t rows, const Tensor& packed,
                    const Tensor& scales, int64_t columns, int64_t bits) {
  TORCH_CHECK(bits == Int8::kBits || bits == Int4::kBits, op, ": bits must be 8 or 4, got ", bits);
  const Packed q{packed, scales, columns, bits};
  const int64_t line = kLine * 8 / bits, row_bytes = (columns + line - 1) / line * kLine;
  const int64_t row_scales = q.groups() + q.groups() % 2;
  TORCH_CHECK(packed.dim() == 2 && packed.size(0) == rows && packed.size(1) == row_bytes &&
                  packed.scalar_type() == at::kChar && packed.is_contiguous() && packed.is_cpu(),
              op, ": ", prefix, "packed of ", columns, " columns in ", bits, " bits must be [",
              rows, ", ", row_bytes, "] int8, contiguous, on the CPU; got ", packed.sizes(), " ",
              packed.scalar_type());
  TORCH_CHECK(scales.dim() == 2 && scales.size(0) == rows && scales.size(1) == row_scales &&
                  scales.scalar_type() == at::kBFloat16 && scales.is_contiguous() &&
                  scales.is_cpu(),
              op, ": ", prefix, "scales of ", columns, " columns must be [", rows, ", ", row_scales,
              "] bfloat16, contiguous, on the CPU; got ", scales.sizes(), " ",
              scales.scalar_type());
  return q;
}

// Some rows and groups of columns as float32 [rows, groups * kColumns].
Tensor dequantized(const Packed& q, int64_t first_row, int64_t rows, int64_t first_group,
                   int64_t groups) {
  const int64_t row_bytes = q.packed.size(1), row_scales = q.scales.size(1);
  const int64_t width = groups * kColumns;
  Tensor w = at::empty({rows, width}, q.packed.options().dtype(at::kFloat));
  float* out = w.mutable_data_ptr<float>();
  const int8_t* packed = q.packed.const_data_ptr<int8_t>() + first_row * row_bytes;
  const at::BFloat16* scales = q.scales.const_data_ptr<at::BFloat16>() + first_row * row_scales;
  with_format(q.bits, [&](auto format) {
    using Format = decltype(format);
    const int64_t grain = std::max<int64_t>(1, kSerialBytes / std::max<int64_t>(1, width));
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t at = (first_group + g) * Format::kBytes;
          const float scale = static_cast<float>(scales[j * row_scales + first_group + g]);
          // The last group of 8-bit columns may end at half of its bytes.
          const int64_t columns = std::min(kColumns, (row_bytes - at) * 8 / Format::kBits);
          float* to = out + j * width + g * kColumns;
          for (int64_t n = 0; n < columns; ++n)
            to[n] = scale * Format::value(packed + j * row_bytes + at, n);
          std::fill(to + columns, to + kColumns, 0.0f);
        }
    });
  });
  return w;
}

}  // namespace
}  // namespace wina
