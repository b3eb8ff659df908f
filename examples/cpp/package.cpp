// package.cpp: an MLAAttention layer that AOTInductor compiled into a package, run from C++.
//
//   package attention.pt2
//
// The package holds code for the shapes and strides it was exported with. Sizes that were made
// dynamic may differ; inputs that were contiguous have to be (AOTI_RUNTIME_CHECK_INPUTS=1 checks).
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include "attention_demo.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s attention.pt2\n", argv[0]);
    return 2;
  }
  const at::NoGradGuard no_grad;
  torch::inductor::AOTIModelPackageLoader layer(argv[1]);
  demo::run([&](const std::vector<at::Tensor>& inputs) { return layer.run(inputs).front(); });
}
