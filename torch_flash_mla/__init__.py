"""Flash attention for multi-head latent attention (MLA) on CPUs, as PyTorch operators.

Importing the package loads the operators into ``torch.ops.flashmla``. Typed functions for them are
in :mod:`torch_flash_mla.ops`; ``patch(model)`` makes a transformers model use them.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from torch_flash_mla._series import SUPPORTED_TORCH, library_name, order, requirement, series_of

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":  # torch is there, but something that it needs is not
        raise
    raise ImportError(
        f"torch_flash_mla needs torch {SUPPORTED_TORCH[0]} to {SUPPORTED_TORCH[-1]}, which is not "
        f"installed: pip install '{requirement(SUPPORTED_TORCH)}'"
    ) from error

# Where CMake finds torch_flash_mla-config.cmake, as torch.utils.cmake_prefix_path does for torch.
cmake_prefix_path = str(Path(__file__).resolve().with_name("share") / "cmake")


def _load_operators() -> str:
    """Registers the operators made for this torch, or explains what stands in the way.

    They use torch's C++ interface, which keeps its binary form within one series only.
    """
    package = Path(__file__).parent
    series = series_of(torch.__version__)
    library = package / library_name(series)
    if order(series) < order(SUPPORTED_TORCH[0]):
        raise ImportError(
            f"torch_flash_mla {__version__} needs torch {SUPPORTED_TORCH[0]} or newer, but torch "
            f"{torch.__version__} is installed: pip install '{requirement(SUPPORTED_TORCH)}'"
        )
    if not library.exists():
        present = [path.stem.removeprefix("_C_torch") for path in package.glob(library_name("*"))]
        if not present:
            raise ImportError(
                f"{library} is missing: the operators were not compiled. In a checkout run "
                "`make setup`, or in your own environment `pip install --no-build-isolation -e .`"
            )
        served = ", ".join(sorted((f"{s[0]}.{s[1:]}" for s in present), key=order))
        raise ImportError(
            f"torch_flash_mla {__version__} has operators for torch {served}, but torch "
            f"{torch.__version__} is installed. Compile them for it from the source archive:\n"
            "    pip install 'setuptools>=77' cmake ninja\n"
            "    pip install --no-build-isolation --force-reinstall --no-deps "
            f"torch_flash_mla-{__version__}.tar.gz"
        )
    if series not in SUPPORTED_TORCH:
        warnings.warn(
            f"torch_flash_mla {__version__} was compiled for torch {series}, on which it was never "
            f"tested; it was on {', '.join(SUPPORTED_TORCH)}",
            stacklevel=2,
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"{library} does not load into torch {torch.__version__}; compile it again, with "
            f"`make setup` or `pip install --no-build-isolation .`: {error}"
        ) from error
    return str(library)


#: The operator library that is loaded. A program that does without the Python package loads this
#: file: ``torch.ops.load_library``, or ``dlopen`` in C++.
library_path = _load_operators()

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
    "library_path",
    "merge_attn_states",
    "mla_attention",
    "mla_attention_kv_b",
    "patch",
    "patched",
    "unpatch",
    "warmup",
]
