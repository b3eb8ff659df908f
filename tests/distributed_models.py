"""One of two processes that hold a model together: patched and stock give the same.

    python -m torch.distributed.run --standalone --nproc-per-node=2 \\
        tests/distributed_models.py {ddp,fsdp2,tensor_parallel} FOLDER FORMAT...

A training step comes first, patched for each format: loss and every gradient of the local
parameters. Then greedy text, over caches of the format. Prints "FORMAT: same as stock".
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers_cases import mla_layers
from transformers_compare import Mode, OpCalls, assert_same, generate, rounding_cache
from wrapped_models import gradients, plain_model

import torch_flash_mla
from torch_flash_mla.integrations.transformers import patched


def model_of(kind: str, folder: Path) -> tuple[Any, Any]:
    """The distributed model, and the one inside that generates."""
    if kind == "tensor_parallel":
        whole = plain_model("deepseek_v2")  # whose plan splits kv_b_proj by heads
        if dist.get_rank() == 0:
            whole.save_pretrained(folder)
        dist.barrier()
        split = DistributedConfig(tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=split)
        weights = [mla_layers(x)[0].kv_b_proj.weight for x in (model, whole)]
        assert len(local(weights[0])) == len(weights[1]) // 2
        return model, model
    inner = plain_model()
    if kind == "ddp":
        return DistributedDataParallel(inner), inner
    for layer in inner.model.layers:
        fully_shard(layer)
    return fully_shard(inner), inner


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_training(model: Any, kv_cache_dtype: str) -> None:
    expected = {name: local(gradient) for name, gradient in gradients(model).items()}
    assert len(expected) == len(list(model.parameters()))
    with patched(model, kv_cache_dtype) as report:
        actual = {name: local(gradient) for name, gradient in gradients(model).items()}
    assert report.patched
    print(report)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max()
        assert error <= 1e-3 * gradient.abs().max(), f"{name}: {error}"


def check_text(model: Any, inner: Any, kv_cache_dtype: str) -> None:
    mode = Mode((7, 7), {"max_new_tokens": 6}, ())
    cache: Any = "DynamicCache"
    if kv_cache_dtype != "auto":
        cache = rounding_cache(inner, "DynamicCache", kv_cache_dtype)
    text = generate(inner, mode, cache)
    with patched(model, kv_cache_dtype), torch_flash_mla.force_isa("scalar"), OpCalls() as calls:
        assert_same(generate(inner, mode, "default"), text)
    print(f"the operator was called {calls.count} times")
    print(f"{kv_cache_dtype}: same as stock")


def main(kind: str, folder: str, *formats: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model, inner = model_of(kind, Path(folder))
    model.train()
    for kv_cache_dtype in formats:  # before text: FSDP's zero_grad() forgets some after generate()
        check_training(model, kv_cache_dtype)
    model.eval()
    for kv_cache_dtype in formats:
        check_text(model, inner, kv_cache_dtype)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
