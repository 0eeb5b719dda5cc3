// Native CPU kernels of the library "wina": sparse products with float weights, dispatch key CPU.
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
//   2. the list is cut into parts, which torch's threads take (parts.h);
//   3. a thread walks a part kGroup rows at a time, with float32 sums that stay in L1. Of short rows
//      it prefetches the next one: where rows are skipped no hardware prefetcher can guess it.
// The products of kGroup rows are added to each other first, then to the sum: shorter chains of
// roundings. Every column adds up in the same order, whatever the number of threads: results are
// bit-identical.

#include "parts.h"

namespace wina {
namespace {

// -------------------------------------------------------------------------------- the product

// Some rows of a weight, up to kGroup, and what they are multiplied by.
template <class T>
struct Group {
  const T* row[kGroup];   // at the first column of the tile
  const T* next[kGroup];  // rows to prefetch, same columns
  float coef[kGroup * 4];  // [rows][TT]
  int rows;
};

// sums[t][n .. n + P kStep) += sum over the group of coef[r][t] * row[r][n ..], for TT tokens.
// kFull: the group has kGroup rows, so that the loop over them can be unrolled.
template <class T, int TT, int P, bool kPrefetch, bool kFull>
inline void block(const Group<T>& g, int64_t n, float* sums, int64_t stride) {
  Pair a[TT][P] = {};
  const int rows = kFull ? kGroup : g.rows;
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    if (kPrefetch) {
      const char* next = reinterpret_cast<const char*>(g.next[r] + n);
      constexpr int64_t bytes = P * kStep * sizeof(T);
#pragma GCC unroll 8
      for (int64_t b = 0; b < bytes; b += kLine) __builtin_prefetch(next + b, 0, 3);
    }
    const T* row = g.row[r] + n;
    Pair w[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) w[p] = load_pair(row + p * kStep);
#pragma GCC unroll 4
    for (int t = 0; t < TT; ++t) {
      const float c = g.coef[r * TT + t];
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
      float* sum = sums + t * stride + n + p * kStep;
      store_pair(sum, {load(sum) + a[t][p].a, load(sum + kLanes) + a[t][p].b});
    }
}

template <class T, int TT, bool kPrefetch, bool kFull>
void strip(const Group<T>& g, int64_t width, float* sums, int64_t stride) {
  // 2 TT P sums, 2 P weights and a coefficient have to fit 16 vector registers.
  constexpr int P = TT <= 2 ? 2 : 1;
  int64_t n = 0;
  for (; n + P * kStep <= width; n += P * kStep)
    block<T, TT, P, kPrefetch, kFull>(g, n, sums, stride);
  for (; n + kStep <= width; n += kStep) block<T, TT, 1, kPrefetch, kFull>(g, n, sums, stride);
  for (; n < width; ++n)
    for (int t = 0; t < TT; ++t) {
      float a = 0.0f;
      for (int r = 0; r < g.rows; ++r)
        a += g.coef[r * TT + t] * static_cast<float>(g.row[r][n]);
      sums[t * stride + n] += a;
    }
}

// The group's product for TT tokens from `token` on; `row` has the places of its rows in the list.
template <class T, int TT>
void multiply(Group<T>& g, const KeptRows& rows, const int64_t* row, int tokens, int token,
              bool prefetch, int64_t width, float* sums, int64_t stride) {
  for (int r = 0; r < g.rows; ++r)
    for (int t = 0; t < TT; ++t)
      g.coef[r * TT + t] = rows.coef[row[r] * tokens + token + t];
  float* to = sums + token * stride;
  if (g.rows < kGroup) return strip<T, TT, false, false>(g, width, to, stride);
  if (prefetch && token == 0) return strip<T, TT, true, true>(g, width, to, stride);
  strip<T, TT, false, true>(g, width, to, stride);
}

// A weight [K, columns], K-major.
template <class T>
struct FloatWeight {
  static constexpr int64_t kUnitBytes = kLine, kUnit = kLine / sizeof(T);

  const T* data;
  int64_t columns;

  int64_t units() const { return (columns + kUnit - 1) / kUnit; }

  // sums[t][n] = the product of a part of the kept rows with the columns of some units.
  void accumulate(const KeptRows& rows, const Part& part, int tokens, int64_t first, int64_t units,
                  float* sums, int64_t stride) const {
    const int64_t width = std::min(units * kUnit, columns - first * kUnit);
    for (int t = 0; t < tokens; ++t) std::fill_n(sums + t * stride, width, 0.0f);
    const T* base = data + first * kUnit;
    const bool prefetch = width * static_cast<int64_t>(sizeof(T)) < kShortBytes;
    const auto row_at = [&](int64_t at) {
      return base + rows.index[std::min(at, rows.count)] * columns;
    };
    const auto add = [&](int64_t at, int64_t step, int count, int64_t next, int64_t next_step) {
      Group<T> g;
      int64_t place[kGroup];
      g.rows = count;
      for (int r = 0; r < count; ++r) {
        place[r] = at + r * step;
        g.row[r] = row_at(place[r]);
        g.next[r] = row_at(next + r * next_step);
      }
      for (int t = 0; t < tokens; t += 4) switch (std::min(tokens - t, 4)) {
          case 1: multiply<T, 1>(g, rows, place, tokens, t, prefetch, width, sums, stride); break;
          case 2: multiply<T, 2>(g, rows, place, tokens, t, prefetch, width, sums, stride); break;
          case 3: multiply<T, 3>(g, rows, place, tokens, t, prefetch, width, sums, stride); break;
          default: multiply<T, 4>(g, rows, place, tokens, t, prefetch, width, sums, stride); break;
        }
    };
    for (int64_t i = 0; i + 1 < part.length; ++i)
      add(part.first + i, part.length, kGroup, part.first + i + 1, part.length);
    if (part.length > 0)
      add(part.first + part.length - 1, part.length, kGroup, part.after, part.after_step);
    if (part.tail_rows) add(part.tail, 1, static_cast<int>(part.tail_rows), part.tail, 1);
  }

  // Columns [first, first + width) as accumulate() leaves them, in column order.
  void reorder(float* acc, int64_t first, int64_t width) const {
    in_column_order<T>(acc, std::min(width, columns / kStep * kStep - first));
  }
};

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

int64_t max_tokens(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16: return kMaxTokensBFloat16;
    case at::kHalf: return kMaxTokensFloat16;
    default: return kMaxTokensFloat;
  }
}

bool fast(const Tensor& x, int64_t tokens, int64_t N) {
  const auto dtype = x.scalar_type();
  return (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) && tokens > 0 &&
      tokens <= max_tokens(dtype) && x.size(-1) > 0 && N > 0;
}

template <class T>
Product<FloatWeight<T>> product(Lists<T>& lists, const Projection& p, int64_t first_token) {
  const float* scale = data_or_null(p.scale);
  const FloatWeight<T> weight{p.weight.const_data_ptr<T>(), p.weight.size(1)};
  return {lists.of(p.threshold.const_data_ptr<float>(), scale ? scale + first_token : nullptr),
          weight, weight.units()};
}

// ys[i] = the product of x with projection i, all in one parallel region.
template <class T>
void linear_fast(const Tensor& x, int64_t all_tokens, const std::vector<Projection>& projections,
                 const Tensor& residual, std::vector<Tensor>& ys) {
  const int64_t K = x.size(-1);
  const T* stream = residual.defined() ? residual.const_data_ptr<T>() : nullptr;
  for_passes(all_tokens, [&](int64_t first, int tokens) {
    Lists<T> lists(x.const_data_ptr<T>() + first * K, K, tokens);
    std::vector<Product<FloatWeight<T>>> products;
    for (const Projection& p : projections) products.push_back(product(lists, p, first));
    compute(products, tokens);
    for (size_t i = 0; i < products.size(); ++i) {
      const int64_t offset = first * products[i].weight.columns;
      finish<T>(products[i], tokens, projections[i].bias, stream ? stream + offset : nullptr,
                ys[i].mutable_data_ptr<T>() + offset);
    }
  });
}

template <class T>
void gate_up_fast(const Tensor& x, int64_t all_tokens, const Projection& gate,
                  const Projection& up, Activation activation, Tensor& h) {
  const int64_t K = gate.weight.size(0), N = gate.weight.size(1);
  for_passes(all_tokens, [&](int64_t first, int tokens) {
    Lists<T> lists(x.const_data_ptr<T>() + first * K, K, tokens);
    std::vector<Product<FloatWeight<T>>> products{product(lists, gate, first),
                                                  product(lists, up, first)};
    compute(products, tokens);
    finish_gated<T>(products[0], products[1], tokens, activation, gate.bias, up.bias,
                    h.mutable_data_ptr<T>() + first * N);
  });
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

// The product of masked x [T, K] with a whole projection in the dtype of x, rounded once, with what
// is added: a bias or a residual [T, N], or nothing.
Tensor product_as_it_lies(const Tensor& masked_x, const Projection& p, const Tensor& added) {
  return added.defined() ? at::addmm(added, masked_x, p.weight) : at::mm(masked_x, p.weight);
}

// The products of x with projections; the residual is for the only one.
std::vector<Tensor> linear(const Tensor& x, int64_t tokens,
                           const std::vector<Projection>& projections, const Tensor& residual) {
  std::vector<Tensor> ys;
  bool all_fast = true;
  for (const Projection& p : projections) {
    auto shape = x.sizes().vec();
    shape.back() = p.weight.size(1);
    ys.push_back(at::empty(shape, x.options()));
    all_fast &= fast(x, tokens, shape.back());
  }
  if (!all_fast) {
    const Tensor flat = x.reshape({tokens, x.size(-1)});
    for (size_t i = 0; i < ys.size(); ++i) {
      const Projection& p = projections[i];
      const Tensor m = masked(flat, p);
      if (multiplies(x) && !(residual.defined() && p.bias.defined())) {
        const Tensor& added = residual.defined() ? residual : p.bias;
        ys[i] = product_as_it_lies(m, p, added).view(ys[i].sizes());
        continue;
      }
      fill_blocks(ys[i], tokens, copy_columns(ys[i]),
                  [&](at::ScalarType dtype, int64_t first, int64_t width) {
                    Tensor part = columns(m, p, dtype, first, width);
                    return residual.defined() ? part.add_(residual.narrow(1, first, width)) : part;
                  });
    }
    return ys;
  }
  const Tensor in = x.contiguous();
  switch (x.scalar_type()) {
    case at::kBFloat16: linear_fast<at::BFloat16>(in, tokens, projections, residual, ys); break;
    case at::kHalf: linear_fast<at::Half>(in, tokens, projections, residual, ys); break;
    default: linear_fast<float>(in, tokens, projections, residual, ys); break;
  }
  return ys;
}

Tensor sparse_linear(const Tensor& x, const Tensor& weight, const Tensor& threshold,
                     const OptionalTensor& bias, const OptionalTensor& scale,
                     const OptionalTensor& residual) {
  const char* op = "wina::sparse_linear";
  check_input(op, x, weight.requires_grad());
  const int64_t tokens = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  const std::vector<Projection> p{check(op, "", x, tokens, weight, threshold, bias, scale)};
  auto shape = x.sizes().vec();
  shape.back() = weight.size(1);
  return linear(x, tokens, p, check_residual(op, x, tokens, shape, residual))[0];
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
    if (multiplies(x)) {
      const Tensor wide =
          activate(activation, product_as_it_lies(gate_in, g, g.bias).to(at::kFloat));
      return wide.mul(product_as_it_lies(up_in, u, u.bias)).to(x.scalar_type()).view(shape);
    }
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
  const char* op = "wina::sparse_group";
  const size_t count = weights.size();
  TORCH_CHECK(count > 0 && thresholds.size() == count && biases.size() == count &&
                  scales.size() == count,
              op, ": expected one threshold, bias and scale (or None) for each of at least one "
              "weight");
  check_input(op, x, std::any_of(weights.begin(), weights.end(),
                                 [](const Tensor& w) { return w.requires_grad(); }));
  const int64_t tokens = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  std::vector<Projection> projections;
  for (size_t i = 0; i < count; ++i)
    projections.push_back(check(op, "", x, tokens, weights[i], thresholds[i],
                                biases.get(i), scales.get(i)));
  return linear(x, tokens, projections, {});
}

}  // namespace
}  // namespace wina

TORCH_LIBRARY_IMPL(wina, CPU, m) {
  m.impl("sparse_linear", TORCH_FN(wina::sparse_linear));
  m.impl("sparse_group", TORCH_FN(wina::sparse_group));
  m.impl("sparse_gate_up", TORCH_FN(wina::sparse_gate_up));
}
