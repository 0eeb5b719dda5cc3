// What the parts of the decode step share. One token runs through a whole decoder: decode.cpp has the
// interpreter, attention.cpp a token's attention, bound_step.cpp the class that Python holds.

#pragma once

#include "common.h"

namespace wina {

// Operands of a token's attention; kernels/program.py says what they are.
struct Attention {
  Tensor q, k, v, keys, values;
  OptionalTensor cos, sin;
  float scale, softcap;
  int64_t window, position;
};

// The attention's result [heads * D]; writes the token's key and value to the caches.
Tensor attend(const Attention& a);

// See kernels/program.py.
Tensor decode_step(int64_t token, int64_t position, const Tensor& code, const Tensor& numbers,
                   at::TensorList constants, at::TensorList caches, int64_t outputs,
                   const OptionalTensor& times);

namespace {

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

}  // namespace
}  // namespace wina
