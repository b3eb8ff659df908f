"""What a user of vLLM may set: ``--additional-config '{"torch_flash_mla": {...}}'``.

One setting: ``kv_cache_dtype``, "auto" (the float dtype that vLLM chose) or a packed format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from torch_flash_mla.formats import PACKED_FORMATS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "torch_flash_mla"


@dataclass(frozen=True)
class Settings:
    """The settings of one vLLM configuration.

    Attributes:
        kv_cache_dtype: "auto" or one of ``PACKED_FORMATS``.
    """

    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        allowed = ("auto", *PACKED_FORMATS)
        if self.kv_cache_dtype not in allowed:
            raise ValueError(
                f"additional_config[{KEY!r}]['kv_cache_dtype']: got {self.kv_cache_dtype!r}, "
                f"expected one of {', '.join(allowed)}"
            )


def settings_of(vllm_config: VllmConfig) -> Settings:
    """Reads the settings of a configuration.

    Raises:
        ValueError: an unknown setting or value; or a packed format beside a ``--kv-cache-dtype``,
            of which only one can be meant.
    """
    additional = vllm_config.additional_config
    given = additional.get(KEY, {}) if isinstance(additional, dict) else {}
    known = [field.name for field in fields(Settings)]
    if not isinstance(given, dict) or not set(given) <= set(known):
        raise ValueError(
            f"additional_config[{KEY!r}]: got {given!r}, expected an object with {', '.join(known)}"
        )
    settings = Settings(**given)
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in ("auto", "float16", "bfloat16"):
        raise ValueError(
            f"--kv-cache-dtype: got {cache_dtype!r}; for MLA on CPUs torch_flash_mla holds auto, "
            "float16 and bfloat16 there, and its packed formats by --additional-config "
            + json.dumps({KEY: {"kv_cache_dtype": "q8_kv"}})
        )
    if settings.kv_cache_dtype != "auto" and cache_dtype != "auto":
        raise ValueError(
            f"--kv-cache-dtype {cache_dtype} and additional_config[{KEY!r}]['kv_cache_dtype'] = "
            f"{settings.kv_cache_dtype!r} name two formats: leave one of them out"
        )
    return settings
