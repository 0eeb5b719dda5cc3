// Attention of one token over a static cache, for the decode step. Sums are float32 and rounded once.

#include "decode.h"

namespace wina {
namespace {

constexpr int64_t kSplit = 128;  // cached tokens of one unit of attention, at least
constexpr int64_t kThreadWork = 131072;  // multiply-adds that are worth another thread

// e^v for v <= 0, relative error below 2e-7; below -87 a number near 0. A NaN stays.
inline Floats exp_negative(Floats v) {
  typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));
  const Floats lowest = Floats{} - 87.0f;
  v = v < lowest ? lowest : v;
  const Floats turns = v * 1.44269504f - 0.5f;
  const Integers n = __builtin_convertvector(turns, Integers);  // towards 0: round(v / ln 2)
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = (v - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Integers bits = (n + 127) << 23;
  Floats power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// Turns the two halves of the first R elements of each head; out is float32.
template <class T>
void rotate(const T* x, int64_t heads, int64_t D, const float* cos, const float* sin, int64_t R,
            float* out) {
  for (int64_t h = 0; h < heads; ++h, x += D, out += D) {
    const int64_t half = R / 2;
    for (int64_t i = 0; i < half; ++i) {
      const float a = static_cast<float>(x[i]), b = static_cast<float>(x[i + half]);
      out[i] = a * cos[i] - b * sin[i];
      out[i + half] = b * cos[i + half] + a * sin[i + half];
    }
    for (int64_t i = R; i < D; ++i) out[i] = static_cast<float>(x[i]);
  }
}

// scores[t] = q · rows[t] for kLanes rows of D floats.
inline void dots(const float* q, const float* rows, int64_t D, float* scores) {
  Floats s[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) {
    const Floats w = load(q + i);
#pragma GCC unroll 8
    for (int t = 0; t < kLanes; ++t) s[t] += w * load(rows + t * D + i);
  }
#pragma GCC unroll 8
  for (int t = 0; t < kLanes; ++t) scores[t] = sum(s[t]);
  for (; i < D; ++i)
    for (int t = 0; t < kLanes; ++t) scores[t] += q[i] * rows[t * D + i];
}

// acc += sum over kLanes rows of p[t] * rows[t].
inline void add_rows(const float* p, const float* rows, int64_t D, float* acc) {
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) {
    Floats a = load(acc + i);
#pragma GCC unroll 8
    for (int t = 0; t < kLanes; ++t) a += p[t] * load(rows + t * D + i);
    store(acc + i, a);
  }
  for (; i < D; ++i)
    for (int t = 0; t < kLanes; ++t) acc[i] += p[t] * rows[t * D + i];
}

// kLanes rows from row `first` on as floats; past `last` the row before it again.
template <class T>
void widen_rows(const T* rows, int64_t first, int64_t last, int64_t D, float* to) {
  for (int64_t t = 0; t < kLanes; ++t)
    widen(rows + std::min(first + t, last - 1) * D, to + t * D, D);
}

// A part of one token's attention: the heads of a group over the cached tokens [first, last).
// Leaves for each head the largest score, the sum of the weights relative to it, and the weighted
// sum of the values: part[head][2 + D].
template <class T>
void attend_part(const float* q, int64_t heads, const T* keys, const T* values, int64_t first,
                 int64_t last, int64_t D, float softcap, float* part) {
  const int64_t n = last - first, padded = (n + kLanes - 1) / kLanes * kLanes;
  const int64_t stride = D + 2;
  float* rows = scratch<1>(kLanes * D + heads * padded);
  float* p = rows + kLanes * D;
  for (int64_t t = 0; t < n; t += kLanes) {
    widen_rows(keys, first + t, last, D, rows);
    for (int64_t h = 0; h < heads; ++h) dots(q + h * D, rows, D, p + h * padded + t);
  }
  for (int64_t h = 0; h < heads; ++h) {
    float *score = p + h * padded, *out = part + h * stride;
    if (softcap != 0.0f)
      for (int64_t t = 0; t < n; ++t) score[t] = softcap * std::tanh(score[t] / softcap);
    std::fill(score + n, score + padded, score[n - 1]);
    Floats highest = load(score);
    for (int64_t t = kLanes; t < padded; t += kLanes) {
      const Floats v = load(score + t);
      highest = v > highest ? v : highest;
    }
    float most = highest[0];
    for (int t = 1; t < kLanes; ++t) most = std::max(most, highest[t]);
    for (int64_t t = 0; t < padded; t += kLanes)
      store(score + t, exp_negative(load(score + t) - most));
    std::fill(score + n, score + padded, 0.0f);
    Floats all{};
    for (int64_t t = 0; t < padded; t += kLanes) all += load(score + t);
    out[0] = most;
    out[1] = sum(all);
    std::fill_n(out + 2, D, 0.0f);
  }
  for (int64_t t = 0; t < n; t += kLanes) {
    widen_rows(values, first + t, last, D, rows);
    for (int64_t h = 0; h < heads; ++h)
      add_rows(p + h * padded + t, rows, D, part + h * stride + 2);
  }
}

template <class T>
void attend(const Attention& a, Tensor& y) {
  const int64_t kv_heads = a.keys.size(0), length = a.keys.size(1), D = a.keys.size(2);
  const int64_t heads = a.q.numel() / D, group = heads / kv_heads;
  const int64_t R = a.cos.has_value() ? a.cos->size(1) : 0;
  const float* cos = R ? a.cos->const_data_ptr<float>() + a.position * R : nullptr;
  const float* sin = R ? a.sin->const_data_ptr<float>() + a.position * R : nullptr;
  float* q = scratch<2>((heads + kv_heads) * D);
  float* k = q + heads * D;
  rotate(a.q.const_data_ptr<T>(), heads, D, cos, sin, R, q);
  rotate(a.k.const_data_ptr<T>(), kv_heads, D, cos, sin, R, k);
  for (int64_t i = 0; i < heads * D; ++i) q[i] *= a.scale;
  T *keys = a.keys.data_ptr<T>(), *values = a.values.data_ptr<T>();
  const T* v = a.v.const_data_ptr<T>();
  for (int64_t h = 0; h < kv_heads; ++h)
    for (int64_t i = 0; i < D; ++i) {
      const int64_t at = (h * length + a.position) * D + i;
      keys[at] = static_cast<T>(k[h * D + i]);
      values[at] = v[h * D + i];
    }

  const int64_t first = a.window ? std::max<int64_t>(0, a.position + 1 - a.window) : 0;
  const int64_t seen = a.position + 1 - first;
  const int64_t splits = std::max<int64_t>(1, seen / kSplit), units = kv_heads * splits;
  const int64_t stride = D + 2;
  float* parts = scratch<3>(units * group * stride);  // [split][head][2 + D]
  const int64_t work = 2 * D * group * seen / splits;
  const int64_t grain = std::max<int64_t>(1, kThreadWork / work);
  at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t h = u / splits, s = u % splits, at = h * length * D;
      attend_part(q + h * group * D, group, keys + at, values + at, first + seen * s / splits,
                  first + seen * (s + 1) / splits, D, a.softcap,
                  parts + (s * heads + h * group) * stride);
    }
  });

  T* out = y.mutable_data_ptr<T>();
  for (int64_t h = 0; h < heads; ++h) {
    float* part = parts + h * stride;
    const int64_t next = heads * stride;
    float most = part[0];
    for (int64_t s = 1; s < splits; ++s) most = std::max(most, part[s * next]);
    float all = 0.0f;
    for (int64_t s = 0; s < splits; ++s) {
      const float c = std::exp(part[s * next] - most);
      all += c * part[s * next + 1];
      part[s * next] = c;
    }
    float* value = part + 2;
    for (int64_t i = 0; i < D; ++i) value[i] *= part[0];
    for (int64_t s = 1; s < splits; ++s)
      for (int64_t i = 0; i < D; ++i) value[i] += part[s * next] * value[s * next + i];
    const float whole = 1.0f / all;
    for (int64_t i = 0; i < D; ++i) out[h * D + i] = static_cast<T>(value[i] * whole);
  }
}

}  // namespace

Tensor attend(const Attention& a) {
  const auto dtype = a.q.scalar_type();
  TORCH_CHECK(a.keys.dim() == 3 && a.values.sizes().equals(a.keys.sizes()) &&
                  a.keys.is_contiguous() && a.values.is_contiguous() &&
                  a.keys.scalar_type() == dtype && a.values.scalar_type() == dtype &&
                  a.k.scalar_type() == dtype && a.v.scalar_type() == dtype,
              "wina::decode_step: caches must be contiguous [kv heads, length, D] ", dtype,
              ", got ", a.keys.sizes(), " ", a.keys.scalar_type());
  const int64_t kv = a.keys.size(0) * a.keys.size(2);
  TORCH_CHECK(0 <= a.position && a.position < a.keys.size(1), "wina::decode_step: position ",
              a.position, " is outside caches of ", a.keys.size(1), " tokens");
  TORCH_CHECK(kv > 0 && a.k.numel() == kv && a.v.numel() == kv && a.q.numel() % kv == 0 &&
                  a.q.is_contiguous() && a.k.is_contiguous() && a.v.is_contiguous(),
              "wina::decode_step: q ", a.q.sizes(), ", k ", a.k.sizes(), " and v ", a.v.sizes(),
              " do not fit caches ", a.keys.sizes());
  for (const auto& table : {a.cos, a.sin})
    TORCH_CHECK(!table.has_value() ||
                    (table->dim() == 2 && table->scalar_type() == at::kFloat &&
                     table->is_contiguous() && table->size(0) > a.position &&
                     table->size(1) <= a.keys.size(2) && table->size(1) % 2 == 0),
                "wina::decode_step: rotary tables must be contiguous [length, R] float32 with R ",
                "even and at most ", a.keys.size(2));
  TORCH_CHECK(a.cos.has_value() == a.sin.has_value() &&
                  (!a.cos.has_value() || a.cos->sizes().equals(a.sin->sizes())),
              "wina::decode_step: cos and sin must have one shape");
  Tensor y = at::empty(a.q.sizes(), a.q.options());
  with_type(y, [&](auto* type) { attend<std::remove_pointer_t<decltype(type)>>(a, y); });
  return y;
}

}  // namespace wina
