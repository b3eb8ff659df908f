"""Flash attention for multi-head latent attention (MLA) on CPUs, as PyTorch operators.

Importing the package loads the operators into ``torch.ops.flashmla``. Typed functions for them are
in :mod:`torch_flash_mla.ops`; ``patch(model)`` makes a transformers model use them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The operators use torch's C++ interface, which is stable within one series only. The dependency in
# pyproject.toml says the same.
SUPPORTED_TORCH = "2.13"

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":  # torch is there, but something that it needs is not
        raise
    raise ImportError(
        f"torch_flash_mla needs torch {SUPPORTED_TORCH}.*, which is not installed: "
        f"pip install 'torch=={SUPPORTED_TORCH}.*'"
    ) from error

# Where CMake finds torch_flash_mla-config.cmake, as torch.utils.cmake_prefix_path does for torch.
cmake_prefix_path = str(Path(__file__).resolve().with_name("share") / "cmake")


def _load_operators() -> None:
    """Registers the operators of ``_C.so``, or explains what stands in the way."""
    if ".".join(torch.__version__.split(".")[:2]) != SUPPORTED_TORCH:
        raise ImportError(
            f"torch_flash_mla {__version__} is built for torch {SUPPORTED_TORCH}.*, but torch "
            f"{torch.__version__} is installed. Install torch=={SUPPORTED_TORCH}.*, or a release "
            "of torch_flash_mla made for your torch."
        )
    library = Path(__file__).with_name("_C.so")
    if not library.exists():
        raise ImportError(
            f"{library} is missing: the operators were not compiled. In a checkout run "
            "`make setup`, or in your own environment `pip install --no-build-isolation -e .`"
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"{library} does not load into torch {torch.__version__}; compile it again, with "
            f"`make setup` or `pip install --no-build-isolation .`: {error}"
        ) from error


_load_operators()

from torch_flash_mla import _fake, _vmap, ops  # noqa: E402, F401
from torch_flash_mla.ops import (  # noqa: E402
    available_isas,
    concat_and_cache_mla,
    copy_blocks,
    cpu_isa,
    gather_cache,
    merge_attn_states,
    mla_attention,
    mla_attention_kv_b,
)

if TYPE_CHECKING:
    from torch_flash_mla._warmup import warmup
    from torch_flash_mla.cache import PagedLatentCache
    from torch_flash_mla.flash_mla_interface import (
        flash_mla_sparse_fwd,
        flash_mla_with_kvcache,
        get_mla_metadata,
    )
    from torch_flash_mla.integrations.transformers import DecoderStep, MLACache
    from torch_flash_mla.integrations.transformers.patch import patch, patched, unpatch
    from torch_flash_mla.modules import MLAAttention


@contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Runs the operators with the instruction set ``name`` inside a ``with`` block.

    The choice is one for the whole process: other threads see it too. Meant for tests and
    measurements; ``FLASHMLA_ISA=name`` in the environment does it from the start.

    Raises:
        ValueError: ``name`` is not one of :func:`available_isas`.
    """
    before = cpu_isa()
    ops.set_isa(name)
    try:
        yield
    finally:
        ops.set_isa(before)


# Imported when first used, so that importing the operators stays quick and transformers optional.
_LAZY = {
    "DecoderStep": "torch_flash_mla.integrations.transformers",
    "MLAAttention": "torch_flash_mla.modules",
    "MLACache": "torch_flash_mla.integrations.transformers",
    "PagedLatentCache": "torch_flash_mla.cache",
    "flash_mla_sparse_fwd": "torch_flash_mla.flash_mla_interface",
    "flash_mla_with_kvcache": "torch_flash_mla.flash_mla_interface",
    "get_mla_metadata": "torch_flash_mla.flash_mla_interface",
    "patch": "torch_flash_mla.integrations.transformers",
    "patched": "torch_flash_mla.integrations.transformers",
    "unpatch": "torch_flash_mla.integrations.transformers",
    "warmup": "torch_flash_mla._warmup",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


__all__ = [
    "DecoderStep",
    "MLAAttention",
    "MLACache",
    "PagedLatentCache",
    "available_isas",
    "cmake_prefix_path",
    "concat_and_cache_mla",
    "copy_blocks",
    "cpu_isa",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "force_isa",
    "gather_cache",
    "get_mla_metadata",
    "merge_attn_states",
    "mla_attention",
    "mla_attention_kv_b",
    "patch",
    "patched",
    "unpatch",
    "warmup",
]
