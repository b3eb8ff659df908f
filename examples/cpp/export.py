"""Writes what the C++ programs of this folder load: a scripted layer, the same layer as an
AOTInductor package, and the tiny model's decoder step as a package.

    python examples/cpp/export.py build/examples
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram
from transformers import AutoModelForCausalLM

from torch_flash_mla import DecoderStep, MLAAttention, PagedLatentCache, patch

TINY_MODEL = Path(__file__).resolve().parents[1] / "tiny_model"
KV_CACHE_DTYPE = "q8_kv"
HIDDEN, LATENT, ROPE, BLOCK_SIZE = 64, 64, 32, 16  # as in attention_demo.h


def attention_layer() -> MLAAttention:
    """A small layer with reproducible weights."""
    torch.manual_seed(0)
    layer = MLAAttention(
        HIDDEN,
        4,
        kv_lora_rank=LATENT,
        qk_rope_head_dim=ROPE,
        qk_nope_head_dim=32,
        v_head_dim=48,
        q_lora_rank=48,
        kv_cache_dtype=KV_CACHE_DTYPE,
    )
    return layer.eval().requires_grad_(False)


def attention_inputs(batch: int = 3, new_tokens: int = 5) -> tuple[torch.Tensor, ...]:
    """The seven tensors of ``MLAAttention.forward``, for tracing."""
    cache = PagedLatentCache(
        1,
        LATENT,
        ROPE,
        kv_cache_dtype=KV_CACHE_DTYPE,
        block_size=BLOCK_SIZE,
        max_batch=batch,
        max_cache_len=2 * BLOCK_SIZE,
    )
    slots = cache.reserve(batch, new_tokens)
    angle = torch.randn(1, new_tokens, ROPE // 2)
    return (
        torch.randn(batch, new_tokens, HIDDEN),
        angle.cos(),
        angle.sin(),
        cache.kv_cache(0),
        cache.block_table,
        cache.cache_seqlens,
        slots,
    )


def export_attention() -> ExportedProgram:
    """The layer with any number of sequences, new tokens and blocks."""
    batch, new_tokens = Dim("batch", min=1), Dim("new_tokens", min=1)
    num_blocks, max_blocks = Dim("num_blocks", min=1), Dim("max_blocks", min=1)
    shapes = (
        {0: batch, 1: new_tokens},
        {1: new_tokens},
        {1: new_tokens},
        {0: num_blocks},
        {0: batch, 1: max_blocks},
        {0: batch},
        {0: batch, 1: new_tokens},
    )
    return torch.export.export(
        attention_layer(), attention_inputs(), dynamic_shapes=shapes, strict=False
    )


def decoder_step() -> DecoderStep:
    """The tiny model, in float32, over 8-bit pages."""
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()
    patch(model)
    return DecoderStep(model.requires_grad_(False), KV_CACHE_DTYPE)


def export_decoder_step() -> ExportedProgram:
    step = decoder_step()
    return torch.export.export(
        step, step.example_inputs(), dynamic_shapes=step.dynamic_shapes(), strict=False
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.jit.script(attention_layer()).save(folder / "attention.pt")
    print(folder / "attention.pt")
    for name, export in (("attention", export_attention), ("tiny_model", export_decoder_step)):
        package = folder / f"{name}.pt2"
        print(torch._inductor.aoti_compile_and_package(export(), package_path=str(package)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
