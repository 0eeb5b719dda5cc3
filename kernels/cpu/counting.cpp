// Native CPU kernels for what calibration counts: count_scores, kept_sums, mask_backward.

#include "common.h"

#include <mutex>

namespace wina {
namespace {

// kernels/counting.py's SHIFT, BINS and smallest scale.
constexpr int kShift = 16;
constexpr int64_t kBins = int64_t{1} << 15;
constexpr float kSmallestScale = 1e-30f;
constexpr int64_t kColumns = 256;  // of mask_backward, that a thread sums at a time
constexpr int64_t kUnrolled = 4 * kLanes;

// The vector of an argument, contiguous.
Tensor floats_of(const char* op, const char* name, const Tensor& given, int64_t length) {
  check_floats(op, name, given, length);
  return given.contiguous();
}

// The factors of tokens, contiguous.
Tensor factors_of(const char* op, const Tensor& x, const Tensor& scale) {
  TORCH_CHECK(scale.sizes().equals(x.sizes().slice(0, x.dim() - 1)) && scale.is_cpu() &&
                  scale.scalar_type() == at::kFloat,
              op, ": scale must have a float32 for each token");
  return scale.contiguous();
}

void check_gradient(const char* op, const Tensor& x, const Tensor& gradient) {
  TORCH_CHECK(gradient.sizes().equals(x.sizes()) && gradient.is_cpu() &&
                  gradient.scalar_type() == x.scalar_type(),
              op, ": gradient must be ", x.sizes(), " ", x.scalar_type(), " as x is, got ",
              gradient.sizes(), " ", gradient.scalar_type());
}

// f(zero of x's type).
template <class F>
void for_type(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case at::kBFloat16: return f(at::BFloat16());
    case at::kHalf: return f(at::Half());
    case at::kDouble: return f(double());
    default: return f(float());
  }
}

Tensor count_scores(const Tensor& x, const Tensor& constants, const OptionalTensor& scale) {
  const char* op = "wina::count_scores";
  check_input(op, x, false);
  const int64_t K = x.size(-1), tokens = tokens_of(x);
  const Tensor c = floats_of(op, "constants", constants, K);
  const Tensor s = scale.has_value() ? factors_of(op, x, *scale) : Tensor();
  const float* of = c.const_data_ptr<float>();
  const float* factor = data_or_null(s);
  const Tensor rows = x.contiguous();
  Tensor counts = at::empty({kBins}, x.options().dtype(at::kLong)).zero_();
  int64_t* total = counts.mutable_data_ptr<int64_t>();
  std::mutex lock;
  for_type(rows, [&](auto zero) {
    using T = decltype(zero);
    const T* from = rows.const_data_ptr<T>();
    // Few and large parts: every one adds a table.
    const int64_t grain = std::max(tokens_at_once(K), tokens / 64 + 1);
    at::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> own(kBins, 0);
      std::vector<int32_t> bin(K);
      for (int64_t t = begin; t < end; ++t) {
        const T* row = from + t * K;
        const float divisor = factor ? std::max(factor[t], kSmallestScale) : 1.0f;
        for (int64_t j = 0; j < K; ++j) {
          const float score = std::fabs(static_cast<float>(row[j])) * of[j] / divisor;
          int32_t bits;
          std::memcpy(&bits, &score, sizeof bits);
          bin[j] = (bits & INT32_MAX) >> kShift;
        }
        for (int64_t j = 0; j < K; ++j) ++own[bin[j]];
      }
      const std::lock_guard<std::mutex> guard(lock);
      for (int64_t b = 0; b < kBins; ++b) total[b] += own[b];
    });
  });
  return counts;
}

Tensor kept_sums(const Tensor& x, const Tensor& gradient, const Tensor& constants,
                 const Tensor& cutoffs) {
  const char* op = "wina::kept_sums";
  check_input(op, x, false);
  check_gradient(op, x, gradient);
  const int64_t K = x.size(-1), tokens = tokens_of(x), cuts = cutoffs.numel();
  const Tensor c = floats_of(op, "constants", constants, K);
  const Tensor limit = floats_of(op, "cutoffs", cutoffs, cuts);
  const float* of = c.const_data_ptr<float>();
  const float* cutoff = limit.const_data_ptr<float>();
  const Tensor rows = x.contiguous(), slopes = gradient.contiguous();
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = cuts;
  Tensor sums = at::empty(shape, x.options().dtype(at::kFloat));
  float* to = sums.mutable_data_ptr<float>();
  for_type(rows, [&](auto zero) {
    using T = decltype(zero);
    const T* from = rows.const_data_ptr<T>();
    const T* slope = slopes.const_data_ptr<T>();
    at::parallel_for(0, tokens, tokens_at_once(K), [&](int64_t begin, int64_t end) {
      const int64_t whole = (K + kUnrolled - 1) / kUnrolled * kUnrolled;
      std::vector<float> scores(whole, 0.0f), products(whole, 0.0f);
      for (int64_t t = begin; t < end; ++t) {
        const T *row = from + t * K, *g = slope + t * K;
        for (int64_t j = 0; j < K; ++j) {
          const float wide = static_cast<float>(row[j]);
          scores[j] = std::fabs(wide) * of[j];
          products[j] = wide * static_cast<float>(g[j]);
        }
        for (int64_t i = 0; i < cuts; ++i) {
          Floats sum_of[4] = {};
          for (int64_t j = 0; j < whole; j += kUnrolled) {
            for (int k = 0; k < 4; ++k) {
              const Floats score = load(&scores[j + k * kLanes]);
              const Floats product = load(&products[j + k * kLanes]);
              sum_of[k] += score <= cutoff[i] ? Floats{} : product;  // NaN is kept
            }
          }
          to[t * cuts + i] = sum((sum_of[0] + sum_of[1]) + (sum_of[2] + sum_of[3]));
        }
      }
    });
  });
  return sums;
}

// 1/x where x is positive, else 0.
inline float inverse(float x) { return x > 0.0f ? 1.0f / x : 0.0f; }

// log r to float32 for |log r| <= 0.5, by its series in (r - 1)/(r + 1); farther from 0 than 0.5 for
// other r. NaN stays.
inline Floats log_near_one(Floats r) {
  r = r < 0.25f ? Floats{} + 0.25f : r;
  r = r > 4.0f ? Floats{} + 4.0f : r;
  const Floats z = (r - 1.0f) / (r + 1.0f), q = z * z;
  return 2.0f * z * (1.0f + q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9)))));
}

// Integers as wide as a type, to pass or clear its bits.
template <size_t kBytes>
struct Bits;
template <>
struct Bits<2> {
  using Type = int16_t;
};
template <>
struct Bits<4> {
  using Type = int32_t;
};
template <>
struct Bits<8> {
  using Type = int64_t;
};

// The sums of mask_backward over some columns; what lies beyond them is padding.
struct ColumnSums {
  float loss[kColumns] = {}, near[kColumns] = {}, kept[kColumns] = {};
  float limit[kColumns] = {}, over[kColumns] = {};  // thresholds, and 1 over them
  float wide[kColumns] = {}, along[kColumns] = {};  // x and the gradient
  int32_t keep[kColumns];                           // all bits, or none

  // A token: n channels, whose gradient goes on to `out` where they are kept.
  template <class T>
  void add(const T* x, const T* gradient, T* out, int64_t n, float scale, float reach) {
    for (int64_t j = 0; j < n; ++j) wide[j] = static_cast<float>(x[j]);
    for (int64_t j = 0; j < n; ++j) along[j] = static_cast<float>(gradient[j]);
    const float over_scale = inverse(scale), height = 1.0f / (reach * reach);
    const Floats counts = Floats{} + (scale > 0.0f ? 1.0f : 0.0f), zero = {};
    for (int64_t j = 0; j < n; j += kLanes) {
      const Floats v = load(wide + j), size = v < 0.0f ? -v : v;
      Floats cut = load(limit + j) * scale;
      cut = cut > FLT_MAX ? zero + FLT_MAX : cut;
      const Integers dropped = (size <= cut) & (cut != 0.0f), passed = ~dropped;
      std::memcpy(keep + j, &passed, sizeof passed);
      const Floats log = log_near_one(size * load(over + j) * over_scale);
      const Floats far = reach - (log < 0.0f ? -log : log);
      const Floats weight = (far < 0.0f ? zero : far) * height;
      store(loss + j, load(loss + j) + weight * load(along + j) * v);
      store(near + j, load(near + j) + weight);
      store(kept + j, load(kept + j) + (dropped ? zero : counts));
    }
    using Word = typename Bits<sizeof(T)>::Type;
    const Word* from = reinterpret_cast<const Word*>(gradient);
    Word* to = reinterpret_cast<Word*>(out);
    for (int64_t j = 0; j < n; ++j) to[j] = from[j] & static_cast<Word>(keep[j]);
  }
};

std::tuple<Tensor, Tensor> mask_backward(const Tensor& x, const Tensor& gradient,
                                         const Tensor& threshold, const Tensor& scale,
                                         double width) {
  const char* op = "wina::mask_backward";
  check_input(op, x, false);
  check_gradient(op, x, gradient);
  TORCH_CHECK(0.0 < width && width <= 0.5, op, ": width must be in (0, 0.5], got ", width);
  const int64_t K = x.size(-1), tokens = tokens_of(x);
  const Tensor limit = floats_of(op, "threshold", threshold, K);
  const Tensor factors = factors_of(op, x, scale);
  const float* cut = limit.const_data_ptr<float>();
  const float* factor = factors.const_data_ptr<float>();
  const float reach = static_cast<float>(width);
  const Tensor rows = x.contiguous(), slopes = gradient.contiguous();
  Tensor before = at::empty(x.sizes(), rows.options());
  Tensor sums = at::empty({3, K}, x.options().dtype(at::kFloat));
  float* to = sums.mutable_data_ptr<float>();
  for_type(rows, [&](auto zero) {
    using T = decltype(zero);
    const T* from = rows.const_data_ptr<T>();
    const T* slope = slopes.const_data_ptr<T>();
    T* passed = before.mutable_data_ptr<T>();
    // By columns, so that a sum does not depend on the number of threads.
    at::parallel_for(0, (K + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kColumns, n = std::min(kColumns, K - first);
        ColumnSums own;
        for (int64_t j = 0; j < n; ++j) own.limit[j] = cut[first + j];
        for (int64_t j = 0; j < n; ++j) own.over[j] = inverse(cut[first + j]);
        for (int64_t t = 0; t < tokens; ++t) {
          const int64_t at = t * K + first;
          own.add(from + at, slope + at, passed + at, n, factor[t], reach);
        }
        std::memcpy(to + first, own.loss, n * sizeof(float));
        std::memcpy(to + K + first, own.near, n * sizeof(float));
        std::memcpy(to + 2 * K + first, own.kept, n * sizeof(float));
      }
    });
  });
  return {before, sums};
}

}  // namespace
}  // namespace wina

TORCH_LIBRARY_IMPL(wina, CPU, m) {
  m.impl("count_scores", TORCH_FN(wina::count_scores));
  m.impl("kept_sums", TORCH_FN(wina::kept_sums));
  m.impl("mask_backward", TORCH_FN(wina::mask_backward));
}
