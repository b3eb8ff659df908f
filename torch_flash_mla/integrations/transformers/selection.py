"""Which layers hand their latents to this package's attention, instead of expanding them first.

``expand_kv`` of an MLA layer makes keys and values from what its cache returned. It is replaced

* on a layer that is patched, by :func:`passthrough`;
* on every MLA class, by a function that passes latents through where the config of the layer
  selects this attention by its name (``attn_implementation="mla_cpu"``). Nothing is remembered:
  another choice takes effect at the next call, in any thread, and a layer that is computed twice
  (checkpointing) does the same twice.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING
from transformers.masking_utils import eager_mask, sdpa_mask

ATTENTION_NAME = "mla_cpu"  # transformers takes any name with "flash" in it for one of its own

AttentionModule: TypeAlias = Any  # an nn.Module of transformers; MLA ones have kv_b_proj, expand_kv


def is_disabled() -> bool:
    """Whether ``TORCH_FLASH_MLA_DISABLE`` makes everything stock."""
    return os.environ.get("TORCH_FLASH_MLA_DISABLE", "") not in ("", "0")


def passthrough(kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """Stands in for ``expand_kv``: [B, 1, S, L] and [B, 1, S, R] go on as they are."""
    return kv_nope, k_rot


def passes_latents(module: AttentionModule) -> bool:
    """Whether the keys that ``module`` sends to this attention are latents."""
    if module.__dict__.get("expand_kv") is passthrough:
        return True
    return hasattr(getattr(type(module), "expand_kv", None), "_stock")


def expand(module: AttentionModule, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    """The keys [B, H, S, P + R] and values [B, H, S, V] of latents, by the layer's own code."""
    expand_kv = type(module).expand_kv
    return getattr(expand_kv, "_stock", expand_kv)(module, latent, rope)


def mla_mask(*args: Any, **kwargs: Any) -> Any:
    """The masks that transformers makes where the name is selected: those of sdpa, or of eager for
    models that compute with numbers in them."""
    teach_selection(everybody=False)
    config_class: Any = type(kwargs.get("config"))
    make: Any = eager_mask if _computes_with_masks(config_class) else sdpa_mask
    return make(*args, **kwargs)


@functools.cache
def _computes_with_masks(config_class: Any) -> bool:
    """Whether a model that is no MLA is written for eager masks alone."""
    model_class = MODEL_MAPPING.get(config_class, None)
    if model_class is None or getattr(model_class, "_supports_sdpa", True):
        return False
    names = vars(sys.modules[model_class.__module__])
    return not any(hasattr(x, "expand_kv") for x in names.values())


_teaching = threading.Lock()
_taught = 0  # len(sys.modules) when the classes were last looked at


@torch.compiler.assume_constant_result  # runs while a graph is made, as it does without one
def teach_selection(everybody: bool = True) -> None:
    """Lets every MLA class that exists by now look for the name.

    Called before the layers of a model run (when their mask is made, and by each MLACache that is
    made), so that the first call of a layer is like all others.

    Args:
        everybody: look for new classes even if no module was imported since the last time.
    """
    global _taught
    count = len(sys.modules)
    if is_disabled() or (count == _taught and not everybody):
        return
    with _teaching:
        for cls in _subclasses(nn.Module):
            expand_kv = vars(cls).get("expand_kv")
            if callable(expand_kv) and not hasattr(expand_kv, "_stock"):
                cls.expand_kv = _selectable(expand_kv)
        _taught = count


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def _selectable(expand_kv: Callable[..., Any]) -> Callable[..., Any]:
    """``expand_kv`` of a class, for layers whose config may select this attention by its name."""

    @functools.wraps(expand_kv)
    def expand_unless_selected(self: AttentionModule, kv_nope: Tensor, k_rot: Tensor) -> Any:
        if self.config._attn_implementation == ATTENTION_NAME:
            return kv_nope, k_rot
        return expand_kv(self, kv_nope, k_rot)

    expand_unless_selected._stock = expand_kv  # type: ignore[attr-defined]
    return expand_unless_selected
