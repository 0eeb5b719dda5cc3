// Native interpreter of decode steps: decode_step (kernels/program.py has the definition).
//
// One call runs a token through a whole decoder. Products are the library's own operators, called
// through torch's dispatcher (some 0.2 us each), so that this file knows nothing of their layouts;
// what lies between them (norms, residual streams, logits) is here, attention in attention.cpp.
// Everything is summed in float32 and rounded once to the model's dtype.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <chrono>

#include "decode.h"

namespace wina {
namespace {

// The numbering of INSTRUCTIONS in kernels/program.py.
enum class Op : int64_t {
  embed, rms_norm, dense, sparse, sparse_integers, gate_up, gate_up_integers, gated, slice, attend,
  add, logits, mean_scale, topk_scale, group_of_three,
  dense_integers, probe_scale, repeat, tracked_scale
};

constexpr const char* kActivations[] = {"silu", "gelu", "gelu_tanh", "relu", "relu2"};

// --------------------------------------------------------------------------------- operations

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

// The library's own operators.
template <class F>
c10::TypedOperatorHandle<F> library(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

using Optional = const OptionalTensor&;
using DenseLinear = Tensor(const Tensor&, const Tensor&, Optional, Optional, Optional, Optional);
using DenseIntegers = Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t,
                             Optional);
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
using ProbeScale = Tensor(const Tensor&, const Tensor&, double);
using TrackedScale = Tensor(const Tensor&, const Tensor&, const Tensor&, double, double, Optional,
                            Optional);

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
      case Op::dense: {
        static const auto f = library<DenseLinear>("wina::dense_linear_rows");
        const Tensor &x = reg(), &weight = constant();
        const OptionalTensor bias = optional_constant(), threshold = optional_constant();
        const OptionalTensor scale = optional_reg();
        return f.call(x, weight, bias, threshold, scale, optional_reg());
      }
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
      case Op::dense_integers: {
        static const auto f = library<DenseIntegers>("wina::dense_linear_rows_quantized");
        const Tensor &x = reg(), &packed = constant(), &scales = constant();
        const int64_t columns = next(), bits = next();
        return f.call(x, packed, scales, columns, bits, optional_constant());
      }
      case Op::probe_scale: {
        static const auto f = library<ProbeScale>("wina::probe_scale");
        const Tensor &x = reg(), &probe = constant();
        return f.call(x, probe, number());
      }
      case Op::repeat: {
        const Tensor& x = reg();
        const int64_t times = next(), bytes = static_cast<int64_t>(x.nbytes());
        TORCH_CHECK(x.dim() == 1 && x.is_contiguous() && times > 0,
                    "wina::decode_step: repeats a vector once or more");
        Tensor out = at::empty({times * x.numel()}, x.options());
        char* to = static_cast<char*>(out.mutable_data_ptr());
        for (int64_t i = 0; i < times; ++i) std::memcpy(to + i * bytes, x.const_data_ptr(), bytes);
        return out;
      }
      case Op::tracked_scale: {
        static const auto f = library<TrackedScale>("wina::tracked_scale");
        const Tensor &x = reg(), &threshold = constant(), &state = cache();
        const double sparsity = number(), rate = number();
        return f.call(x, threshold, state, sparsity, rate, optional_reg(), OptionalTensor());
      }
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
    return attend({reg(), reg(), reg(), cache(), cache(), optional_constant(), optional_constant(),
                   static_cast<float>(number()), static_cast<float>(number()), next(), position_});
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

}  // namespace

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

}  // namespace wina

TORCH_LIBRARY_IMPL(wina, CPU, m) { m.impl("decode_step", TORCH_FN(wina::decode_step)); }
