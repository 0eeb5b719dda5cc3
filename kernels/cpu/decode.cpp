// Native interpreter of decode steps: decode_step (kernels/program.py has the definition).
//
// One call runs a token through a whole decoder. Products are the library's own operators, called
// through torch's dispatcher (some 0.2 us each), so that this file knows nothing of their layouts;
// what lies between them (norms, rotary embedding, attention over a static cache) is here.
// Everything is summed in float32 and rounded once to the model's dtype.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/custom_class.h>

#include <array>
#include <chrono>

#include "common.h"

namespace wina {
namespace {

// The numbering of INSTRUCTIONS in kernels/program.py.
enum class Op : int64_t {
  embed, rms_norm, dense, sparse, sparse_integers, gate_up, gate_up_integers, gated, slice, attend,
  add, logits, mean_scale, topk_scale, group_of_three, masked
};

constexpr const char* kActivations[] = {"silu", "gelu", "gelu_tanh", "relu", "relu2"};
constexpr int64_t kSplit = 128;  // cached tokens of one unit of attention, at least
constexpr int64_t kThreadWork = 131072;  // multiply-adds that are worth another thread

// ------------------------------------------------------------------------------------ vectors

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

float square_sum(const float* v, int64_t n) {
  Floats s[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    for (int p = 0; p < 2; ++p) {
      const Floats w = load(v + i + p * kLanes);
      s[p] += w * w;
    }
  float all = sum(s[0] + s[1]);
  for (; i < n; ++i) all += v[i] * v[i];
  return all;
}

template <class T>
void widen(const T* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

// Scratch that lives as long as the thread.
template <int which>
float* scratch(int64_t n) {
  static thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < n) memory.resize(n);
  return memory.data();
}

// --------------------------------------------------------------------------------- operations

template <class T>
void rms_norm(const T* x, const T* weight, int64_t runs, int64_t n, float eps, float offset,
              T* out) {
  float* wide = scratch<0>(n);
  for (int64_t r = 0; r < runs; ++r, x += n, out += n) {
    widen(x, wide, n);
    const float scale = 1.0f / std::sqrt(square_sum(wide, n) / static_cast<float>(n) + eps);
    for (int64_t i = 0; i < n; ++i)
      out[i] = static_cast<T>(wide[i] * scale * (static_cast<float>(weight[i]) + offset));
  }
}

// to[i] = from[i] where it is kept, else 0; in blocks that the compiler turns into vectors.
template <class T>
void mask(const T* from, const float* threshold, float scale, int64_t n, T* to) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  constexpr int64_t block = 128;
  float wide[block];
  Bits bits[block];
  for (int64_t first = 0; first < n; first += block) {
    const int64_t count = std::min(block, n - first);
    widen(from + first, wide, count);
    std::memcpy(bits, from + first, count * sizeof(T));
    for (int64_t i = 0; i < count; ++i) {
      const bool keep = !(std::fabs(wide[i]) <= cutoff(threshold[first + i], scale));
      bits[i] &= static_cast<Bits>(-static_cast<int32_t>(keep));
    }
    std::memcpy(to + first, bits, count * sizeof(T));
  }
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

struct Attention {
  Tensor q, k, v, keys, values;
  OptionalTensor cos, sin;
  float scale, softcap;
  int64_t window, position;
};

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

// f(null pointer of the tensor's type)
template <class F>
void with_type(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case at::kFloat: return f(static_cast<float*>(nullptr));
    case at::kBFloat16: return f(static_cast<at::BFloat16*>(nullptr));
    case at::kHalf: return f(static_cast<at::Half*>(nullptr));
    default: TORCH_CHECK(false, "wina::decode_step: no kernel for ", x.scalar_type());
  }
}

// The library's own operators.
template <class F>
c10::TypedOperatorHandle<F> library(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

using Optional = const OptionalTensor&;
using DenseLinear = Tensor(const Tensor&, const Tensor&, Optional);
using SparseLinear = Tensor(const Tensor&, const Tensor&, const Tensor&, Optional, Optional,
                            Optional);
using SparseIntegers = Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t,
                              const Tensor&, Optional, Optional, Optional);
using GateUp = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                      c10::string_view, Optional, Optional, Optional, Optional);
using GateUpIntegers = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                              const Tensor&, int64_t, int64_t, const Tensor&, const Tensor&,
                              c10::string_view, Optional, Optional, Optional, Optional);
using Group = std::vector<Tensor>(const Tensor&, at::TensorList, at::TensorList,
                                  const c10::List<OptionalTensor>&,
                                  const c10::List<OptionalTensor>&);
using MeanScale = Tensor(const Tensor&);
using TopkScale = Tensor(const Tensor&, const Tensor&, int64_t);

// -------------------------------------------------------------------------------- the machine

class Machine {
 public:
  Machine(int64_t token, int64_t position, const Tensor& code, const Tensor& numbers,
          at::TensorList constants, at::TensorList caches)
      : token_(token), position_(position), at_(code.const_data_ptr<int64_t>()),
        end_(at_ + code.numel()), numbers_(numbers.const_data_ptr<double>()),
        number_count_(numbers.numel()), constants_(constants), caches_(caches) {}

  // Adds the seconds of each instruction to `times`, unless that is null.
  Tensor run(double* times, int64_t most_times) {
    using Clock = std::chrono::steady_clock;
    int64_t out = 0;
    for (int64_t done = 0; at_ < end_; ++done) {
      const auto start = times ? Clock::now() : Clock::time_point();
      const auto op = static_cast<Op>(next());
      out = next();
      TORCH_CHECK(0 <= out && out < kRegisters, "wina::decode_step: no register ", out);
      Tensor result = run(op, out);
      registers_[out] = std::move(result);
      if (!times) continue;
      TORCH_CHECK(done < most_times, "wina::decode_step: times has ", most_times, " entries only");
      times[done] += std::chrono::duration<double>(Clock::now() - start).count();
    }
    return registers_[out];
  }

 private:
  static constexpr int64_t kRegisters = 64;

  int64_t next() {
    TORCH_CHECK(at_ < end_, "wina::decode_step: the code ends inside of an instruction");
    return *at_++;
  }
  const Tensor& reg() {
    const int64_t i = next();
    TORCH_CHECK(0 <= i && i < kRegisters && registers_[i].defined(),
                "wina::decode_step: register ", i, " is empty");
    return registers_[i];
  }
  OptionalTensor optional_reg() { return missing() ? OptionalTensor() : OptionalTensor(reg()); }
  const Tensor& constant() {
    const int64_t i = next();
    TORCH_CHECK(0 <= i && i < static_cast<int64_t>(constants_.size()),
                "wina::decode_step: no constant ", i);
    return constants_[i];
  }
  OptionalTensor optional_constant() {
    return missing() ? OptionalTensor() : OptionalTensor(constant());
  }
  const Tensor& cache() {
    const int64_t i = next();
    TORCH_CHECK(0 <= i && i < static_cast<int64_t>(caches_.size()), "wina::decode_step: no cache ",
                i);
    return caches_[i];
  }
  double number() {
    const int64_t i = next();
    TORCH_CHECK(0 <= i && i < number_count_, "wina::decode_step: no number ", i);
    return numbers_[i];
  }
  // Whether the operand is left out; moves past it then.
  bool missing() {
    const bool left_out = at_ < end_ && *at_ < 0;
    at_ += left_out;
    return left_out;
  }
  int64_t activation() {
    const int64_t i = next();
    TORCH_CHECK(0 <= i && i < 5, "wina::decode_step: no activation ", i);
    return i;
  }

  Tensor run(Op op, int64_t out) {
    switch (op) {
      case Op::embed: return embed();
      case Op::rms_norm: return norm();
      case Op::dense: return dense();
      case Op::sparse: {
        static const auto f = library<SparseLinear>("wina::sparse_linear");
        const Tensor &x = reg(), &weight = constant(), &threshold = constant();
        const OptionalTensor bias = optional_constant(), scale = optional_reg();
        return f.call(x, weight, threshold, bias, scale, optional_reg());
      }
      case Op::sparse_integers: {
        static const auto f = library<SparseIntegers>("wina::sparse_linear_quantized");
        const Tensor &x = reg(), &packed = constant(), &scales = constant();
        const int64_t columns = next(), bits = next();
        const Tensor& threshold = constant();
        const OptionalTensor bias = optional_constant(), scale = optional_reg();
        return f.call(x, packed, scales, columns, bits, threshold, bias, scale, optional_reg());
      }
      case Op::gate_up: {
        static const auto f = library<GateUp>("wina::sparse_gate_up");
        const Tensor &x = reg(), &gate = constant(), &up = constant();
        const Tensor &gate_threshold = constant(), &up_threshold = constant();
        const char* name = kActivations[activation()];
        const OptionalTensor gate_bias = optional_constant(), up_bias = optional_constant();
        const OptionalTensor gate_scale = optional_reg();
        return f.call(x, gate, up, gate_threshold, up_threshold, name, gate_bias, up_bias,
                      gate_scale, optional_reg());
      }
      case Op::gate_up_integers: {
        static const auto f = library<GateUpIntegers>("wina::sparse_gate_up_quantized");
        const Tensor &x = reg(), &gate = constant(), &gate_scales = constant();
        const Tensor &up = constant(), &up_scales = constant();
        const int64_t columns = next(), bits = next();
        const Tensor &gate_threshold = constant(), &up_threshold = constant();
        const char* name = kActivations[activation()];
        const OptionalTensor gate_bias = optional_constant(), up_bias = optional_constant();
        const OptionalTensor gate_scale = optional_reg();
        return f.call(x, gate, gate_scales, up, up_scales, columns, bits, gate_threshold,
                      up_threshold, name, gate_bias, up_bias, gate_scale, optional_reg());
      }
      case Op::gated: return gated();
      case Op::slice: {
        const Tensor& x = reg();
        const int64_t start = next();
        return x.narrow(0, start, next());
      }
      case Op::attend: return attention();
      case Op::add: return add();
      case Op::logits: return logits();
      case Op::mean_scale: {
        static const auto f = library<MeanScale>("wina::mean_scale");
        return f.call(reg());
      }
      case Op::topk_scale: {
        static const auto f = library<TopkScale>("wina::topk_scale");
        const Tensor &x = reg(), &threshold = constant();
        return f.call(x, threshold, next());
      }
      case Op::group_of_three: return group_of_three(out);
      case Op::masked: return masked();
    }
    TORCH_CHECK(false, "wina::decode_step: no instruction ", static_cast<int64_t>(op));
  }

  Tensor group_of_three(int64_t out) {
    static const auto f = library<Group>("wina::sparse_group");
    TORCH_CHECK(out + 2 < kRegisters, "wina::decode_step: no register ", out + 2);
    const Tensor& x = reg();
    std::array<Tensor, 3> weights, thresholds;
    c10::List<OptionalTensor> biases, scales;
    for (int i = 0; i < 3; ++i) {
      weights[i] = constant();
      thresholds[i] = constant();
      biases.push_back(optional_constant());
      scales.push_back(optional_reg());
    }
    std::vector<Tensor> ys = f.call(x, weights, thresholds, biases, scales);
    registers_[out + 1] = std::move(ys[1]);
    registers_[out + 2] = std::move(ys[2]);
    return std::move(ys[0]);
  }

  Tensor masked() {
    const Tensor &x = reg(), &threshold = constant();
    const OptionalTensor scale = optional_reg();
    TORCH_CHECK(threshold.numel() == x.numel() && threshold.scalar_type() == at::kFloat &&
                    threshold.is_contiguous() && x.is_contiguous() &&
                    (!scale.has_value() || (scale->numel() == 1 && scale->scalar_type() == at::kFloat)),
                "wina::decode_step: masked of ", x.sizes(), " by float32 thresholds ",
                threshold.sizes(), " ", threshold.scalar_type());
    Tensor out = at::empty(x.sizes(), x.options());
    const float* limit = threshold.const_data_ptr<float>();
    const float s = scale.has_value() ? *scale->const_data_ptr<float>() : 1.0f;
    with_type(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      mask(x.const_data_ptr<T>(), limit, s, out.numel(), out.mutable_data_ptr<T>());
    });
    return out;
  }

  Tensor embed() {
    const Tensor& table = constant();
    const float scale = static_cast<float>(number());
    TORCH_CHECK(0 <= token_ && token_ < table.size(0) && table.is_contiguous(),
                "wina::decode_step: token ", token_, " is outside a vocabulary of ", table.size(0));
    Tensor out = at::empty({table.size(1)}, table.options());
    with_type(table, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* row = table.const_data_ptr<T>() + token_ * table.size(1);
      T* to = out.mutable_data_ptr<T>();
      for (int64_t i = 0; i < out.numel(); ++i)
        to[i] = static_cast<T>(static_cast<float>(row[i]) * scale);
    });
    return out;
  }

  Tensor norm() {
    const Tensor &x = reg(), &weight = constant();
    const auto eps = static_cast<float>(number()), offset = static_cast<float>(number());
    const int64_t n = weight.numel();
    TORCH_CHECK(n > 0 && x.numel() % n == 0 && x.scalar_type() == weight.scalar_type() &&
                    x.is_contiguous() && weight.is_contiguous(),
                "wina::decode_step: rms_norm of ", x.sizes(), " ", x.scalar_type(), " by ",
                weight.sizes(), " ", weight.scalar_type());
    Tensor out = at::empty(x.sizes(), x.options());
    with_type(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      rms_norm(x.const_data_ptr<T>(), weight.const_data_ptr<T>(), x.numel() / n, n, eps, offset,
               out.mutable_data_ptr<T>());
    });
    return out;
  }

  Tensor dense() {
    const Tensor &x = reg(), &weight = constant();
    const OptionalTensor bias = optional_constant();
    static const auto f = library<DenseLinear>("wina::dense_linear_rows");
    Tensor y = f.call(x, weight, bias);
    const OptionalTensor residual = optional_reg();
    return residual.has_value() ? y.add_(*residual) : y;
  }

  Tensor gated() {
    const Tensor gate = reg(), up = reg();
    const auto act = static_cast<Activation>(activation());
    TORCH_CHECK(gate.sizes().equals(up.sizes()) && gate.scalar_type() == up.scalar_type() &&
                    gate.is_contiguous() && up.is_contiguous(),
                "wina::decode_step: gate ", gate.sizes(), " and up ", up.sizes(), " differ");
    Tensor out = at::empty(gate.sizes(), gate.options());
    with_type(gate, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T *g = gate.const_data_ptr<T>(), *u = up.const_data_ptr<T>();
      T* to = out.mutable_data_ptr<T>();
      const int64_t n = out.numel();
      float* wide = scratch<0>(n);
      widen(g, wide, n);
      activate(act, wide, n);
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(wide[i] * static_cast<float>(u[i]));
    });
    return out;
  }

  Tensor attention() {
    Attention a{reg(), reg(), reg(), cache(), cache(), optional_constant(), optional_constant(),
                static_cast<float>(number()), static_cast<float>(number()), next(), position_};
    const auto dtype = a.q.scalar_type();
    TORCH_CHECK(a.keys.dim() == 3 && a.values.sizes().equals(a.keys.sizes()) &&
                    a.keys.is_contiguous() && a.values.is_contiguous() &&
                    a.keys.scalar_type() == dtype && a.values.scalar_type() == dtype &&
                    a.k.scalar_type() == dtype && a.v.scalar_type() == dtype,
                "wina::decode_step: caches must be contiguous [kv heads, length, D] ", dtype,
                ", got ", a.keys.sizes(), " ", a.keys.scalar_type());
    const int64_t kv = a.keys.size(0) * a.keys.size(2);
    TORCH_CHECK(0 <= position_ && position_ < a.keys.size(1), "wina::decode_step: position ",
                position_, " is outside caches of ", a.keys.size(1), " tokens");
    TORCH_CHECK(kv > 0 && a.k.numel() == kv && a.v.numel() == kv && a.q.numel() % kv == 0 &&
                    a.q.is_contiguous() && a.k.is_contiguous() && a.v.is_contiguous(),
                "wina::decode_step: q ", a.q.sizes(), ", k ", a.k.sizes(), " and v ", a.v.sizes(),
                " do not fit caches ", a.keys.sizes());
    for (const auto& table : {a.cos, a.sin})
      TORCH_CHECK(!table.has_value() ||
                      (table->dim() == 2 && table->scalar_type() == at::kFloat &&
                       table->is_contiguous() && table->size(0) > position_ &&
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

  Tensor add() {
    const Tensor &x = reg(), &y = reg();
    const float factor = static_cast<float>(number());
    TORCH_CHECK(x.sizes().equals(y.sizes()) && x.scalar_type() == y.scalar_type() &&
                    x.is_contiguous() && y.is_contiguous(),
                "wina::decode_step: add of ", x.sizes(), " and ", y.sizes());
    Tensor out = at::empty(x.sizes(), x.options());
    with_type(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T *a = x.const_data_ptr<T>(), *b = y.const_data_ptr<T>();
      T* to = out.mutable_data_ptr<T>();
      for (int64_t i = 0; i < out.numel(); ++i)
        to[i] = static_cast<T>(static_cast<float>(a[i]) + factor * static_cast<float>(b[i]));
    });
    return out;
  }

  Tensor logits() {
    const Tensor& x = reg();
    const auto factor = static_cast<float>(number()), softcap = static_cast<float>(number());
    Tensor out = at::empty(x.sizes(), x.options().dtype(at::kFloat));
    float* to = out.mutable_data_ptr<float>();
    with_type(x, [&](auto* type) {
      const auto* from = x.const_data_ptr<std::remove_pointer_t<decltype(type)>>();
      for (int64_t i = 0; i < out.numel(); ++i) to[i] = static_cast<float>(from[i]) * factor;
    });
    if (softcap != 0.0f)
      for (int64_t i = 0; i < out.numel(); ++i) to[i] = softcap * std::tanh(to[i] / softcap);
    return out;
  }

  int64_t token_, position_;
  const int64_t *at_, *end_;
  const double* numbers_;
  int64_t number_count_;
  at::TensorList constants_, caches_;
  Tensor registers_[kRegisters];
};

Tensor decode_step(int64_t token, int64_t position, const Tensor& code, const Tensor& numbers,
                   at::TensorList constants, at::TensorList caches, int64_t outputs,
                   const OptionalTensor& times) {
  TORCH_CHECK(code.scalar_type() == at::kLong && code.is_contiguous() && code.numel() > 0 &&
                  numbers.scalar_type() == at::kDouble && numbers.is_contiguous(),
              "wina::decode_step: code must be int64 and numbers float64, contiguous, got ",
              code.scalar_type(), " and ", numbers.scalar_type());
  const at::NoGradGuard no_grad;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  double* clock = nullptr;
  int64_t most_times = 0;
  if (times.has_value()) {
    TORCH_CHECK(times->scalar_type() == at::kDouble && times->is_contiguous(),
                "wina::decode_step: times must be float64, contiguous, got ",
                times->scalar_type());
    clock = times->mutable_data_ptr<double>();
    most_times = times->numel();
  }
  const Tensor out =
      Machine(token, position, code, numbers, constants, caches).run(clock, most_times);
  TORCH_CHECK(out.numel() == outputs, "wina::decode_step: ", outputs, " outputs expected, got ",
              out.numel());
  return out;
}

// A program that is run again and again. Python hands its hundreds of tensors over once, and
// takes none of them out of a list again for each token.
struct BoundStep : torch::CustomClassHolder {
  BoundStep(Tensor code, Tensor numbers, std::vector<Tensor> constants, std::vector<Tensor> caches,
            int64_t outputs)
      : code(std::move(code)), numbers(std::move(numbers)), constants(std::move(constants)),
        caches(std::move(caches)), outputs(outputs) {}

  Tensor run(int64_t token, int64_t position, const OptionalTensor& times) {
    return decode_step(token, position, code, numbers, constants, caches, outputs, times);
  }

  Tensor code, numbers;
  std::vector<Tensor> constants, caches;
  int64_t outputs;
};

}  // namespace
}  // namespace wina

TORCH_LIBRARY_IMPL(wina, CPU, m) { m.impl("decode_step", TORCH_FN(wina::decode_step)); }

TORCH_LIBRARY_FRAGMENT(wina, m) {
  m.class_<wina::BoundStep>("BoundStep")
      .def(torch::init<at::Tensor, at::Tensor, std::vector<at::Tensor>,
                       std::vector<at::Tensor>, int64_t>())
      .def("run", &wina::BoundStep::run);
}
