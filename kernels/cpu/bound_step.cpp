// The class that holds a decode step's program for Python. A file of its own: its header is large.

#include <torch/custom_class.h>

#include "decode.h"

namespace wina {
namespace {

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

TORCH_LIBRARY_FRAGMENT(wina, m) {
  m.class_<wina::BoundStep>("BoundStep")
      .def(torch::init<at::Tensor, at::Tensor, std::vector<at::Tensor>,
                       std::vector<at::Tensor>, int64_t>())
      .def("run", &wina::BoundStep::run);
}
