"""One of two processes that hold a model together: patched and stock give the same.

    python -m torch.distributed.run --standalone --nproc-per-node=2 \\
        tests/distributed_models.py {ddp,fsdp2,tensor_parallel} {auto,q8_kv} FOLDER

A training step comes first: loss and every gradient of the local parameters. Then greedy text, over
caches of the format. Prints "same as stock".
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
from transformers_compare import Mode, OpCalls, assert_same, generate, rounding_cache
from wrapped_models import gradients, plain_model

import torch_flash_mla
from torch_flash_mla.integrations.transformers import patch


def model_of(kind: str, folder: Path) -> tuple[Any, Any]:
    """The distributed model, and the one inside that generates."""
    if kind == "tensor_parallel":
        if dist.get_rank() == 0:
            plain_model().save_pretrained(folder)
        dist.barrier()
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
        weight = model.model.layers[0].self_attn.kv_b_proj.weight
        rows = weight.to_local().shape[0] if isinstance(weight, DTensor) else weight.shape[0]
        assert rows == plain_model().model.layers[0].self_attn.kv_b_proj.out_features // 2
        return model, model
    inner = plain_model()
    if kind == "ddp":
        return DistributedDataParallel(inner), inner
    for layer in inner.model.layers:
        fully_shard(layer)
    return fully_shard(inner), inner


def local(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.to_local() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def main(kind: str, kv_cache_dtype: str, folder: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model, inner = model_of(kind, Path(folder))
    mode = Mode((7, 7), {"max_new_tokens": 6}, ())
    model.train()
    expected = local(gradients(model))
    assert len(expected) == len(list(model.parameters()))
    model.eval()
    cache = "DynamicCache"
    if kv_cache_dtype != "auto":
        cache = rounding_cache(inner, "DynamicCache", kv_cache_dtype)
    text = generate(inner, mode, cache)

    report = patch(model, kv_cache_dtype)
    assert not report.failed
    model.train()
    actual = local(gradients(model))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max()
        assert error <= 1e-3 * gradient.abs().max(), f"{name}: {error}"
    model.eval()
    with torch_flash_mla.force_isa("scalar"), OpCalls() as calls:
        assert_same(generate(inner, mode, "default"), text)
    print(report)
    print(f"the operator was called {calls.count} times: same as stock")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
