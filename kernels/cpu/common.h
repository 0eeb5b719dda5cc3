// What the native kernels share: constants, activations, the checks of arguments, and results. See
// sparse.cpp for the scheme.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "mask.h"
#include "vectors.h"

namespace wina {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Tuning constants, measured on two Zen 3 cores (DDR4, about 30 GB/s).
constexpr int kGroup = 8;  // kept rows read side by side: streams through memory
constexpr int64_t kTile = 4096;  // float32 sums of one tile: 16 KiB of L1
constexpr int64_t kShortBytes = 4096;  // of shorter rows the next one is prefetched
constexpr int64_t kSerialBytes = 32768;  // a thread gets at least this much to read
constexpr int64_t kMaxTokens = 16;  // tokens of one pass over the weight
// More tokens than these: a dense matmul of the masked input. 16-bit weights stay longer, since a
// K-major 16-bit matmul is a hundred times slower than these kernels where oneDNN has no AVX-512,
// and the way around it makes float32 copies.
constexpr int64_t kMaxTokensFloat = 32;
constexpr int64_t kMaxTokensHalf = 128;
// Where the CPU multiplies 16-bit numbers itself, torch does so on the weight as it lies, and is faster
// than one row after another from fewer tokens on: with tiles (AMX) from the first few.
#if defined(__AMX_BF16__)
constexpr int64_t kMaxTokensBFloat16 = 8;
#else
constexpr int64_t kMaxTokensBFloat16 = kMaxTokensHalf;
#endif
#if defined(__AVX512FP16__)
constexpr int64_t kMaxTokensFloat16 = 16;
#else
constexpr int64_t kMaxTokensFloat16 = kMaxTokensHalf;
#endif

// Whether the CPU multiplies x [T, K] without widening it. An odd K is left out: torch's product with
// tiles reads one number past each row then, times zero, and a NaN of the next token would show.
bool multiplies(const Tensor& x) {
  if (x.size(-1) % 2) return false;
#if defined(__AVX512BF16__)
  if (x.scalar_type() == at::kBFloat16) return true;
#endif
#if defined(__AVX512FP16__)
  if (x.scalar_type() == at::kHalf) return true;
#endif
  return false;
}

constexpr int64_t kCopyColumns = 1024;  // columns of a 16-bit weight copied at a time
constexpr int64_t kMaskedAtOnce = 16384;  // channels that a thread masks, at least
constexpr int64_t kLine = 64;  // bytes of a cache line

// ------------------------------------------------------------------------------- activations

enum class Activation { silu, gelu, gelu_tanh, relu, relu2 };

Activation parse_activation(c10::string_view name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  if (name == "relu2") return Activation::relu2;
  TORCH_CHECK(false, "wina::sparse_gate_up: unknown activation \"", name,
              "\"; known: silu, gelu, gelu_tanh, relu, relu2");
}

// exp by lanes, to about one unit in the last place: 2^n times a polynomial on [-ln2/2, ln2/2]
// (Taylor's, degree 7). Below -87 a number near 0, above 88 Inf; a NaN stays.
inline Floats exp(Floats all) {
  Floats x = all < -87.0f ? Floats{} - 87.0f : all;
  x = x > 88.0f ? Floats{} + 88.0f : x;
  constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
  const Floats n = (x * 1.44269504f + round) - round;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = Floats{} + 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Floats biased = n + 127.0f;
  const Integers bits = __builtin_convertvector(biased, Integers) << 23;
  Floats power;
  std::memcpy(&power, &bits, sizeof power);
  return all > 88.0f ? Floats{} + INFINITY : p * power;
}

inline void silu(float* v, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats x = load(v + i);
    store(v + i, x / (1.0f + exp(-x)));
  }
  for (; i < n; ++i) v[i] = v[i] / (1.0f + std::exp(-v[i]));
}

void activate(Activation activation, float* v, int64_t n) {
  switch (activation) {
    case Activation::silu: return silu(v, n);
    case Activation::gelu:
      for (int64_t i = 0; i < n; ++i)
        v[i] = 0.5f * v[i] * (1.0f + std::erf(v[i] * 0.70710678118654752f));
      return;
    case Activation::gelu_tanh:
      for (int64_t i = 0; i < n; ++i) {
        const float inner = 0.79788456080286536f * (v[i] + 0.044715f * v[i] * v[i] * v[i]);
        v[i] = 0.5f * v[i] * (1.0f + std::tanh(inner));
      }
      return;
    case Activation::relu:  // a NaN is not < 0: it stays
      for (int64_t i = 0; i < n; ++i) v[i] = v[i] < 0.0f ? 0.0f : v[i];
      return;
    case Activation::relu2:
      for (int64_t i = 0; i < n; ++i) v[i] = v[i] < 0.0f ? 0.0f : v[i] * v[i];
      return;
  }
}

Tensor activate(Activation activation, const Tensor& v) {
  switch (activation) {
    case Activation::silu: return at::silu(v);
    case Activation::gelu: return at::gelu(v);
    case Activation::gelu_tanh: return at::gelu(v, "tanh");
    case Activation::relu: return at::relu(v);
    case Activation::relu2: break;
  }
  const Tensor r = at::relu(v);
  return r.square();
}

// -------------------------------------------------------------------------------- the checks

// The checked vectors of one projection.
struct Vectors {
  Tensor threshold;  // [K] float32 contiguous
  Tensor bias;       // [N] contiguous, or undefined
  Tensor scale;      // [T] float32 contiguous, or undefined
};

Vectors check_vectors(const char* op, const char* prefix, const Tensor& x, int64_t tokens,
                      int64_t N, const Tensor& threshold, const OptionalTensor& bias,
                      const OptionalTensor& scale) {
  const auto name = [&](const char* what) { return std::string(op) + ": " + prefix + what; };
  const int64_t K = x.size(-1);
  TORCH_CHECK(threshold.dim() == 1 && threshold.size(0) == K, name("threshold"),
              " must have shape [", K, "], got ", threshold.sizes());
  TORCH_CHECK(threshold.scalar_type() == at::kFloat, name("threshold"), " must be float32, got ",
              threshold.scalar_type());
  Vectors p{threshold.contiguous(), {}, {}};
  if (bias.has_value() && bias->defined()) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == N, name("bias"),
                " must have shape [", N, "], got ", bias->sizes());
    TORCH_CHECK(bias->scalar_type() == x.scalar_type(), name("bias"), " must have x's dtype ",
                x.scalar_type(), ", got ", bias->scalar_type());
    p.bias = bias->contiguous();
  }
  if (scale.has_value() && scale->defined()) {
    TORCH_CHECK(scale->numel() == tokens, name("scale"), " must have ", tokens,
                " entries (one for each token of x), got shape ", scale->sizes());
    TORCH_CHECK(scale->scalar_type() == at::kFloat, name("scale"), " must be float32, got ",
                scale->scalar_type());
    p.scale = scale->contiguous().view({tokens});
  }
  const auto on_cpu = [](const Tensor& t) { return !t.defined() || t.is_cpu(); };
  TORCH_CHECK(on_cpu(threshold) && on_cpu(p.bias) && on_cpu(p.scale), op,
              ": x is on the CPU, the other arguments must be too");
  return p;
}

inline int64_t tokens_of(const Tensor& x) {
  return c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
}

void check_input(const char* op, const Tensor& x, bool weights_require_grad) {
  TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one dimension, got a scalar");
  TORCH_CHECK(x.is_floating_point(), op, ": x must be a floating-point tensor, got ",
              x.scalar_type());
  TORCH_CHECK(!at::GradMode::is_enabled() || !(x.requires_grad() || weights_require_grad), op,
              " has no backward; call it under torch.no_grad() or with tensors that do not require "
              "grad");
}

// A vector of an argument.
void check_floats(const char* op, const char* name, const Tensor& given, int64_t length) {
  TORCH_CHECK(given.dim() == 1 && given.size(0) == length && given.is_cpu() &&
                  given.scalar_type() == at::kFloat,
              op, ": ", name, " must be [", length, "] float32 on the CPU, got ", given.sizes(),
              " ", given.scalar_type());
}

// The residual [T, N], contiguous, or undefined.
Tensor check_residual(const char* op, const Tensor& x, int64_t tokens, at::IntArrayRef shape,
                      const OptionalTensor& residual) {
  if (!residual.has_value() || !residual->defined()) return {};
  TORCH_CHECK(residual->sizes().equals(shape) && residual->is_cpu(), op,
              ": residual must have shape ", shape, " on the CPU, got ", residual->sizes());
  TORCH_CHECK(residual->scalar_type() == x.scalar_type(), op, ": residual must have x's dtype ",
              x.scalar_type(), ", got ", residual->scalar_type());
  return residual->contiguous().view({tokens, shape.back()});
}

// ------------------------------------------------------------------------------- the results

const float* data_or_null(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<float>() : nullptr;
}

// acc[t * stride + n] += bias[first + n] for n < width.
template <class T>
void add_bias(float* acc, int tokens, int64_t width, const Tensor& bias, int64_t first,
              int64_t stride) {
  if (!bias.defined()) return;
  const T* b = bias.const_data_ptr<T>() + first;
  for (int t = 0; t < tokens; ++t)
    for (int64_t n = 0; n < width; ++n) acc[t * stride + n] += static_cast<float>(b[n]);
}

// acc[t * stride + n] += residual[t][first + n] for n < width; residual [tokens][N] or null.
template <class T>
void add_residual(float* acc, int tokens, int64_t width, const T* residual, int64_t N,
                  int64_t first, int64_t stride) {
  if (!residual) return;
  for (int t = 0; t < tokens; ++t)
    for (int64_t n = 0; n < width; ++n)
      acc[t * stride + n] += static_cast<float>(residual[t * N + first + n]);
}

// Tokens that a thread takes at least.
int64_t tokens_at_once(int64_t K) {
  return std::max<int64_t>(1, kMaskedAtOnce / std::max<int64_t>(K, 1));
}

// f(token, factor of its thresholds) for the tokens of x [T, K], shared out among threads.
template <class F>
void each_token(int64_t tokens, int64_t K, const Tensor& scale, const F& f) {
  const float* factor = data_or_null(scale);
  at::parallel_for(0, tokens, tokens_at_once(K), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t, factor ? factor[t] : 1.0f);
  });
}

// x with the dropped entries set to zero; x is [T, K].
Tensor masked(const Tensor& x, const Vectors& p) {
  const int64_t tokens = x.size(0), K = x.size(1);
  const auto in_one_pass = [&](const auto* zero) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(zero)>>;
    const Tensor held = x.contiguous();
    Tensor y = at::empty(held.sizes(), held.options());
    const T* from = held.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    const float* threshold = data_or_null(p.threshold);
    each_token(tokens, K, p.scale, [&](int64_t t, float factor) {
      mask_of_one_token(from + t * K, K, threshold, factor, to + t * K);
    });
    return y;
  };
  switch (x.scalar_type()) {
    case at::kBFloat16: return in_one_pass(static_cast<at::BFloat16*>(nullptr));
    case at::kHalf: return in_one_pass(static_cast<at::Half*>(nullptr));
    case at::kFloat: return in_one_pass(static_cast<float*>(nullptr));
    default: break;
  }
  Tensor limit = p.threshold;
  if (p.scale.defined()) limit = limit.mul(p.scale.unsqueeze(1));
  return x.masked_fill(x.abs().to(at::kFloat).le(limit.clamp_max(FLT_MAX)), 0);
}

// Fills y [..., N] in blocks of columns with f(dtype, first, width), computed in the accumulation
// dtype. The blocks bound the size of the float copies of weights of another type.
template <class F>
void fill_blocks(Tensor& y, int64_t tokens, int64_t block, const F& f) {
  const auto dtype = y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t N = y.size(-1);
  Tensor flat = y.view({tokens, N});
  for (int64_t n = 0; n < N; n += block) {
    const int64_t width = std::min(block, N - n);
    flat.narrow(1, n, width).copy_(f(dtype, n, width));
  }
}

}  // namespace
}  // namespace wina
