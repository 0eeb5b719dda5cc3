// Native CPU kernels of the library "wina": sparse products and top-k cut-offs, dispatch key CPU.
//
// The schemas are defined in Python (kernels/ops.py); this file only registers implementations.
// Flags (kernels/cpu/build.py):
//   compile  -std=c++17 -O3 -march=native -fopenmp -ffp-contract=fast -fno-math-errno -fPIC
//   link     -shared -ltorch_cpu -lc10, and *no* -fopenmp: the OpenMP symbols then resolve to the
//            runtime torch itself has loaded, so that the process has one thread pool, not two.
// Never -ffast-math: a NaN or Inf in x must survive the mask and show up in y.
//
// Decoding is bound by memory: the floor is kept_bytes / bandwidth. Hence
//   1. one branch-free serial pass turns (x, threshold) into a list of kept rows and coefficients;
//   2. the columns are split over torch's threads, a multiple of 64 bytes each;
//   3. a thread walks the list, kGroup rows at a time, with float32 accumulators that stay in L1,
//      and prefetches the rows to come: the next kept row is at an address that no hardware
//      prefetcher can guess.
// Every column adds its rows in list order with one fused multiply-add each, whatever the split,
// the tile or the group: results are bit-identical for any number of threads.

#include "common.h"

namespace wina {
namespace {

// -------------------------------------------------------------------------------- the product

// One group of rows, up to kGroup of them.
template <class T>
struct Group {
  const T* row[kGroup];    // at the first column of the tile
  const T* ahead[kGroup];  // rows to prefetch, same columns
  const float* coef;       // [rows][stride]
  int stride;
  int rows;
};

// acc[t][n .. n + P kStep) += sum over the group of coef[r][t] * row[r][n ..], for TT tokens.
// kFull: the group has kGroup rows, so that the loop over them can be unrolled.
template <class T, int TT, int P, bool kPrefetch, bool kFull>
inline void block(const Group<T>& g, int64_t n, int64_t ahead_n, float* acc,
                  int64_t acc_stride) {
  Pair a[TT][P];
#pragma GCC unroll 4
  for (int t = 0; t < TT; ++t)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) a[t][p] = load_pair(acc + t * acc_stride + n + p * kStep);
  const int rows = kFull ? kGroup : g.rows, stride = kFull ? 1 : g.stride;
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    const float* coef = g.coef + r * stride;
    if (kPrefetch) {
      const char* ahead = reinterpret_cast<const char*>(g.ahead[r] + ahead_n);
      constexpr int64_t bytes = P * kStep * sizeof(T);
#pragma GCC unroll 8
      for (int64_t b = 0; b < bytes; b += kLine) __builtin_prefetch(ahead + b, 0, 3);
    }
    const T* row = g.row[r] + n;
    Pair w[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) w[p] = load_pair(row + p * kStep);
#pragma GCC unroll 4
    for (int t = 0; t < TT; ++t) {
      const float c = coef[t];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        a[t][p].a += c * w[p].a;
        a[t][p].b += c * w[p].b;
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < TT; ++t)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      store(acc + t * acc_stride + n + p * kStep, a[t][p].a);
      store(acc + t * acc_stride + n + p * kStep + kLanes, a[t][p].b);
    }
}

template <class T, int TT, bool kPrefetch, bool kFull>
void strip(const Group<T>& g, int64_t width, float* acc, int64_t acc_stride) {
  // 2 TT P accumulators, 2 P weights and a coefficient have to fit 16 vector registers.
  constexpr int P = TT <= 2 ? 2 : 1;
  // The hardware prefetcher follows a row once it has seen its first lines: the last kHeadBytes of
  // this group's rows are where to fetch the first ones of the rows to come. Prefetching a whole
  // long row in software costs more instructions than it saves.
  const int64_t head =
      (width * static_cast<int64_t>(sizeof(T)) < kShortBytes ? kShortBytes : kHeadBytes) /
      static_cast<int64_t>(sizeof(T));
  const int64_t start = kPrefetch ? std::max<int64_t>(0, width - head) : width;
  int64_t n = 0;
  for (; n + P * kStep <= start; n += P * kStep)
    block<T, TT, P, false, kFull>(g, n, 0, acc, acc_stride);
  for (; n + P * kStep <= width; n += P * kStep)
    block<T, TT, P, kPrefetch, kFull>(g, n, n - start, acc, acc_stride);
  for (; n + kStep <= width; n += kStep)
    block<T, TT, 1, kPrefetch, kFull>(g, n, n - start, acc, acc_stride);
  for (; n < width; ++n)
    for (int t = 0; t < TT; ++t) {
      float a = acc[t * acc_stride + n];
      for (int r = 0; r < g.rows; ++r)
        a += g.coef[r * g.stride + t] * static_cast<float>(g.row[r][n]);
      acc[t * acc_stride + n] = a;
    }
}

template <class T, bool kPrefetch>
void strip_tokens(const Group<T>& g, int tokens, int64_t width, float* acc, int64_t acc_stride) {
  switch (tokens) {
    case 1:
      if (g.stride == 1 && g.rows == kGroup)  // decoding: the loop that matters
        return strip<T, 1, kPrefetch, true>(g, width, acc, acc_stride);
      return strip<T, 1, kPrefetch, false>(g, width, acc, acc_stride);
    case 2: return strip<T, 2, kPrefetch, false>(g, width, acc, acc_stride);
    case 3: return strip<T, 3, kPrefetch, false>(g, width, acc, acc_stride);
    default: return strip<T, 4, kPrefetch, false>(g, width, acc, acc_stride);
  }
}

// acc[t][0 .. width) = sum over kept rows of coef[row][t] * weight[row][first .. first + width).
template <class T>
void accumulate(const KeptRows& rows, int tokens, const T* weight, int64_t N, int64_t first,
                int64_t width, float* acc) {
  std::fill_n(acc, tokens * width, 0.0f);
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T));
  const int64_t lead = std::clamp<int64_t>(kLeadBytes / row_bytes, kGroup, kMaxLead);
  const T* base = weight + first;
  // The loop below prefetches from row `lead` on; these are the rows before it.
  for (int64_t k = 0; k < std::min(lead, rows.count); ++k) {
    const char* row = reinterpret_cast<const char*>(base + static_cast<int64_t>(rows.index[k]) * N);
    for (int64_t b = 0; b < std::min(row_bytes, kLeadBytes / lead); b += kLine)
      __builtin_prefetch(row + b, 0, 3);
  }
  Group<T> g;
  g.stride = tokens;
  for (int64_t k = 0; k < rows.count; k += kGroup) {
    const int32_t* index = rows.index.data() + k;
    g.rows = static_cast<int>(std::min<int64_t>(kGroup, rows.count - k));
    for (int r = 0; r < kGroup; ++r) {
      g.row[r] = base + static_cast<int64_t>(index[r]) * N;
      g.ahead[r] = base + static_cast<int64_t>(index[r + lead]) * N;
    }
    g.coef = rows.coef.data() + k * tokens;
    strip_tokens<T, true>(g, std::min(tokens, 4), width, acc, width);
    for (int t = 4; t < tokens; t += 4) {
      g.coef += 4;
      strip_tokens<T, false>(g, std::min(tokens - t, 4), width, acc + t * width, width);
    }
  }
  for (int t = 0; t < tokens; ++t) in_column_order<T>(acc + t * width, width);
}

// Calls f(first, width, scratch) for tiles that cover [0, N), over torch's threads. Scratch holds
// `arrays` times tokens * width floats.
template <class T, class F>
void for_tiles(int64_t N, int tokens, int64_t bytes_per_column, const F& f) {
  constexpr int64_t unit = kLine / static_cast<int64_t>(sizeof(T));
  const int64_t units = (N + unit - 1) / unit;
  const int64_t unit_bytes = std::max<int64_t>(1, bytes_per_column * unit);
  const int64_t grain = std::max<int64_t>(1, kSerialBytes / unit_bytes);
  const int64_t tile = kTile / tokens / unit * unit;
  at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(N, end * unit);
    for (int64_t n = begin * unit; n < last; n += tile) f(n, std::min(tile, last - n));
  });
}

// ---------------------------------------------------------------------------------- operators

// One projection's checked arguments.
struct Projection : Vectors {
  Tensor weight;  // [K, N] contiguous
};

Projection check(const char* op, const char* prefix, const Tensor& x, int64_t tokens,
                 const Tensor& weight, const Tensor& threshold, const OptionalTensor& bias,
                 const OptionalTensor& scale) {
  const auto weight_name = [&] {
    const std::string projection(prefix, *prefix ? std::strlen(prefix) - 1 : 0);
    return std::string(op) + ": " + (*prefix ? projection : "weight");
  };
  const int64_t K = x.size(-1);
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) == K, weight_name(),
              " must be [K, N] with K = ", K, " (the last dimension of x), got ", weight.sizes());
  TORCH_CHECK(weight.scalar_type() == x.scalar_type(), weight_name(), " must have x's dtype ",
              x.scalar_type(), ", got ", weight.scalar_type());
  TORCH_CHECK(weight.is_contiguous(), weight_name(),
              " must be contiguous (K-major: row j holds what multiplies x_j), got strides ",
              weight.strides());
  TORCH_CHECK(K < INT32_MAX, weight_name(), " has too many rows: ", K);
  TORCH_CHECK(weight.is_cpu(), op, ": x is on the CPU, the other arguments must be too");
  return {check_vectors(op, prefix, x, tokens, weight.size(1), threshold, bias, scale), weight};
}

bool fast(const Tensor& x, int64_t tokens, int64_t N) {
  const auto dtype = x.scalar_type();
  return (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) && tokens > 0 &&
      tokens <= (dtype == at::kFloat ? kMaxTokensFloat : kMaxTokensHalf) && x.size(-1) > 0 && N > 0;
}

template <class T>
void linear_fast(const Tensor& x, int64_t all_tokens, const Projection& p, const Tensor& residual,
                 Tensor& y) {
  const int64_t K = p.weight.size(0), N = p.weight.size(1);
  const float *threshold = p.threshold.const_data_ptr<float>(), *scale = data_or_null(p.scale);
  const T *in = x.const_data_ptr<T>(), *weight = p.weight.const_data_ptr<T>();
  const T* stream = residual.defined() ? residual.const_data_ptr<T>() : nullptr;
  T* out = y.mutable_data_ptr<T>();
  KeptRows& rows = kept_rows(0);
  for (int64_t t0 = 0; t0 < all_tokens; t0 += kMaxTokens) {
    const int tokens = static_cast<int>(std::min(kMaxTokens, all_tokens - t0));
    select_rows(rows, in + t0 * K, K, tokens, threshold, scale ? scale + t0 : nullptr);
    for_tiles<T>(N, tokens, rows.count * sizeof(T), [&](int64_t first, int64_t width) {
      alignas(kLine) float acc[kTile];
      accumulate(rows, tokens, weight, N, first, width, acc);
      add_bias<T>(acc, tokens, width, p.bias, first, width);
      add_residual(acc, tokens, width, stream ? stream + t0 * N : nullptr, N, first,
                   width);
      for (int t = 0; t < tokens; ++t)
        for (int64_t n = 0; n < width; ++n)
          out[(t0 + t) * N + first + n] = static_cast<T>(acc[t * width + n]);
    });
  }
}

template <class T>
void gate_up_fast(const Tensor& x, int64_t all_tokens, const Projection& gate,
                  const Projection& up, Activation activation, Tensor& h) {
  const int64_t K = gate.weight.size(0), N = gate.weight.size(1);
  const float* gate_threshold = gate.threshold.const_data_ptr<float>();
  const float* up_threshold = up.threshold.const_data_ptr<float>();
  const float *gate_scale = data_or_null(gate.scale), *up_scale = data_or_null(up.scale);
  const bool shared = gate_threshold == up_threshold && gate_scale == up_scale;
  const T* in = x.const_data_ptr<T>();
  const T* gate_weight = gate.weight.const_data_ptr<T>();
  const T* up_weight = up.weight.const_data_ptr<T>();
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
    const int64_t bytes = (gate_rows.count + up_rows.count) * sizeof(T);
    for_tiles<T>(N, tokens, bytes, [&](int64_t first, int64_t width) {
      alignas(kLine) float g[kTile];
      alignas(kLine) float u[kTile];
      accumulate(gate_rows, tokens, gate_weight, N, first, width, g);
      accumulate(up_rows, tokens, up_weight, N, first, width, u);
      add_bias<T>(g, tokens, width, gate.bias, first, width);
      add_bias<T>(u, tokens, width, up.bias, first, width);
      activate(activation, g, tokens * width);
      for (int t = 0; t < tokens; ++t)
        for (int64_t n = 0; n < width; ++n)
          out[(t0 + t) * N + first + n] = static_cast<T>(g[t * width + n] * u[t * width + n]);
    });
  }
}

// Columns converted at a time: a weight that is in the accumulation dtype is used as it lies.
int64_t copy_columns(const Tensor& y) {
  const bool half = y.scalar_type() != at::kFloat && y.scalar_type() != at::kDouble;
  return half ? kCopyColumns : std::max<int64_t>(1, y.size(-1));
}

// Columns [first, first + width) of the projection in `dtype`.
Tensor columns(const Tensor& masked_x, const Projection& p, at::ScalarType dtype, int64_t first,
               int64_t width) {
  const Tensor x = masked_x.to(dtype), w = p.weight.narrow(1, first, width).to(dtype);
  if (!p.bias.defined()) return at::mm(x, w);
  return at::addmm(p.bias.narrow(0, first, width).to(dtype), x, w);
}

Tensor sparse_linear(const Tensor& x, const Tensor& weight, const Tensor& threshold,
                     const OptionalTensor& bias, const OptionalTensor& scale,
                     const OptionalTensor& residual) {
  const char* op = "wina::sparse_linear";
  check_input(op, x, weight.requires_grad());
  const int64_t K = x.size(-1);
  const int64_t tokens = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  const Projection p = check(op, "", x, tokens, weight, threshold, bias, scale);
  const int64_t N = weight.size(1);
  auto shape = x.sizes().vec();
  shape.back() = N;
  const Tensor stream = check_residual(op, x, tokens, shape, residual);
  Tensor y = at::empty(shape, x.options());
  if (!fast(x, tokens, N)) {
    const Tensor m = masked(x.reshape({tokens, K}), p);
    fill_blocks(y, tokens, copy_columns(y), [&](at::ScalarType dtype, int64_t first, int64_t width) {
      Tensor part = columns(m, p, dtype, first, width);
      return stream.defined() ? part.add_(stream.narrow(1, first, width)) : part;
    });
    return y;
  }
  const Tensor in = x.contiguous();
  switch (x.scalar_type()) {
    case at::kBFloat16: linear_fast<at::BFloat16>(in, tokens, p, stream, y); break;
    case at::kHalf: linear_fast<at::Half>(in, tokens, p, stream, y); break;
    default: linear_fast<float>(in, tokens, p, stream, y); break;
  }
  return y;
}

Tensor sparse_gate_up(const Tensor& x, const Tensor& gate, const Tensor& up,
                      const Tensor& gate_threshold, const Tensor& up_threshold,
                      c10::string_view activation_name, const OptionalTensor& gate_bias,
                      const OptionalTensor& up_bias, const OptionalTensor& gate_scale,
                      const OptionalTensor& up_scale) {
  const char* op = "wina::sparse_gate_up";
  check_input(op, x, gate.requires_grad() || up.requires_grad());
  const Activation activation = parse_activation(activation_name);
  const int64_t K = x.size(-1);
  const int64_t tokens = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  const Projection g = check(op, "gate_", x, tokens, gate, gate_threshold, gate_bias, gate_scale);
  const Projection u = check(op, "up_", x, tokens, up, up_threshold, up_bias, up_scale);
  const int64_t N = gate.size(1);
  TORCH_CHECK(up.size(1) == N, op, ": up must have gate's shape ", gate.sizes(), ", got ",
              up.sizes());
  auto shape = x.sizes().vec();
  shape.back() = N;
  Tensor h = at::empty(shape, x.options());
  if (!fast(x, tokens, N)) {
    const Tensor flat = x.reshape({tokens, K});
    const Tensor gate_in = masked(flat, g), up_in = masked(flat, u);
    fill_blocks(h, tokens, copy_columns(h), [&](at::ScalarType dtype, int64_t first, int64_t width) {
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

std::vector<Tensor> sparse_group(const Tensor& x, at::TensorList weights,
                                 at::TensorList thresholds,
                                 const c10::List<OptionalTensor>& biases,
                                 const c10::List<OptionalTensor>& scales) {
  const size_t count = weights.size();
  TORCH_CHECK(count > 0 && thresholds.size() == count && biases.size() == count &&
                  scales.size() == count,
              "wina::sparse_group: expected one threshold, bias and scale (or None) for each of at "
              "least one weight");
  std::vector<Tensor> ys;
  ys.reserve(count);
  for (size_t i = 0; i < count; ++i)
    ys.push_back(sparse_linear(x, weights[i], thresholds[i], biases.get(i), scales.get(i), {}));
  return ys;
}

// -------------------------------------------------------------------------------------- scales

// A float's bits, those of negative numbers turned over: ordered as integers like the floats. Its
// own inverse but for the type.
inline int32_t to_key(float v) {
  int32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits ^ ((bits >> 31) & INT32_MAX);
}

inline float from_key(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & INT32_MAX);
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

int32_t count_below(const int32_t* keys, int64_t K, int32_t limit) {
  int32_t count = 0;
  for (int64_t j = 0; j < K; ++j) count += keys[j] < limit;
  return count;
}

// Half way between the dropped-th smallest score |x| / threshold and the next one, NaN as +inf.
// The score of a rank is found bit by bit, counting what lies below: no sort, no branch on data.
template <class T>
float topk_cutoff(const T* x, const float* threshold, int64_t K, int64_t dropped, int32_t* keys) {
  const int32_t infinite = to_key(INFINITY);
  for (int64_t j = 0; j < K; ++j) {
    const float score = std::fabs(static_cast<float>(x[j])) / threshold[j];
    keys[j] = std::isnan(score) ? infinite : to_key(score);
  }
  int32_t lower = count_below(keys, K, 0) < dropped ? 0 : INT32_MIN;
  for (int bit = 30; bit >= 0; --bit) {
    const int32_t candidate = lower + (int32_t{1} << bit);
    if (count_below(keys, K, candidate) < dropped) lower = candidate;
  }
  int32_t upper = INT32_MAX;
  int64_t up_to = 0;
  for (int64_t j = 0; j < K; ++j) {
    up_to += keys[j] <= lower;
    upper = std::min(upper, keys[j] <= lower ? INT32_MAX : keys[j]);
  }
  if (up_to > dropped) upper = lower;
  return (from_key(lower) + from_key(upper)) / 2;
}

// One float for each token: f(x of the token, its scratch of K integers).
template <class T, class F>
void for_tokens(const Tensor& x, Tensor& scale, const F& f) {
  const int64_t K = x.size(-1);
  const T* in = x.const_data_ptr<T>();
  float* out = scale.mutable_data_ptr<float>();
  at::parallel_for(0, scale.numel(), 1, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<int32_t> scratch;
    if (static_cast<int64_t>(scratch.size()) < K) scratch.resize(K);
    for (int64_t t = begin; t < end; ++t) out[t] = f(in + t * K, scratch.data());
  });
}

Tensor one_a_token(const Tensor& x) {
  return at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
}

Tensor topk_scale(const Tensor& x, const Tensor& threshold, int64_t dropped) {
  const char* op = "wina::topk_scale";
  check_input(op, x, false);
  const int64_t K = x.size(-1);
  TORCH_CHECK(threshold.dim() == 1 && threshold.size(0) == K && threshold.is_cpu() &&
                  threshold.scalar_type() == at::kFloat,
              op, ": threshold must be [", K, "] float32 on the CPU, got ", threshold.sizes(), " ",
              threshold.scalar_type());
  TORCH_CHECK(0 < dropped && dropped < K && K < INT32_MAX, op, ": dropped must be in [1, ", K - 1,
              "], got ", dropped);
  const Tensor limit = threshold.contiguous();
  const float* t = limit.const_data_ptr<float>();
  Tensor scale = one_a_token(x);
  const auto of = [&](auto* row, int32_t* keys) { return topk_cutoff(row, t, K, dropped, keys); };
  switch (x.scalar_type()) {
    case at::kBFloat16: for_tokens<at::BFloat16>(x.contiguous(), scale, of); break;
    case at::kHalf: for_tokens<at::Half>(x.contiguous(), scale, of); break;
    default: for_tokens<float>(x.to(at::kFloat).contiguous(), scale, of); break;
  }
  return scale;
}

Tensor mean_scale(const Tensor& x) {
  check_input("wina::mean_scale", x, false);
  return at::mean(x.abs(), {-1}, /*keepdim=*/false, at::kFloat);
}

}  // namespace
}  // namespace wina

TORCH_LIBRARY_IMPL(wina, CPU, m) {
  m.impl("mean_scale", TORCH_FN(wina::mean_scale));
  m.impl("sparse_linear", TORCH_FN(wina::sparse_linear));
  m.impl("sparse_group", TORCH_FN(wina::sparse_group));
  m.impl("topk_scale", TORCH_FN(wina::topk_scale));
  m.impl("sparse_gate_up", TORCH_FN(wina::sparse_gate_up));
}
