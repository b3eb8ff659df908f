// decode.cpp: greedy decoding without Python. The decoder step that export.py made of the tiny
// model (a torch_flash_mla.DecoderStep in an AOTInductor package) writes to pages that this program
// owns.
//
//   decode tiny_model.pt2 "def " 40
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch_flash_mla/ops.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "paging.h"

namespace {

constexpr int64_t kLayers = 4, kLatent = 512, kRope = 64;  // examples/tiny_model/config.json
constexpr int64_t kBlockSize = 64, kMaxBlocks = 32;        // of the 2048 tokens it was trained on

// Ids 0 to 255 are bytes, 256 to 260 runs of spaces, 261 ends a text (tiny_model/tokenizer.py).
std::string text_of(int64_t token) {
  static constexpr int kRuns[] = {2, 4, 8, 12, 16};
  if (token < 256) return std::string(1, static_cast<char>(token));
  if (token < 261) return std::string(kRuns[token - 256], ' ');
  return "<|endoftext|>";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4 || std::string(argv[2]).empty()) {
    std::fprintf(stderr, "usage: %s tiny_model.pt2 PROMPT NEW_TOKENS\n", argv[0]);
    return 2;
  }
  std::vector<int64_t> tokens;
  for (const char* c = argv[2]; *c != '\0'; ++c) tokens.push_back(static_cast<unsigned char>(*c));
  const int new_tokens = std::atoi(argv[3]);

  const at::NoGradGuard no_grad;
  torch::inductor::AOTIModelPackageLoader step(argv[1]);
  const int64_t row = torch_flash_mla::row_bytes("q8_kv", kLatent, kRope);
  std::vector<at::Tensor> kv_caches;
  for (int64_t layer = 0; layer < kLayers; ++layer) {
    kv_caches.push_back(at::empty({kMaxBlocks, kBlockSize, row}, at::kByte));
  }
  Paging paging(1, kMaxBlocks, kMaxBlocks, kBlockSize);

  at::Tensor input = at::tensor(tokens).unsqueeze(0);  // [1, Sq]: the prompt, then single tokens
  std::printf("%s", argv[2]);
  for (int i = 0; i < new_tokens; ++i) {
    const at::Tensor slots = paging.reserve(input.size(1));
    std::vector<at::Tensor> inputs = {input};
    inputs.insert(inputs.end(), kv_caches.begin(), kv_caches.end());
    inputs.insert(inputs.end(), {paging.block_table(), paging.cache_seqlens(), slots});
    const at::Tensor logits = step.run(inputs).front();  // [1, 1, vocabulary]
    input = logits.argmax(-1);                           // [1, 1]
    tokens.push_back(input.item<int64_t>());
    std::printf("%s", text_of(tokens.back()).c_str());
    std::fflush(stdout);
  }
  std::printf("\ntokens:");
  for (const int64_t token : tokens) std::printf(" %lld", static_cast<long long>(token));
  std::printf("\n");
}
