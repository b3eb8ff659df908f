"""vLLM serves MLA models on CPUs with these operators: what vLLM's entry points call.

Nothing is to be imported or patched by hand. Once this package is installed beside vLLM, vLLM finds
two entry points (``pyproject.toml``) in every process that it starts:

* ``vllm.platform_plugins`` -> :func:`platform_plugin`: names the platform, vLLM's CPU platform with
  another MLA backend (``platform.py``);
* ``vllm.general_plugins`` -> :func:`general_plugin`: the same platform where vLLM was told its
  platform by ``VLLM_TARGET_DEVICE=cpu`` and asks no plugin.

The backend itself, which turns a batch into calls of the operators, is ``backend.py``; what a user
may set is ``settings.py``. This module imports nothing of vLLM before vLLM calls it, so the entry
points cost nothing where vLLM is absent. ``TORCH_FLASH_MLA_DISABLE=1`` switches all of it off.
"""

from __future__ import annotations

import logging
import os

# The series whose backend interface this is written for. vLLM promises none, and calls a hook that
# is used here temporary, so another series is served by another release of this package.
SUPPORTED_VLLM = "0.32"

_PLATFORM = "torch_flash_mla.integrations.vllm.platform.FlashMLACpuPlatform"

# Below vLLM's own logger, because vLLM configures no other: lines show up among those of vLLM.
LOGGER_NAME = "vllm.torch_flash_mla"


def platform_plugin() -> str | None:
    """Entry point of ``vllm.platform_plugins``: the platform to use, None for vLLM's own choice."""
    if not _active():
        return None
    from vllm.platforms import cpu_platform_plugin

    return _PLATFORM if cpu_platform_plugin() is not None else None


def general_plugin() -> None:
    """Entry point of ``vllm.general_plugins``: sees to the platform where no plugin was asked.

    With ``VLLM_TARGET_DEVICE=cpu``, as in vLLM's container images, vLLM takes its own CPU platform
    without asking, and no hook is left. Everybody holds the one platform object by then, so that
    object changes its class.
    """
    if not _active():
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from torch_flash_mla.integrations.vllm.platform import FlashMLACpuPlatform

    if isinstance(current_platform, FlashMLACpuPlatform):
        return
    if type(current_platform) is not FlashMLACpuPlatform.__base__:
        logging.getLogger(LOGGER_NAME).warning(
            "torch_flash_mla stays off: the platform is %s, which another package has chosen",
            type(current_platform).__qualname__,
        )
        return
    current_platform.__class__ = FlashMLACpuPlatform


def _active() -> bool:
    """Whether this package serves the vLLM that is installed; says why it does not."""
    if os.environ.get("TORCH_FLASH_MLA_DISABLE", "") not in ("", "0"):
        return False
    version = _vllm_version()
    if ".".join(version.split(".")[:2]) == SUPPORTED_VLLM:
        return True
    from torch_flash_mla import __version__

    logging.getLogger(LOGGER_NAME).warning(
        "torch_flash_mla %s stays off: it serves vLLM %s.*, and this is vLLM %s. MLA runs on the "
        "backend of vLLM, which ignores --additional-config of torch_flash_mla",
        __version__,
        SUPPORTED_VLLM,
        version,
    )
    return False


def _vllm_version() -> str:
    from vllm.version import __version__

    return __version__
