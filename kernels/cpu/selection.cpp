// Native CPU kernels for the factor of a token's thresholds: topk_scale, mean_scale, probe_scale.

#include "common.h"

namespace wina {
namespace {

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

// exp(a·x + b), the exponent within ±limit; NaN stays NaN.
template <class T>
float probed(const T* x, const float* probe, int64_t K, float limit) {
  constexpr int64_t kParts = 16;
  float part[kParts] = {};
  int64_t j = 0;
  for (; j + kParts <= K; j += kParts)
    for (int64_t i = 0; i < kParts; ++i) part[i] += static_cast<float>(x[j + i]) * probe[j + i];
  float sum = probe[K];
  for (; j < K; ++j) sum += static_cast<float>(x[j]) * probe[j];
  for (int64_t i = 0; i < kParts; ++i) sum += part[i];
  if (sum > limit) sum = limit;
  if (sum < -limit) sum = -limit;
  return std::exp(sum);
}

Tensor probe_scale(const Tensor& x, const Tensor& probe, double limit) {
  const char* op = "wina::probe_scale";
  check_input(op, x, false);
  const int64_t K = x.size(-1);
  TORCH_CHECK(probe.dim() == 1 && probe.size(0) == K + 1 && probe.is_cpu() &&
                  probe.scalar_type() == at::kFloat,
              op, ": probe must be [", K + 1, "] float32 on the CPU, got ", probe.sizes(), " ",
              probe.scalar_type());
  TORCH_CHECK(limit > 0, op, ": limit must be positive, got ", limit);
  const Tensor held = probe.contiguous();
  const float* p = held.const_data_ptr<float>();
  Tensor scale = one_a_token(x);
  const auto of = [&](auto* row, int32_t*) { return probed(row, p, K, limit); };
  switch (x.scalar_type()) {
    case at::kBFloat16: for_tokens<at::BFloat16>(x.contiguous(), scale, of); break;
    case at::kHalf: for_tokens<at::Half>(x.contiguous(), scale, of); break;
    default: for_tokens<float>(x.to(at::kFloat).contiguous(), scale, of); break;
  }
  return scale;
}

}  // namespace
}  // namespace wina

TORCH_LIBRARY_IMPL(wina, CPU, m) {
  m.impl("mean_scale", TORCH_FN(wina::mean_scale));
  m.impl("probe_scale", TORCH_FN(wina::probe_scale));
  m.impl("topk_scale", TORCH_FN(wina::topk_scale));
}
