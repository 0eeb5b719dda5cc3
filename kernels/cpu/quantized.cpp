// Native CPU kernels for integer weights: sparse_linear_quantized and sparse_gate_up_quantized.
//
// The scheme is that of sparse.cpp (parts.h): the format is described in kernels/quantization.py. A
// row's scale multiplies its coefficient once for each group of columns; integers are widened in
// registers, two instructions and a fused multiply-add for eight of them. Threads meet at group
// boundaries and a column adds up in the same order whatever their number: results are
// bit-identical.

#include "parts.h"
#include "rounded.h"

namespace wina {
namespace {

constexpr int kTokens = 4;  // tokens that share a widened weight

// The product of a group of rows with a group of columns: sums[t][columns] += sum of
// c[t][r] * row r. The last group of a row may have fewer bytes.
template <int TT>
void add(Int8, const int8_t* const* rows, int64_t bytes, const float (*c)[kGroup], float* sums,
         int64_t stride) {
  constexpr int P = TT <= 2 ? 4 : 2;  // vectors of columns side by side
  for (int64_t v = 0; v < bytes / kWide; v += P) {
    WideFloats a[TT][P] = {};
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const WideFloats w = load_bytes(rows[r] + (v + p) * kWide);
#pragma GCC unroll 4
        for (int t = 0; t < TT; ++t) a[t][p] += c[t][r] * w;
      }
    for (int t = 0; t < TT; ++t)
      for (int p = 0; p < P; ++p) {
        float* sum = sums + t * stride + (v + p) * kWide;
        store_wide(sum, load_wide(sum) + a[t][p]);
      }
  }
}

// The same for one token and integers one by one, each less its offset: Inf times them is what it is.
inline void add_one_by_one(const int8_t* const* rows, const float* c, float* sums) {
  for (int64_t n = 0; n < kColumns; ++n) {
    float a = 0.0f;
    for (int r = 0; r < kGroup; ++r) a += c[r] * Int4::value(rows[r], n);
    sums[n] += a / nibble_unit(static_cast<int>(n / kStep));
  }
}

// Sums of nibble p stay as many times too large as the nibble is where it stands in its word (a
// power of two: nothing is rounded by it), so that coefficients serve all nibbles as they are. The
// offset of all integers is taken off at once, which coefficients that are not finite do not allow:
// they are used up and become 0.
template <int TT>
void add(Int4, const int8_t* const* rows, int64_t, float (*c)[kGroup], float* sums,
         int64_t stride) {
  float offset[TT];
  for (int t = 0; t < TT; ++t) {
    float total = 0.0f;
    for (int r = 0; r < kGroup; ++r) total += c[t][r];
    if (!(std::fabs(total) <= FLT_MAX)) {
      add_one_by_one(rows, c[t], sums + t * stride);
      std::fill_n(c[t], kGroup, 0.0f);
      total = 0.0f;
    }
    offset[t] = -8.0f * total;
  }
  constexpr int P = TT == 1 ? kNibbles : TT == 2 ? 4 : 2;  // nibbles that share a loaded word
  for (int first = 0; first < kWordsOfGroup; first += kWide)
#pragma GCC unroll 4
    for (int p0 = 0; p0 < kNibbles; p0 += P) {
      WideFloats a[TT][P];
      for (int t = 0; t < TT; ++t)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p)
          a[t][p] = WideFloats{} + offset[t] / nibble_unit(p0 + p);
#pragma GCC unroll 8
      for (int r = 0; r < kGroup; ++r) {
        const WideWords words = load_words(rows[r] + first * sizeof(uint32_t));
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          const WideFloats w = nibbles(words, p0 + p);
#pragma GCC unroll 4
          for (int t = 0; t < TT; ++t) a[t][p] += c[t][r] * w;
        }
      }
      for (int t = 0; t < TT; ++t)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          float* sum = sums + t * stride + (p0 + p) * kWordsOfGroup + first;
          store_wide(sum, load_wide(sum) + a[t][p]);
        }
    }
}

// Sums as add() leaves them, of whole groups from the first on.
inline void scale_down(Int8, float*, int64_t) {}
inline void scale_down(Int4, float* sums, int64_t width) {
  for (int64_t n = 0; n < width; n += kStep) {
    const float unit = nibble_unit(static_cast<int>(n % kColumns / kStep));
    for (int64_t i = n; i < std::min(width, n + kStep); ++i) sums[i] *= unit;
  }
}

// One projection's checked arguments.
struct Quantized : Vectors, Packed {};

template <class Format>
struct IntegerWeight {
  static constexpr int64_t kUnit = kColumns, kUnitBytes = Format::kBytes;

  const int8_t* data;
  const at::BFloat16* scales;
  int64_t columns, row_bytes, row_scales;
  bool rounds;  // inputs to 16 bits: those of one token that have no more than 8 to begin with

  // sums[t][n] = the product of a part of the kept rows with some groups of columns.
  void accumulate(const KeptRows& rows, const Part& part, int tokens, int64_t first, int64_t groups,
                  float* sums, int64_t stride) const {
#if defined(WINA_ROUNDED)
    if (rounds) return accumulate_rounded(rows, part, first, groups, sums);
#endif
    for (int t = 0; t < tokens; ++t) std::fill_n(sums + t * stride, groups * kColumns, 0.0f);
    for_blocks(rows, part, first, [&](Block& block) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t bytes = bytes_of(first + g);
        block.prefetch(g * Format::kBytes, bytes);
        float scale_of[kGroup];
        for (int r = 0; r < kGroup; ++r) scale_of[r] = static_cast<float>(block.scale[r][g]);
        for (int t0 = 0; t0 < tokens; t0 += kTokens) {
          const int count = std::min(kTokens, tokens - t0);
          float c[kTokens][kGroup];
          for (int t = 0; t < count; ++t)
            for (int r = 0; r < kGroup; ++r)
              c[t][r] = r < block.used
                  ? rows.coef[block.place[r] * tokens + t0 + t] * scale_of[r] : 0.0f;
          float* to = sums + t0 * stride + g * kColumns;
          switch (count) {
            case 1: add<1>(Format{}, block.row, bytes, c, to, stride); break;
            case 2: add<2>(Format{}, block.row, bytes, c, to, stride); break;
            case 3: add<3>(Format{}, block.row, bytes, c, to, stride); break;
            default: add<4>(Format{}, block.row, bytes, c, to, stride); break;
          }
        }
        block.advance();
      }
    });
  }

  // Columns [first, first + width) as accumulate() leaves them, for `first` at a group.
  void reorder(float* sums, int64_t, int64_t width) const {
#if defined(WINA_ROUNDED)
    if (rounds) return in_column_order(Format{}, sums, width);
#endif
    scale_down(Format{}, sums, width);
  }

 private:
  // kGroup kept rows at a group of columns, and those that are likely to be read next. Rows past
  // the last repeat it; their coefficients are to be 0.
  struct Block {
    int64_t place[kGroup];  // in the list
    const int8_t *row[kGroup], *next[kGroup];
    const at::BFloat16* scale[kGroup];  // at the first group
    int used;

    void prefetch(int64_t from, int64_t bytes) const {
#pragma GCC unroll 8
      for (int r = 0; r < kGroup; ++r)
        for (int64_t b = 0; b < bytes; b += kLine) __builtin_prefetch(next[r] + from + b, 0, 3);
    }
    void advance() {
      for (int r = 0; r < kGroup; ++r) row[r] += Format::kBytes;
    }
  };

  // The last group of 8-bit columns may end at half of its bytes.
  int64_t bytes_of(int64_t group) const {
    return std::min(Format::kBytes, row_bytes - group * Format::kBytes);
  }

  // Calls f(block) for all rows of a part, at the group `first`.
  template <class F>
  void for_blocks(const KeptRows& rows, const Part& part, int64_t first, const F& f) const {
    const auto call = [&](int64_t at, int64_t step, int used, int64_t next, int64_t next_step) {
      Block block;
      block.used = used;
      for (int r = 0; r < kGroup; ++r) {
        block.place[r] = at + std::min(r, used - 1) * step;
        const int64_t row = rows.index[block.place[r]];
        const int64_t after = rows.index[std::min(next + r * next_step, rows.count)];
        block.row[r] = data + row * row_bytes + first * Format::kBytes;
        block.next[r] = data + after * row_bytes + first * Format::kBytes;
        block.scale[r] = scales + row * row_scales + first;
        __builtin_prefetch(scales + after * row_scales + first, 0, 3);
      }
      f(block);
    };
    for (int64_t i = 0; i + 1 < part.length; ++i)
      call(part.first + i, part.length, kGroup, part.first + i + 1, part.length);
    if (part.length > 0)
      call(part.first + part.length - 1, part.length, kGroup, part.after, part.after_step);
    if (part.tail_rows) call(part.tail, 1, static_cast<int>(part.tail_rows), part.tail, 1);
  }

#if defined(WINA_ROUNDED)
  // accumulate() of one token, in integers (rounded.h).
  void accumulate_rounded(const KeptRows& rows, const Part& part, int64_t first, int64_t groups,
                          float* sums) const {
    alignas(kLine) static constexpr float zeros[kColumns] = {};
    bool begun = false;
    for_blocks(rows, part, first, [&](Block& block) {
      float x[kGroup];
      for (int r = 0; r < kGroup; ++r)
        x[r] = r < block.used ? rows.coef[block.place[r]] : 0.0f;
      for (int64_t g0 = 0; g0 < groups; g0 += kWide) {
        const int64_t count = std::min<int64_t>(kWide, groups - g0);
        const at::BFloat16* scale[kGroup];
        for (int r = 0; r < kGroup; ++r) scale[r] = block.scale[r] + g0;
        Rounded in;
        const bool rounded = round_inputs(x, scale, count, in);
        for (int lane = 0; lane < count; ++lane) {
          const int64_t g = g0 + lane, bytes = bytes_of(first + g);
          float* to = sums + g * kColumns;
          const float* before = begun ? to : zeros;
          const int64_t from = g * Format::kBytes;
          block.prefetch(from, bytes);
          if (rounded) {
            add_rounded(Format{}, block.row, from, bytes, in, lane, before, to);
          } else {
            float c[kGroup];
            for (int r = 0; r < kGroup; ++r)
              c[r] = r < block.used ? x[r] * static_cast<float>(scale[r][lane]) : 0.0f;
            add_exactly(Format{}, block.row, from, bytes, c, before, to);
          }
        }
      }
      begun = true;
    });
    if (!begun) std::fill_n(sums, groups * kColumns, 0.0f);
  }
#endif
};

template <class Format, class T>
Product<IntegerWeight<Format>> product(Lists<T>& lists, const Quantized& q, int64_t first_token,
                                       int tokens) {
  const float* scale = data_or_null(q.scale);
  const IntegerWeight<Format> weight{q.packed.const_data_ptr<int8_t>(),
                                     q.scales.const_data_ptr<at::BFloat16>(), q.columns,
                                     q.packed.size(1), q.scales.size(1),
                                     kRounded && tokens == 1 && std::is_same_v<T, at::BFloat16>};
  return {lists.of(q.threshold.const_data_ptr<float>(), scale ? scale + first_token : nullptr),
          weight, q.groups()};
}

template <class T>
void linear_fast(const Tensor& x, int64_t all_tokens, const Quantized& q, const Tensor& residual,
                 Tensor& y) {
  const int64_t K = x.size(-1), N = q.columns;
  const T* stream = residual.defined() ? residual.const_data_ptr<T>() : nullptr;
  for_passes(all_tokens, [&](int64_t first, int tokens) {
    Lists<T> lists(x.const_data_ptr<T>() + first * K, K, tokens);
    with_format(q.bits, [&](auto format) {
      using Format = decltype(format);
      std::vector<Product<IntegerWeight<Format>>> products{product<Format>(lists, q, first, tokens)};
      compute(products, tokens);
      finish<T>(products[0], tokens, q.bias, stream ? stream + first * N : nullptr,
                y.mutable_data_ptr<T>() + first * N);
    });
  });
}

template <class T>
void gate_up_fast(const Tensor& x, int64_t all_tokens, const Quantized& gate, const Quantized& up,
                  Activation activation, Tensor& h) {
  const int64_t K = x.size(-1), N = gate.columns;
  for_passes(all_tokens, [&](int64_t first, int tokens) {
    Lists<T> lists(x.const_data_ptr<T>() + first * K, K, tokens);
    with_format(gate.bits, [&](auto format) {
      using Format = decltype(format);
      std::vector<Product<IntegerWeight<Format>>> products{product<Format>(lists, gate, first, tokens),
                                                           product<Format>(lists, up, first, tokens)};
      compute(products, tokens);
      finish_gated<T>(products[0], products[1], tokens, activation, gate.bias, up.bias,
                      h.mutable_data_ptr<T>() + first * N);
    });
  });
}

// The product of masked x [T, K] with some columns, in the accumulation dtype, plus bias.
Tensor columns(const Tensor& masked_x, const Quantized& q, at::ScalarType dtype, int64_t first,
               int64_t width) {
  const int64_t groups = (width + kColumns - 1) / kColumns;
  const Tensor w = dequantized(q, 0, q.packed.size(0), first / kColumns, groups).narrow(1, 0, width).to(dtype);
  const Tensor x = masked_x.to(dtype);
  if (!q.bias.defined()) return at::mm(x, w);
  return at::addmm(q.bias.narrow(0, first, width).to(dtype), x, w);
}

Quantized check(const char* op, const char* prefix, const Tensor& x, int64_t tokens,
                const Tensor& packed, const Tensor& scales, int64_t N, int64_t bits,
                const Tensor& threshold, const OptionalTensor& bias, const OptionalTensor& scale) {
  const Packed q = check_packed(op, prefix, x.size(-1), packed, scales, N, bits);
  return {check_vectors(op, prefix, x, tokens, N, threshold, bias, scale), q};
}

bool fast(const Tensor& x, int64_t tokens, int64_t N) {
  const auto dtype = x.scalar_type();
  return (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) && tokens > 0 &&
      tokens <= kMaxTokensFloat && x.size(-1) > 0 && N > 0;
}

Tensor sparse_linear_quantized(const Tensor& x, const Tensor& packed, const Tensor& scales,
                               int64_t N, int64_t bits, const Tensor& threshold,
                               const OptionalTensor& bias, const OptionalTensor& scale,
                               const OptionalTensor& residual) {
  const char* op = "wina::sparse_linear_quantized";
  check_input(op, x, false);
  const int64_t K = x.size(-1);
  const int64_t tokens = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  const Quantized q = check(op, "", x, tokens, packed, scales, N, bits, threshold, bias, scale);
  auto shape = x.sizes().vec();
  shape.back() = N;
  const Tensor stream = check_residual(op, x, tokens, shape, residual);
  Tensor y = at::empty(shape, x.options());
  if (!fast(x, tokens, N)) {
    const Tensor m = masked(x.reshape({tokens, K}), q);
    fill_blocks(y, tokens, kCopyColumns, [&](at::ScalarType dtype, int64_t first, int64_t width) {
      Tensor part = columns(m, q, dtype, first, width);
      return stream.defined() ? part.add_(stream.narrow(1, first, width)) : part;
    });
    return y;
  }
  const Tensor in = x.contiguous();
  switch (x.scalar_type()) {
    case at::kBFloat16: linear_fast<at::BFloat16>(in, tokens, q, stream, y); break;
    case at::kHalf: linear_fast<at::Half>(in, tokens, q, stream, y); break;
    default: linear_fast<float>(in, tokens, q, stream, y); break;
  }
  return y;
}

Tensor sparse_gate_up_quantized(const Tensor& x, const Tensor& gate, const Tensor& gate_scales,
                                const Tensor& up, const Tensor& up_scales, int64_t N, int64_t bits,
                                const Tensor& gate_threshold, const Tensor& up_threshold,
                                c10::string_view activation_name, const OptionalTensor& gate_bias,
                                const OptionalTensor& up_bias, const OptionalTensor& gate_scale,
                                const OptionalTensor& up_scale) {
  const char* op = "wina::sparse_gate_up_quantized";
  check_input(op, x, false);
  const Activation activation = parse_activation(activation_name);
  const int64_t K = x.size(-1);
  const int64_t tokens = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  const Quantized g = check(op, "gate ", x, tokens, gate, gate_scales, N, bits, gate_threshold,
                            gate_bias, gate_scale);
  const Quantized u =
      check(op, "up ", x, tokens, up, up_scales, N, bits, up_threshold, up_bias, up_scale);
  auto shape = x.sizes().vec();
  shape.back() = N;
  Tensor h = at::empty(shape, x.options());
  if (!fast(x, tokens, N)) {
    const Tensor flat = x.reshape({tokens, K});
    const Tensor gate_in = masked(flat, g), up_in = masked(flat, u);
    fill_blocks(h, tokens, kCopyColumns, [&](at::ScalarType dtype, int64_t first, int64_t width) {
      return activate(activation, columns(gate_in, g, dtype, first, width))
          .mul_(columns(up_in, u, dtype, first, width));
    });
    return h;
  }
  const Tensor in = x.contiguous();
  switch (x.scalar_type()) {
    case at::kBFloat16: gate_up_fast<at::BFloat16>(in, tokens, g, u, activation, h); break;
    case at::kHalf: gate_up_fast<at::Half>(in, tokens, g, u, activation, h); break;
    default: gate_up_fast<float>(in, tokens, g, u, activation, h); break;
  }
  return h;
}

}  // namespace
}  // namespace wina

TORCH_LIBRARY_IMPL(wina, CPU, m) {
  m.impl("sparse_linear_quantized", TORCH_FN(wina::sparse_linear_quantized));
  m.impl("sparse_gate_up_quantized", TORCH_FN(wina::sparse_gate_up_quantized));
}
