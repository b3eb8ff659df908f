"""Names and row sizes of the packed cache formats. docs/cache_formats.md documents every byte."""

from __future__ import annotations

import torch

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Latent and rope widths of a packed row must be multiples of this (the size of a scale block).
PACKED_MULTIPLE = 32

_ROW_BYTES = {
    "q8_kv": lambda latent, rope: latent + rope + 2 * 4,
    "q8_0": lambda latent, rope: (latent + rope) * 34 // 32,
    "q6_0": lambda latent, rope: (latent + rope) * 26 // 32,
    "q4_kv": lambda latent, rope: latent * 18 // 32 + rope + 4,
}

PACKED_FORMATS = tuple(_ROW_BYTES)


def row_bytes(kv_cache_dtype: str, latent_dim: int, rope_dim: int) -> int:
    """Bytes that one token takes in a packed format.

    Args:
        kv_cache_dtype: one of ``PACKED_FORMATS``.
        latent_dim, rope_dim: L and R, multiples of 32.

    Raises:
        ValueError: unknown format, or a width that the format cannot hold.
    """
    if kv_cache_dtype not in _ROW_BYTES:
        raise ValueError(
            f"kv_cache_dtype: got {kv_cache_dtype!r}, expected one of {', '.join(PACKED_FORMATS)}"
        )
    for name, width in (("latent_dim", latent_dim), ("rope_dim", rope_dim)):
        if width < 0 or width % PACKED_MULTIPLE:
            raise ValueError(
                f"{name}: got {width}, but {kv_cache_dtype} holds multiples of {PACKED_MULTIPLE}"
            )
    return _ROW_BYTES[kv_cache_dtype](latent_dim, rope_dim)
