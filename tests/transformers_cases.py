"""Small models of every MLA family of the installed transformers, found by what their code
contains.

A family is a folder of models whose class with ``generate`` has layers that define ``expand_kv``:
its own, those of another family (sarvam_mla), or those of its text part (kimi_k25); or that cache
one tensor as keys and values (deepseek_v4). Its config is
shrunk by the names that such configs share; the few things a family needs beyond that (layer
patterns, a vision part) are in ``_SPECIAL`` and ``_VISION``. The structure stays real: sparse
layers select fewer keys than there are, sliding windows slide, dims differ.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

from torch_flash_mla.integrations.transformers.compat import SPARSE_LAYERS_CACHE_LATENTS
from torch_flash_mla.integrations.transformers.shared_keys import shares_keys

_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "ffn_hidden_size": 64,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_experts_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "zero_expert_num": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 48,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 48,
    "index_topk": 8,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "hc_mult": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "embedding_initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

# Families that tests name and not every release has that the package takes.
_SINCE = {"mistral_large4": "5.22.2", "dots3_note": "5.24.0", "hy_v4_vl": "5.24.0"}

_INDEXED = "indexed_attention" if SPARSE_LAYERS_CACHE_LATENTS else "deepseek_sparse_attention"

_SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2, "head_dim": 16},
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "mlp_layer_types": ["moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 5},
        "sliding_window": 6,
        "index_topk": 3,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "o_groups": 2,
        "o_lora_rank": 16,
    },
    "dots3_note": {
        "layer_types": ["indexed_attention", "sliding_attention"],
        "sliding_window": 8,
        "head_dim": 64,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 48,
        "swa_kv_lora_rank": 96,
        "swa_head_dim": 48,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 32,
    },
    "glm5_next": {
        "layer_types": ["linear_attention", _INDEXED, _INDEXED],
        "mlp_layer_types": ["dense", "sparse", "dense"],
        "indexer_types": ["full", "full", "shared"],
        "num_hidden_layers": 3,
        "qk_rope_head_dim": 0,
        "index_kpool": 2,
    },
    "hy_v4": {"indexer_types": ["full", "shared"], "head_dim": 64, "learnable_sink_init": 0.5},
    "hy_v4_vl": {
        "indexer_types": ["full", "shared"],
        "head_dim": 64,
        "learnable_sink_init": 0.5,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
        },
    },
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], "q_lora_rank": None},
    "mistral_large4": {
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 0, 1, 0],
        "kv_source_layers": [0, 1, 0, 1],
        "indexer_types": ["full", "full", "full", "shared"],
    },
    "longcat_flash": {"head_dim": 32},
    "minicpm3": {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 80},
}

_VISION: dict[str, dict[str, Any]] = {
    "glm5_next": {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "image_size": 28,
        "out_hidden_size": 64,
        "intermediate_size": 32,
        "projection_intermediate_size": 32,
    },
    "hy_v4_vl": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "out_hidden_size": 64,
    },
    "kimi_k25": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "mistral_large4": {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
}


_MODELS = Path(transformers.__file__).parent / "models"
_CACHES_ONE_TENSOR = re.compile(r"\.update\((\w+), \1,")


@functools.cache
def _found() -> dict[str, tuple[str, str]]:
    """Family -> its model type, and the name of its class with ``generate``: a causal model where
    there is one, else the multimodal one."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    multimodal = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    classes = {
        name
        for file in _MODELS.glob("*/modeling_*.py")
        if "def expand_kv" in (text := file.read_text(encoding="utf-8"))
        or _CACHES_ONE_TENSOR.search(text)
        for name in re.findall(r"^class (\w+)\(", text, re.MULTILINE)
    }
    with_text_part = re.compile("|".join(f'"{kind}"' for kind in causal if causal[kind] in classes))
    found: dict[str, tuple[str, str]] = {}
    for names in (causal, multimodal):
        for kind, name in names.items():
            family = model_type_to_module_name(kind)
            configuration = _MODELS / family / f"configuration_{family}.py"
            ours = name in classes or (
                names is multimodal
                and configuration.exists()
                and with_text_part.search(configuration.read_text(encoding="utf-8"))
            )
            if ours and (family not in found or name.endswith("ForCausalLM")):
                found[family] = kind, name
    return found


def families() -> tuple[str, ...]:
    """The families that ``patch`` takes, by name."""
    return tuple(sorted(family for family in _found() if family not in refused_families()))


@functools.cache
def shared_key_families() -> tuple[str, ...]:
    """Those of them whose one key head is its value: they keep caches of transformers."""
    sharing = {
        file.parent.name
        for file in _MODELS.glob("*/modeling_*.py")
        if _CACHES_ONE_TENSOR.search(file.read_text(encoding="utf-8"))
    }
    return tuple(family for family in families() if family in sharing)


def refused_families() -> tuple[str, ...]:
    """Sparse families of releases that cache their expanded keys."""
    if SPARSE_LAYERS_CACHE_LATENTS:
        return ()
    sparse = (
        file.parent.name
        for file in _MODELS.glob("*/modeling_*.py")
        if "self.indexer = " in (text := file.read_text(encoding="utf-8"))
        and "def expand_kv" in text
    )
    return tuple(sorted(set(sparse) & _found().keys()))


def _names(family: str) -> tuple[str, str]:
    """Of ``_found``. Skips the test where transformers is older than the family."""
    if family not in _found() and family in _SINCE:
        since, installed = Version(_SINCE[family]), Version(transformers.__version__)
        if installed < since:
            pytest.skip(f"{family} came with transformers {since}, installed is {installed}")
    return _found()[family]


def model_class(family: str) -> type[transformers.PreTrainedModel]:
    """The class with ``generate``."""
    return getattr(transformers, _names(family)[1])


def small_config(family: str, **overrides: Any) -> transformers.PreTrainedConfig:
    """A config of two to four small layers; ``overrides`` go to its text part."""
    config_class = CONFIG_MAPPING[_names(family)[0]]
    text_class = config_class
    nested = "text_config" in {field.name for field in dataclasses.fields(config_class)}
    if nested:
        text_class = type(config_class().get_text_config())
    fields = {field.name for field in dataclasses.fields(text_class)}
    values = {name: value for name, value in _SMALL.items() if name in fields}
    values |= _SPECIAL.get(family, {})
    values |= overrides
    if not nested:
        return text_class(**values)
    return config_class(text_config=text_class(**values).to_dict(), vision_config=_VISION[family])


def small_model(family: str, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A float32 model; its random weights are large enough for attention to matter."""
    torch.manual_seed(seed)
    model = model_class(family)(small_config(family, **overrides)).eval()
    if family in shared_key_families():
        for name, parameter in model.named_parameters():
            if name.endswith(("sinks", "position_bias")):  # zero in an untrained model
                torch.nn.init.normal_(parameter)
    return model


def mla_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that ``patch`` takes."""
    return [
        module
        for module in model.modules()
        if hasattr(type(module), "expand_kv")
        or (hasattr(module, "layer_idx") and shares_keys(module))
    ]


def kv_b(model: torch.nn.Module) -> list[Any]:
    """The kv_b_proj of each MLA layer."""
    return [layer.kv_b_proj for layer in mla_layers(model)]


TINY_MODEL = Path(__file__).resolve().parents[1] / "examples" / "tiny_model"


def tiny_model() -> transformers.PreTrainedModel:
    """The trained byte-level model of the repository, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()
