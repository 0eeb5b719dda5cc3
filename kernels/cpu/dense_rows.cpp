// Native CPU kernels for dense products of a few tokens with row-major weights [N, K], such as the
// one an lm_head shares with the embedding: dense_linear_rows and dense_linear_rows_quantized.
//
// An output is a dot product along a row. A thread cuts its rows into kRows parts and walks them side
// by side: so many long contiguous streams reach more bandwidth than one does, and far more than as
// many rows next to each other, where every stream jumps at the end of a row. x is widened, and
// brought into the order in which weights are widened, once a call; there, too, inputs that thresholds
// drop become zeros: all of the weight is read, and the mask costs no pass of its own. Every row is summed in the same
// order wherever it falls: results are bit-identical for any number of threads.

#include <ATen/ops/linear.h>

#include "integers.h"

namespace wina {
namespace {

constexpr int kRows = 4;  // side by side
constexpr int64_t kAheadBytes = 512;  // what each stream prefetches, across the ends of rows
constexpr int64_t kDenseTokens = 8;  // more of them: torch's matmul, which is bound by arithmetic
constexpr int64_t kDequantizedRows = 1024;  // widened at a time then

// Tokens that share a widened weight, and accumulators of each row and token: together with kRows
// they have to fit 16 vector registers.
constexpr int kShared = 4;
constexpr int accumulators_of(int tokens) { return tokens == 1 ? 2 : 1; }

// Which inputs count: those of token t that are not below threshold[k] * scale[t]. Null: all.
struct Mask {
  const float* threshold = nullptr;  // [K]
  const float* scale = nullptr;      // [tokens]
};

inline void prefetch_ahead(const void* p) {
  __builtin_prefetch(static_cast<const char*>(p) + kAheadBytes, 0, 3);
}

// ------------------------------------------------------------------------------------- floats

template <class T>
struct FloatRows {
  using In = T;  // of x
  static constexpr int64_t kColumnsOfStep = kLine / sizeof(T);

  const T* weight;
  int64_t K;

  int64_t row_bytes() const { return K * static_cast<int64_t>(sizeof(T)); }
  int64_t stride() const { return K; }  // of tokens in x_in_order

  // [tokens][stride()]
  void x_in_order(const T* x, int64_t tokens, const Mask& mask, float* out) const {
    for (int64_t t = 0; t < tokens; ++t) {
      const T* from = x + t * K;
      float* to = out + t * K;
      int64_t k = 0;
      if (mask.threshold) {
        in_order_masked(from, mask, t, to);
        continue;
      }
      for (; k + kColumnsOfStep <= K; k += kColumnsOfStep)
        for (int64_t p = 0; p < kColumnsOfStep; p += kStep)
          store_pair(to + k + p, load_pair(from + k + p));
      for (; k < K; ++k) to[k] = static_cast<float>(from[k]);
    }
  }

  // Of token t: a block that is widened and masked at a time, then brought into order.
  void in_order_masked(const T* from, const Mask& mask, int64_t t, float* to) const {
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
    constexpr int64_t block = 128;  // whole steps
    const float scale = mask.scale ? mask.scale[t] : 1.0f;
    const int64_t ordered = K / kColumnsOfStep * kColumnsOfStep;
    for (int64_t first = 0; first < K; first += block) {
      const int64_t n = std::min(block, K - first);
      // In steps that the compiler turns into vectors: bits are cleared, floats are compared.
      float wide[block];
      Bits bits[block];
      for (int64_t i = 0; i < n; ++i) wide[i] = static_cast<float>(from[first + i]);
      std::memcpy(bits, from + first, n * sizeof(T));
      for (int64_t i = 0; i < n; ++i) {
        const bool keep = !(std::fabs(wide[i]) <= cutoff(mask.threshold[first + i], scale));
        bits[i] &= static_cast<Bits>(-static_cast<int32_t>(keep));
      }
      T kept[block];
      std::memcpy(kept, bits, n * sizeof(T));
      int64_t k = 0;
      for (; first + k < ordered && k < n; k += kStep)
        store_pair(to + first + k, load_pair(kept + k));
      for (; k < n; ++k) to[first + k] = static_cast<float>(kept[k]);
    }
  }

  // out[r][t] = row n[r] times token t.
  template <int R, int TT>
  void dot(const int64_t* n, const float* x, float (*out)[TT]) const {
    constexpr int A = accumulators_of(TT);
    const T* row[R];
    for (int r = 0; r < R; ++r) row[r] = weight + n[r] * K;
    Floats acc[R][TT][A] = {};
    int64_t k = 0;
    for (; k + kColumnsOfStep <= K; k += kColumnsOfStep) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) prefetch_ahead(row[r] + k);
#pragma GCC unroll 2
      for (int64_t p = 0; p < kColumnsOfStep; p += kStep) {
        Pair w[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) w[r] = load_pair(row[r] + k + p);
#pragma GCC unroll 4
        for (int t = 0; t < TT; ++t) {
          const Floats a = load(x + t * K + k + p), b = load(x + t * K + k + p + kLanes);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            acc[r][t][0] += a * w[r].a;
            acc[r][t][A - 1] += b * w[r].b;
          }
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < TT; ++t) {
        float s = sum(A == 2 ? acc[r][t][0] + acc[r][t][A - 1] : acc[r][t][0]);
        for (int64_t i = k; i < K; ++i) s += x[t * K + i] * static_cast<float>(row[r][i]);
        out[r][t] = s;
      }
  }
};

// ----------------------------------------------------------------------------------- integers

// Of one group of columns: acc[r][t] += x[t] times row r's integers. A group's first sums are
// `begin`, what the format takes off.
template <int R, int TT, int A>
inline void add_group(Int8, const int8_t* const* row, int64_t bytes, const float* x,
                      int64_t stride, WideFloats (*acc)[TT][A]) {
  for (int64_t k = 0; k < bytes; k += 2 * kWide) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t at = k + half * kWide;
      WideFloats w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) w[r] = load_bytes(row[r] + at);
#pragma GCC unroll 4
      for (int t = 0; t < TT; ++t) {
        const WideFloats v = load_wide(x + t * stride + at);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r][t][half % A] += v * w[r];
      }
    }
  }
}

template <int R, int TT, int A>
inline void add_group(Int4, const int8_t* const* row, int64_t, const float* x, int64_t stride,
                      WideFloats (*acc)[TT][A]) {
#pragma GCC unroll 2
  for (int first = 0; first < kWordsOfGroup; first += kWide) {
    WideWords words[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) words[r] = load_words(row[r] + first * sizeof(uint32_t));
#pragma GCC unroll 8
    for (int p = 0; p < kNibbles; ++p)
#pragma GCC unroll 4
      for (int t = 0; t < TT; ++t) {
        const WideFloats v = load_wide(x + t * stride + p * kWordsOfGroup + first);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r][t][p % A] += v * nibbles(words[r], p);
      }
  }
}

template <class T, class Format>
struct IntegerRows {
  using In = T;

  const int8_t* weight;
  const at::BFloat16* scales;
  int64_t K, bytes, row_scales, groups;

  int64_t row_bytes() const { return bytes; }
  // Of a token: its columns padded to whole groups, then kWide sums a group.
  int64_t columns() const { return groups * kColumns; }
  int64_t stride() const { return columns() + groups * kWide; }

  // [tokens][stride()]. Four bits hold q + 8, so a group's sum begins with -8 times that of x, by
  // lanes; a nibble is 16^p too large where it stands in its word.
  void x_in_order(const T* x, int64_t tokens, const Mask&, float* out) const {
    for (int64_t t = 0; t < tokens; ++t) {
      float* to = out + t * stride();
      for (int64_t k = 0; k < K; ++k) to[k] = static_cast<float>(x[t * K + k]);
      std::fill(to + K, to + columns(), 0.0f);
      for (int64_t g = 0; g < groups; ++g) {
        WideFloats begin{};
        if (Format::kBits == 4)
          for (int p = 0; p < kNibbles; ++p)
            for (int first = 0; first < kWordsOfGroup; first += kWide) {
              float* v = to + g * kColumns + p * kWordsOfGroup + first;
              begin -= 8.0f * load_wide(v);
              store_wide(v, load_wide(v) * nibble_unit(p));
            }
        store_wide(to + columns() + g * kWide, begin);
      }
    }
  }

  template <int R, int TT>
  void dot(const int64_t* n, const float* x, float (*out)[TT]) const {
    constexpr int A = accumulators_of(TT);
    Floats total[R][TT] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = g * Format::kBytes, used = std::min(Format::kBytes, bytes - at);
      const int8_t* row[R];
      WideFloats acc[R][TT][A];
      for (int r = 0; r < R; ++r) {
        row[r] = weight + n[r] * bytes + at;
        for (int64_t b = 0; b < used; b += kLine) prefetch_ahead(row[r] + b);
        for (int t = 0; t < TT; ++t) {
          acc[r][t][A - 1] = WideFloats{};
          acc[r][t][0] = load_wide(x + t * stride() + columns() + g * kWide);
        }
      }
      add_group<R, TT, A>(Format{}, row, used, x + g * kColumns, stride(), acc);
      for (int r = 0; r < R; ++r) {
        const auto scale = static_cast<float>(scales[n[r] * row_scales + g]);
        for (int t = 0; t < TT; ++t)
          total[r][t] +=
              scale * folded(A == 2 ? acc[r][t][0] + acc[r][t][A - 1] : acc[r][t][0]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < TT; ++t) out[r][t] = sum(total[r][t]);
  }
};

// ---------------------------------------------------------------------------------- operators

// What is added to sums before they are rounded; null for nothing.
template <class T>
struct Added {
  const T* bias;      // [N]
  const T* residual;  // [tokens][N]

  float at(int64_t t, int64_t n, int64_t N) const {
    return (bias ? static_cast<float>(bias[n]) : 0.0f) +
        (residual ? static_cast<float>(residual[t * N + n]) : 0.0f);
  }
  Added from(int64_t t, int64_t N) const { return {bias, residual ? residual + t * N : nullptr}; }
};

// y[t][n] for TT tokens and the rows n + r * step, r < R, that are below `end`.
template <int R, int TT, class Rows>
void few_tokens(const Rows& rows, int64_t n, int64_t step, int64_t end, int64_t N, const float* x,
                const Added<typename Rows::In>& added, typename Rows::In* y) {
  using T = typename Rows::In;
  int64_t row[R];
  for (int r = 0; r < R; ++r) row[r] = std::min(n + r * step, end - 1);
  float out[R][TT];
  rows.template dot<R, TT>(row, x, out);
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < TT; ++t)
      y[t * N + row[r]] = static_cast<T>(out[r][t] + added.at(t, row[r], N));
}

template <class Rows>
void multiply(const Rows& rows, const Tensor& x, int64_t tokens, int64_t N, const Mask& mask,
              const Tensor& bias, const Tensor& residual, Tensor& y) {
  using T = typename Rows::In;
  static thread_local std::vector<float> scratch;
  const int64_t stride = rows.stride();
  if (static_cast<int64_t>(scratch.size()) < tokens * stride) scratch.resize(tokens * stride);
  float* in = scratch.data();
  rows.x_in_order(x.const_data_ptr<T>(), tokens, mask, in);
  const auto data = [](const Tensor& v) { return v.defined() ? v.const_data_ptr<T>() : nullptr; };
  const Added<T> added{data(bias), data(residual)};
  T* out = y.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, kSerialBytes / std::max<int64_t>(1, rows.row_bytes()));
  at::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) {
    const int64_t step = (end - begin + kRows - 1) / kRows;
    for (int64_t n = begin; n < begin + step; ++n)
      for (int64_t t = 0; t < tokens; t += kShared) {
        const float* from = in + t * stride;
        T* to = out + t * N;
        const Added<T> more = added.from(t, N);
        switch (std::min<int64_t>(kShared, tokens - t)) {
          case 1: few_tokens<kRows, 1>(rows, n, step, end, N, from, more, to); break;
          case 2: few_tokens<kRows, 2>(rows, n, step, end, N, from, more, to); break;
          case 3:
            few_tokens<kRows / 2, 3>(rows, n, step, end, N, from, more, to);
            few_tokens<kRows / 2, 3>(rows, n + 2 * step, step, end, N, from, more, to);
            break;
          default:
            few_tokens<kRows / 2, 4>(rows, n, step, end, N, from, more, to);
            few_tokens<kRows / 2, 4>(rows, n + 2 * step, step, end, N, from, more, to);
            break;
        }
      }
  });
}

Tensor check_bias(const char* op, const Tensor& x, int64_t N, const OptionalTensor& bias) {
  if (!bias.has_value() || !bias->defined()) return {};
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == N && bias->scalar_type() == x.scalar_type() &&
                  bias->is_cpu(),
              op, ": bias must be [", N, "] ", x.scalar_type(), " on the CPU, got ", bias->sizes(),
              " ", bias->scalar_type());
  return bias->contiguous();
}

// Sums of 4-bit integers begin with their offset times x, which has to be finite for that.
template <class T>
bool all_finite(const Tensor& x) {
  const T* v = x.const_data_ptr<T>();
  int finite = 1;
  for (int64_t i = 0; i < x.numel(); ++i)
    finite &= std::fabs(static_cast<float>(v[i])) <= FLT_MAX;
  return finite;
}

bool all_finite(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kBFloat16: return all_finite<at::BFloat16>(x);
    case at::kHalf: return all_finite<at::Half>(x);
    default: return all_finite<float>(x);
  }
}

bool fast(const Tensor& x, int64_t tokens, int64_t N) {
  const auto dtype = x.scalar_type();
  return (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) && tokens > 0 &&
      tokens <= kDenseTokens && x.size(-1) > 0 && N > 0;
}

Tensor output(const Tensor& x, int64_t N) {
  auto shape = x.sizes().vec();
  shape.back() = N;
  return at::empty(shape, x.options());
}

Tensor dense_linear_rows(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& threshold, const OptionalTensor& scale,
                         const OptionalTensor& residual) {
  const char* op = "wina::dense_linear_rows";
  check_input(op, x, weight.requires_grad());
  const int64_t K = x.size(-1), tokens = tokens_of(x);
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) == K && weight.is_cpu(), op,
              ": weight must be [N, K] on the CPU with K = ", K,
              " (the last dimension of x), got ", weight.sizes());
  TORCH_CHECK(weight.scalar_type() == x.scalar_type(), op, ": weight must have x's dtype ",
              x.scalar_type(), ", got ", weight.scalar_type());
  const int64_t N = weight.size(0);
  Vectors v;
  if (threshold.has_value()) {
    v = check_vectors(op, "", x, tokens, N, *threshold, bias, scale);
  } else {
    TORCH_CHECK(!scale.has_value(), op, ": a scale is of thresholds, which are not given");
    v.bias = check_bias(op, x, N, bias);
  }
  Tensor y = output(x, N);
  const Tensor added = check_residual(op, x, tokens, y.sizes(), residual);
  if (!fast(x, tokens, N) || !weight.is_contiguous()) {
    const Tensor flat = x.reshape({tokens, K});
    Tensor product = at::linear(v.threshold.defined() ? masked(flat, v) : flat, weight, v.bias);
    if (added.defined()) product.add_(added);
    return product.view(y.sizes());
  }
  const Tensor in = x.contiguous();
  const Mask mask{data_or_null(v.threshold), data_or_null(v.scale)};
  const auto run = [&](auto* data) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    multiply(FloatRows<T>{data, K}, in, tokens, N, mask, v.bias, added, y);
  };
  switch (x.scalar_type()) {
    case at::kBFloat16: run(weight.const_data_ptr<at::BFloat16>()); break;
    case at::kHalf: run(weight.const_data_ptr<at::Half>()); break;
    default: run(weight.const_data_ptr<float>()); break;
  }
  return y;
}

template <class T>
void multiply_integers(const Packed& q, const Tensor& x, int64_t tokens, const Tensor& bias,
                       Tensor& y) {
  with_format(q.bits, [&](auto format) {
    const IntegerRows<T, decltype(format)> rows{
        q.packed.const_data_ptr<int8_t>(), q.scales.const_data_ptr<at::BFloat16>(), q.columns,
        q.packed.size(1), q.scales.size(1), q.groups()};
    multiply(rows, x, tokens, q.packed.size(0), {}, bias, {}, y);
  });
}

Tensor dense_linear_rows_quantized(const Tensor& x, const Tensor& packed, const Tensor& scales,
                                   int64_t K, int64_t bits, const OptionalTensor& bias) {
  const char* op = "wina::dense_linear_rows_quantized";
  check_input(op, x, false);
  const int64_t tokens = tokens_of(x), N = packed.dim() ? packed.size(0) : 0;
  TORCH_CHECK(x.size(-1) == K, op, ": x has ", x.size(-1), " channels, weight ", K, " columns");
  const Packed q = check_packed(op, "", N, packed, scales, K, bits);
  const Tensor added = check_bias(op, x, N, bias);
  Tensor y = output(x, N);
  const Tensor in = x.contiguous();
  if (!fast(x, tokens, N) || (bits == Int4::kBits && !all_finite(in))) {
    fill_blocks(y, tokens, kDequantizedRows, [&](at::ScalarType dtype, int64_t first, int64_t n) {
      const Tensor w = dequantized(q, first, n, 0, q.groups()).narrow(1, 0, K).to(dtype);
      OptionalTensor part;
      if (added.defined()) part = added.narrow(0, first, n).to(dtype);
      return at::linear(in.view({tokens, K}).to(dtype), w, part);
    });
    return y;
  }
  switch (x.scalar_type()) {
    case at::kBFloat16: multiply_integers<at::BFloat16>(q, in, tokens, added, y); break;
    case at::kHalf: multiply_integers<at::Half>(q, in, tokens, added, y); break;
    default: multiply_integers<float>(q, in, tokens, added, y); break;
  }
  return y;
}

}  // namespace
}  // namespace wina

TORCH_LIBRARY_IMPL(wina, CPU, m) {
  m.impl("dense_linear_rows", TORCH_FN(wina::dense_linear_rows));
  m.impl("dense_linear_rows_quantized", TORCH_FN(wina::dense_linear_rows_quantized));
}
