// Native CPU kernels for integer weights: sparse_linear_quantized and sparse_gate_up_quantized.
//
// The scheme is that of sparse.cpp: a list of kept rows, columns split over the threads, float32
// accumulators that stay in L1, rows to come prefetched. The format is described in
// kernels/quantization.py. A row's scale multiplies its coefficient once for each group of columns;
// integers are widened in registers, two instructions and a fused multiply-add for eight of them.
// Threads meet at group boundaries and a column adds its rows in list order: results are
// bit-identical for any number of threads.

#include "integers.h"

namespace wina {
namespace {

constexpr int kTokens = 4;  // tokens that share a widened weight
static_assert(kGroup == kLanes, "the coefficients of a group of rows are one vector");

// The product of a group of rows with a group of columns: acc[t][columns] += sum of
// c[t][r] * row r. The last group of a row may have fewer bytes.
template <int TT>
void add(Int8, const int8_t* const* rows, int64_t bytes, const Floats* c, float* acc,
         int64_t stride) {
  constexpr int P = TT <= 2 ? 4 : 2;  // vectors of columns side by side
  for (int64_t v = 0; v < bytes / kLanes; v += P) {
    Floats a[TT][P];
    for (int t = 0; t < TT; ++t)
      for (int p = 0; p < P; ++p) a[t][p] = load(acc + t * stride + (v + p) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const Floats w = load_bytes(rows[r] + (v + p) * kLanes);
#pragma GCC unroll 4
        for (int t = 0; t < TT; ++t) a[t][p] += c[t][r] * w;
      }
    for (int t = 0; t < TT; ++t)
      for (int p = 0; p < P; ++p) store(acc + t * stride + (v + p) * kLanes, a[t][p]);
  }
}

template <int TT>
void add(Int4, const int8_t* const* rows, int64_t, const Floats* c, float* acc, int64_t stride) {
  Floats offset[TT];
  for (int t = 0; t < TT; ++t) {
    float sum = 0.0f;
    for (int r = 0; r < kGroup; ++r) sum += c[t][r];
    offset[t] = Floats{} + 8.0f * sum;
  }
#pragma GCC unroll 8
  for (int p = 0; p < kNibbles; ++p) {
    Floats a[TT][2], scaled[TT];
    for (int t = 0; t < TT; ++t) {
      scaled[t] = c[t] * nibble_unit(p);
      for (int half = 0; half < 2; ++half)
        a[t][half] = load(acc + t * stride + 16 * p + half * kLanes) - offset[t];
    }
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const Floats w = load_nibbles(rows[r] + half * sizeof(Words), p);
#pragma GCC unroll 4
        for (int t = 0; t < TT; ++t) a[t][half] += scaled[t][r] * w;
      }
    for (int t = 0; t < TT; ++t)
      for (int half = 0; half < 2; ++half)
        store(acc + t * stride + 16 * p + half * kLanes, a[t][half]);
  }
}

// One projection's checked arguments.
struct Quantized : Vectors, Packed {};

// acc[t][0 .. groups * kColumns) = the product of the kept rows with the groups of columns from
// `first` on.
template <class Format>
void accumulate(const KeptRows& rows, int tokens, const Quantized& q, int64_t first,
                int64_t groups, float* acc) {
  const int64_t row_bytes = q.packed.size(1), row_scales = q.scales.size(1);
  const int64_t width = groups * kColumns;
  std::fill_n(acc, tokens * width, 0.0f);
  const int8_t* weight = q.packed.const_data_ptr<int8_t>();
  const at::BFloat16* scales = q.scales.const_data_ptr<at::BFloat16>();
  const int64_t lead =
      std::clamp<int64_t>(kLeadBytes / (groups * Format::kBytes), kGroup, kMaxLead);
  for (int64_t k = 0; k < rows.count; k += kGroup) {
    const int32_t* index = rows.index.data() + k;
    // Rows past the last repeat it, with a coefficient of 0.
    const int used = static_cast<int>(std::min<int64_t>(kGroup, rows.count - k));
    for (int r = 0; r < kGroup; ++r)
      __builtin_prefetch(scales + index[r + lead] * row_scales + first, 0, 3);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = (first + g) * Format::kBytes;
      const int64_t bytes = std::min(Format::kBytes, row_bytes - at);
      const int8_t* row[kGroup];
      float scale[kGroup] = {};
      for (int r = 0; r < kGroup; ++r) {
        row[r] = weight + index[r] * row_bytes + at;
        const int8_t* ahead = weight + index[r + lead] * row_bytes + at;
        for (int64_t b = 0; b < bytes; b += kLine) __builtin_prefetch(ahead + b, 0, 3);
        if (r < used) scale[r] = static_cast<float>(scales[index[r] * row_scales + first + g]);
      }
      for (int t0 = 0; t0 < tokens; t0 += kTokens) {
        const int count = std::min(kTokens, tokens - t0);
        Floats c[kTokens] = {};
        for (int t = 0; t < count; ++t)
          for (int r = 0; r < used; ++r)
            c[t][r] = rows.coef[(k + r) * tokens + t0 + t] * scale[r];
        float* a = acc + t0 * width + g * kColumns;
        switch (count) {
          case 1: add<1>(Format{}, row, bytes, c, a, width); break;
          case 2: add<2>(Format{}, row, bytes, c, a, width); break;
          case 3: add<3>(Format{}, row, bytes, c, a, width); break;
          default: add<4>(Format{}, row, bytes, c, a, width); break;
        }
      }
    }
  }
}

// Calls f(first group, groups) for tiles that cover all columns, over torch's threads.
template <class F>
void for_tiles(const Quantized& q, int tokens, int64_t rows, const F& f) {
  const int64_t group_bytes = std::max<int64_t>(1, rows * kColumns * q.bits / 8);
  const int64_t grain = std::max<int64_t>(1, kSerialBytes / group_bytes);
  const int64_t tile = kTile / tokens / kColumns;
  at::parallel_for(0, q.groups(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g += tile) f(g, std::min(tile, end - g));
  });
}

template <class T>
void linear_fast(const Tensor& x, int64_t all_tokens, const Quantized& q, const Tensor& residual,
                 Tensor& y) {
  const int64_t K = x.size(1), N = q.columns;
  const float *threshold = q.threshold.const_data_ptr<float>(), *scale = data_or_null(q.scale);
  const T* in = x.const_data_ptr<T>();
  const T* stream = residual.defined() ? residual.const_data_ptr<T>() : nullptr;
  T* out = y.mutable_data_ptr<T>();
  KeptRows& rows = kept_rows(0);
  for (int64_t t0 = 0; t0 < all_tokens; t0 += kMaxTokens) {
    const int tokens = static_cast<int>(std::min(kMaxTokens, all_tokens - t0));
    select_rows(rows, in + t0 * K, K, tokens, threshold, scale ? scale + t0 : nullptr);
    for_tiles(q, tokens, rows.count, [&](int64_t group, int64_t groups) {
      alignas(kLine) float acc[kTile];
      with_format(q.bits, [&](auto format) {
        accumulate<decltype(format)>(rows, tokens, q, group, groups, acc);
      });
      const int64_t first = group * kColumns, stride = groups * kColumns;
      const int64_t width = std::min(stride, N - first);
      add_bias<T>(acc, tokens, width, q.bias, first, stride);
      add_residual(acc, tokens, width, stream ? stream + t0 * N : nullptr, N, first, stride);
      for (int t = 0; t < tokens; ++t)
        for (int64_t n = 0; n < width; ++n)
          out[(t0 + t) * N + first + n] = static_cast<T>(acc[t * stride + n]);
    });
  }
}

template <class T>
void gate_up_fast(const Tensor& x, int64_t all_tokens, const Quantized& gate, const Quantized& up,
                  Activation activation, Tensor& h) {
  const int64_t K = x.size(1), N = gate.columns;
  const float *gate_scale = data_or_null(gate.scale), *up_scale = data_or_null(up.scale);
  const float* gate_threshold = gate.threshold.const_data_ptr<float>();
  const float* up_threshold = up.threshold.const_data_ptr<float>();
  const bool shared = gate_threshold == up_threshold && gate_scale == up_scale;
  const T* in = x.const_data_ptr<T>();
  T* out = h.mutable_data_ptr<T>();
  KeptRows& gate_rows = kept_rows(0);
  KeptRows& up_rows = kept_rows(shared ? 0 : 1);
  for (int64_t t0 = 0; t0 < all_tokens; t0 += kMaxTokens) {
    const int tokens = static_cast<int>(std::min(kMaxTokens, all_tokens - t0));
    const auto select = [&](KeptRows& rows, const float* threshold, const float* scale) {
      select_rows(rows, in + t0 * K, K, tokens, threshold, scale ? scale + t0 : nullptr);
    };
    select(gate_rows, gate_threshold, gate_scale);
    if (!shared) select(up_rows, up_threshold, up_scale);
    for_tiles(gate, tokens, gate_rows.count + up_rows.count, [&](int64_t group, int64_t groups) {
      alignas(kLine) float g[kTile];
      alignas(kLine) float u[kTile];
      with_format(gate.bits, [&](auto format) {
        accumulate<decltype(format)>(gate_rows, tokens, gate, group, groups, g);
        accumulate<decltype(format)>(up_rows, tokens, up, group, groups, u);
      });
      const int64_t first = group * kColumns, stride = groups * kColumns;
      const int64_t width = std::min(stride, N - first);
      add_bias<T>(g, tokens, width, gate.bias, first, stride);
      add_bias<T>(u, tokens, width, up.bias, first, stride);
      activate(activation, g, tokens * stride);
      for (int t = 0; t < tokens; ++t)
        for (int64_t n = 0; n < width; ++n)
          out[(t0 + t) * N + first + n] = static_cast<T>(g[t * stride + n] * u[t * stride + n]);
    });
  }
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
  const Tensor in = x.reshape({tokens, K}).contiguous();
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
  const Tensor in = x.reshape({tokens, K}).contiguous();
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
