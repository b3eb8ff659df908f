// script_module.cpp: an MLAAttention layer that torch.jit.script saved, run from C++.
//
//   script_module attention.pt
#include <torch/csrc/jit/serialization/import.h>

#include "attention_demo.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s attention.pt\n", argv[0]);
    return 2;
  }
  const at::NoGradGuard no_grad;
  torch::jit::Module layer = torch::jit::load(argv[1]);
  demo::run([&](const std::vector<at::Tensor>& inputs) {
    return layer.forward({inputs.begin(), inputs.end()}).toTensor();
  });
}
