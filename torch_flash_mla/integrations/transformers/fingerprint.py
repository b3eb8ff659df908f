"""What tells two models apart for a cache on disk: their configs and a sample of all weights.

A cached latent depends on every weight below its layer, so every parameter counts, adapters
included, and every buffer that a checkpoint holds (quantised weights, the biases of a router). 16
runs of 16 neighbouring values of each are read: any fine-tuning of a tensor changes them, and a
model of thousands of tensors takes a fraction of a second. Configs are compared field by field,
where both sides have the field: releases of transformers add and drop some.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig

_RUNS = 16  # per tensor
_RUN_LENGTH = 16  # values

# Fields that no hidden state depends on.
_IGNORED = {
    "architectures",
    "attention_dropout",
    "dtype",
    "id2label",
    "initializer_range",
    "label2id",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """``{"class", "config", "weights"}`` of a model of transformers; JSON can hold it.

    Weights that are not in memory (meta tensors of an offloaded model) count by name and shape.
    """
    config = decoder_config(model)
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    digest = hashlib.sha256()
    for name, tensor in (*inner.named_parameters(), *_persistent_buffers(inner)):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_sample(tensor))
    for name, module in inner.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters"):  # PEFT
            digest.update(f"{name} {module.active_adapters} {module.disable_adapters}\n".encode())
    return {
        "class": type(inner).__name__,
        "config": _fields(config),
        "weights": digest.hexdigest(),
    }


def decoder_config(model: Any) -> PreTrainedConfig:
    """The config of the text part of a model."""
    config: PreTrainedConfig = model.config.get_text_config(decoder=True)
    return config


def difference(stored: dict[str, Any], present: dict[str, Any]) -> str | None:
    """How the model that made a file differs from the present one; None: it does not."""
    if stored["class"] != present["class"]:
        return f"it was made by a {stored['class']}, this is a {present['class']}"
    changed = [
        f"{name}: {stored['config'][name]!r}, here {present['config'][name]!r}"
        for name in sorted(stored["config"].keys() & present["config"].keys())
        if stored["config"][name] != present["config"][name]
    ]
    if changed:
        return f"its model's config differs ({'; '.join(changed)})"
    if stored["weights"] != present["weights"]:
        return "its model has the same config, but other weights, dtypes or adapters"
    return None


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a checkpoint holds: others follow from the config, or are scratch."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", buffer


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    fields = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _IGNORED and not name.startswith("_") and not name.endswith("_token_id")
    }
    return json.loads(json.dumps(fields, default=str))  # as it will be read back


def _sample(tensor: Tensor) -> bytes:
    """The bytes of a few evenly spaced runs of values."""
    if is_traceable_wrapper_subclass(tensor):  # quantised weights are made of several tensors
        return b"".join(_sample(getattr(tensor, x)) for x in tensor.__tensor_flatten__()[0])
    if tensor.is_meta or tensor.numel() == 0:
        return b""
    values = tensor.detach().reshape(-1)
    length = min(_RUN_LENGTH, len(values))
    last = len(values) - length
    starts = sorted({last * run // (_RUNS - 1) for run in range(_RUNS)})
    sample = torch.cat([values[start : start + length] for start in starts])
    return sample.cpu().view(torch.uint8).numpy().tobytes()
