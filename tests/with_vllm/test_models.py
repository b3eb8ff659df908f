"""Other families and widths than the tiny model's: small random models beside transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import compare_greedy, counted, engine, generate
from transformers import PreTrainedModel
from transformers_cases import small_model

import torch_flash_mla

LENGTHS = [1, 5, 33, 200]


def prompts(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in LENGTHS]


# What config.json of published checkpoints says, vLLM reads, and no transformers writes any more.
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe_lite": {"topk_method": "noaux_tc", "first_k_dense_replace": 1},
}


def saved(folder: Path, family: str, **overrides: Any) -> PreTrainedModel:
    """A small random model, in memory and as a checkpoint."""
    model = small_model(family, **overrides)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | PUBLISHED.get(family, {})))
    # vLLM's backend for transformers changes the class of the model, which then asks for this.
    model.base_model.do_not_compile = True
    return model


CASES = {
    "deepseek_v2": ("deepseek_v2", {}, {}),
    "deepseek_v3": ("deepseek_v3", {}, {}),
    # latent and rope of MiniCPM3, which vLLM runs with MLA through its backend for transformers
    "minicpm3": ("minicpm3", {"kv_lora_rank": 256}, {"model_impl": "transformers"}),
    "glm4_moe_lite": ("glm4_moe_lite", {}, {}),
    # transformers writes weights of experts that do nothing, which vLLM has no place for
    "odd widths": ("deepseek_v2", {"kv_lora_rank": 88, "qk_rope_head_dim": 20}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    family, overrides, options = CASES[case]
    model = saved(tmp_path, family, **overrides)
    options = {"skip_tokenizer_init": True, "max_model_len": 512, "block_size": 16, **options}
    with (
        engine(model=tmp_path, max_num_batched_tokens=64, max_num_seqs=4, **options) as llm,
        counted(monkeypatch) as calls,
    ):
        outputs = generate(llm, prompts(96), max_tokens=24, detokenize=False)
    assert compare_greedy(model, outputs).worse <= 1e-3
    assert calls.attention == calls.layers > 0


def test_packed_cache_of_other_widths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """288 values in 296 bytes, in blocks of a size that is no power of two."""
    model = saved(tmp_path, "deepseek_v2", kv_lora_rank=256)
    options = {"skip_tokenizer_init": True, "max_model_len": 512, "block_size": 48}
    with (
        torch_flash_mla.force_isa("scalar"),  # float arithmetic over what is stored
        engine("q8_kv", model=tmp_path, **options) as llm,
        counted(monkeypatch) as calls,
    ):
        outputs = generate(llm, prompts(96), max_tokens=24, detokenize=False)
        assert llm.llm_engine.vllm_config.cache_config.num_gpu_blocks == 2**30 // (2 * 48 * 296)
    assert calls.formats == {"q8_kv"}
    assert compare_greedy(model, outputs, "q8_kv").worse <= 0.1
