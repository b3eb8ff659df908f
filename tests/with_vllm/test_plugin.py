"""How vLLM finds the backend, what it lets the user choose, and when it stays off."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import TINY_MODEL
from programs import run_python
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.platforms import cpu, current_platform

from torch_flash_mla.integrations import vllm as plugin
from torch_flash_mla.integrations.vllm.platform import FlashMLACpuPlatform


def config(model: Path = TINY_MODEL, **options: Any) -> VllmConfig:
    """What vLLM makes of engine arguments."""
    return EngineArgs(model=str(model), max_model_len=1024, **options).create_engine_config()


def with_settings(**settings: Any) -> dict[str, Any]:
    return {"additional_config": {"torch_flash_mla": settings}}


@pytest.fixture
def no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM sees a CPU where its own MLA backend is the reference."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def test_active_by_installation() -> None:
    assert type(current_platform) is FlashMLACpuPlatform


@pytest.mark.usefixtures("no_amx")
def test_features_stay_on_without_amx() -> None:
    made = config(block_size=48, max_num_batched_tokens=512)
    assert made.cache_config.block_size == 48
    assert made.cache_config.enable_prefix_caching
    assert made.scheduler_config.enable_chunked_prefill
    assert made.scheduler_config.max_num_batched_tokens == 512
    assert config().cache_config.block_size == 128


@pytest.mark.usefixtures("no_amx")
def test_what_the_user_switches_off_stays_off() -> None:
    made = config(enable_prefix_caching=False, enable_chunked_prefill=False)
    assert not made.cache_config.enable_prefix_caching
    assert not made.scheduler_config.enable_chunked_prefill


@pytest.mark.usefixtures("no_amx")
@pytest.mark.parametrize("backend", ["CPU_MLA", "AMX_MLA"])
def test_backends_of_vllm_by_name(backend: str) -> None:
    made = config(attention_backend=backend)
    assert made.cache_config.block_size == 16
    assert not made.scheduler_config.enable_chunked_prefill
    assert made.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert "-rotary_embedding" not in made.compilation_config.custom_ops


def test_models_without_mla_are_left_alone(tmp_path: Path) -> None:
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 262,
        "max_position_embeddings": 2048,
    }
    (tmp_path / "config.json").write_text(json.dumps(llama))
    # The settings would be refused if they were looked at.
    made = config(tmp_path, skip_tokenizer_init=True, **with_settings(kv_cache_dtype="nonsense"))
    assert made.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert "-rotary_embedding" not in made.compilation_config.custom_ops


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (with_settings(kv_cache_dtype="q5_kv"), "got 'q5_kv', expected one of auto, q8_kv"),
        (with_settings(format="q8_kv"), "expected an object with kv_cache_dtype"),
        ({"additional_config": {"torch_flash_mla": "q8_kv"}}, "got 'q8_kv', expected an object"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype: got 'fp8'"),
        ({"kv_cache_dtype": "bfloat16", **with_settings(kv_cache_dtype="q8_kv")}, "two formats"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallelism_is_refused_by_name(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{name}: got 2, but vLLM's CPU worker"):
        config(tensor_parallel_size=2, **{name: 2})


def test_other_versions_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plugin, "_vllm_version", lambda: "0.99.1")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert plugin.platform_plugin() is None
    assert "serves vLLM 0.32.*, and this is vLLM 0.99.1" in caplog.text


def test_another_platform_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Other(cpu.CpuPlatform):
        pass

    other = Other()
    monkeypatch.setattr("vllm.platforms._current_platform", other)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    plugin.general_plugin()
    assert type(other) is Other
    assert "stays off: the platform is" in caplog.text


PLATFORM = """
import os
os.environ.update({environment!r})
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.platforms import current_platform
print("platform:", type(current_platform).__name__)
"""


@pytest.mark.parametrize(
    ("environment", "platform"),
    [
        ({"TORCH_FLASH_MLA_DISABLE": "1"}, "CpuPlatform"),
        ({"VLLM_TARGET_DEVICE": "cpu"}, "FlashMLACpuPlatform"),
        ({"VLLM_TARGET_DEVICE": "cpu", "TORCH_FLASH_MLA_DISABLE": "1"}, "CpuPlatform"),
    ],
)
def test_switches(environment: dict[str, str], platform: str) -> None:
    assert f"platform: {platform}\n" in run_python(PLATFORM.format(environment=environment))


def test_rotary_kernel_of_vllm_is_still_wrong() -> None:
    """The reason for ``-rotary_embedding`` in ``platform.py``: if this fails, that can go."""
    tokens, heads, width = 5, 4, 64
    with set_current_vllm_config(VllmConfig()):
        rotary = RotaryEmbedding(width, width, 2048, 10000.0, False, torch.float32)
    current_platform.import_kernels()
    query, key = torch.randn(tokens, heads, width), torch.randn(tokens, 1, width)
    positions = torch.arange(3, 3 + tokens)
    expected, _ = rotary.forward_native(positions, query.clone(), key.clone())
    found, _ = rotary.forward_cpu(positions, query.clone(), key.clone())
    assert not torch.allclose(found, expected)


def test_router_of_longcat_is_still_missing() -> None:
    """Why ``test_models.py`` has no LongCat: if this fails, it can."""
    current_platform.import_kernels()
    assert not hasattr(torch.ops._moe_C, "topk_softmax")
