// Native CPU kernels for the factor of a token's thresholds: topk_scale, mean_scale, probe_scale,
// tracked_scale; and for what they keep: keep_mask, mask_inputs.

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
  check_floats(op, "threshold", threshold, K);
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
  check_floats(op, "probe", probe, K + 1);
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

// kernels/reference.py's TRACKED_TOKENS and TRACKED_LIMIT.
constexpr int64_t kTrackedTokens = 16;
constexpr float kTrackedLimit = 1.0f;

// Channels of a token that are kept: not |x| <= threshold * factor.
template <class T>
int32_t count_kept(const T* x, const float* threshold, float factor, int64_t K) {
  int32_t dropped = 0;
  for (int64_t j = 0; j < K; ++j) {
    dropped += std::fabs(static_cast<float>(x[j])) <= cutoff(threshold[j], factor);
  }
  return static_cast<int32_t>(K) - dropped;
}

// The factors of a sequence's tokens; `scale` and `counted` may be null. Returns its new state.
template <class T>
float track(const T* x, const float* threshold, float state, float sparsity, float rate,
            const float* scale, const bool* counted, int64_t tokens, int64_t K, float* out) {
  for (int64_t first = 0; first < tokens; first += kTrackedTokens) {
    const int64_t end = std::min(tokens, first + kTrackedTokens);
    const float common = std::exp(state);
    float surplus = 0.0f;
    for (int64_t t = first; t < end; ++t) {
      out[t] = scale ? scale[t] * common : common;
      if (counted && !counted[t]) continue;
      const int32_t kept = count_kept(x + t * K, threshold, out[t], K);
      surplus += sparsity - 1.0f + static_cast<float>(kept) / static_cast<float>(K);
    }
    state = std::min(std::max(state + rate * surplus, -kTrackedLimit), kTrackedLimit);
  }
  return state;
}

Tensor tracked_scale(const Tensor& x, const Tensor& threshold, const Tensor& state, double sparsity,
                     double rate, const OptionalTensor& scale, const OptionalTensor& counted) {
  const char* op = "wina::tracked_scale";
  check_input(op, x, false);
  const int64_t K = x.size(-1), all = x.numel() / std::max<int64_t>(K, 1);
  check_floats(op, "threshold", threshold, K);
  TORCH_CHECK(state.dim() == 1 && state.numel() > 0 && state.is_contiguous() && state.is_cpu() &&
                  state.scalar_type() == at::kFloat && all % state.numel() == 0,
              op, ": state must be [sequences] float32 on the CPU for ", all, " tokens, got ",
              state.sizes(), " ", state.scalar_type());
  const auto fits = [&](const OptionalTensor& given, at::ScalarType type) {
    return !given.has_value() || (given->sizes().equals(x.sizes().slice(0, x.dim() - 1)) &&
                                  given->scalar_type() == type && given->is_cpu());
  };
  TORCH_CHECK(fits(scale, at::kFloat), op, ": scale must have a float32 for each token");
  TORCH_CHECK(fits(counted, at::kBool), op, ": counted must have a boolean for each token");
  TORCH_CHECK(0.0 <= sparsity && sparsity <= 1.0 && rate > 0.0, op,
              ": sparsity lies in [0, 1] and rate is positive, got ", sparsity, " and ", rate);
  const Tensor limit = threshold.contiguous();
  const Tensor given = scale.has_value() ? scale->contiguous() : Tensor();
  const Tensor which = counted.has_value() ? counted->contiguous() : Tensor();
  const float* t = limit.const_data_ptr<float>();
  const float* s = given.defined() ? given.const_data_ptr<float>() : nullptr;
  const bool* c = which.defined() ? which.const_data_ptr<bool>() : nullptr;
  Tensor out = one_a_token(x);
  float* to = out.mutable_data_ptr<float>();
  float* states = state.mutable_data_ptr<float>();
  const int64_t tokens = all / state.numel();
  const auto run = [&](const auto* rows) {
    at::parallel_for(0, state.numel(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t at = b * tokens;
        states[b] = track(rows + at * K, t, states[b], static_cast<float>(sparsity),
                          static_cast<float>(rate), s ? s + at : nullptr, c ? c + at : nullptr,
                          tokens, K, to + at);
      }
    });
  };
  const Tensor held = x.contiguous();
  switch (x.scalar_type()) {
    case at::kBFloat16: run(held.const_data_ptr<at::BFloat16>()); break;
    case at::kHalf: run(held.const_data_ptr<at::Half>()); break;
    default: {
      const Tensor wide = held.to(at::kFloat);
      run(wide.const_data_ptr<float>());
    }
  }
  return out;
}

Tensor keep_mask(const Tensor& x, const Tensor& threshold, const OptionalTensor& scale) {
  const char* op = "wina::keep_mask";
  check_input(op, x, false);
  const int64_t K = x.size(-1), tokens = tokens_of(x);
  const Vectors v = check_vectors(op, "", x, tokens, K, threshold, {}, scale);
  if (x.scalar_type() == at::kDouble) {
    Tensor limit = v.threshold;
    if (v.scale.defined()) {
      const auto each = x.sizes().slice(0, x.dim() - 1);
      limit = limit.mul(v.scale.view(each).unsqueeze(-1));
    }
    return x.abs().le(limit.clamp_max(FLT_MAX)).logical_not();
  }
  const Tensor rows = x.contiguous();
  Tensor kept = at::empty(x.sizes(), x.options().dtype(at::kBool));
  bool* to = kept.mutable_data_ptr<bool>();
  const float* limit = data_or_null(v.threshold);
  const auto run = [&](const auto* from) {
    each_token(tokens, K, v.scale, [&](int64_t t, float factor) {
      keep_of_one_token(from + t * K, K, limit, factor, to + t * K);
    });
  };
  switch (rows.scalar_type()) {
    case at::kBFloat16: run(rows.const_data_ptr<at::BFloat16>()); break;
    case at::kHalf: run(rows.const_data_ptr<at::Half>()); break;
    default: run(rows.const_data_ptr<float>()); break;
  }
  return kept;
}

Tensor mask_inputs(const Tensor& x, const Tensor& threshold, const OptionalTensor& scale) {
  const char* op = "wina::mask_inputs";
  check_input(op, x, false);
  const int64_t tokens = tokens_of(x), K = x.size(-1);
  const Vectors v = check_vectors(op, "", x, tokens, K, threshold, {}, scale);
  return masked(x.reshape({tokens, K}), v).view(x.sizes());
}

}  // namespace
}  // namespace wina

TORCH_LIBRARY_IMPL(wina, CPU, m) {
  m.impl("keep_mask", TORCH_FN(wina::keep_mask));
  m.impl("mask_inputs", TORCH_FN(wina::mask_inputs));
  m.impl("mean_scale", TORCH_FN(wina::mean_scale));
  m.impl("probe_scale", TORCH_FN(wina::probe_scale));
  m.impl("topk_scale", TORCH_FN(wina::topk_scale));
  m.impl("tracked_scale", TORCH_FN(wina::tracked_scale));
}
