"""Fits the 16 levels of the cache format q4_kv: Lloyd-Max on normalised blocks of 32.

    python tools/fit_q4_codebook.py

Latent rows are RMS-normed mixtures of many features, so their blocks are close to Gaussian. A block
is divided by its scale, which is chosen as append does (the best of a few candidates around
absmax / 127); levels and scales are fitted in turn until neither moves. The result is symmetric,
lives on the int8 grid and is frozen in csrc/kernels/formats/q4_kv.h: changing it would change what
stored caches mean.
"""

from __future__ import annotations

import numpy as np

CANDIDATES = np.array([1.0, 0.94, 0.88, 0.82, 0.76, 0.7])


def quantise(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Index of the nearest level of each value."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, x)


def best_scales(blocks: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Scale of each block: the candidate with the least squared error."""
    scales = np.abs(blocks).max(axis=1, keepdims=True) / 127 * CANDIDATES
    errors = np.stack(
        [
            ((levels[quantise(blocks / s[:, None], levels)] * s[:, None] - blocks) ** 2).sum(axis=1)
            for s in scales.T
        ]
    )
    return np.take_along_axis(scales, errors.argmin(axis=0)[:, None], axis=1)


def main() -> None:
    blocks = np.random.default_rng(0).standard_normal((50_000, 32))
    levels = np.linspace(-127, 127, 16)
    for _ in range(60):
        scale = best_scales(blocks, levels)
        x = (blocks / scale).ravel()
        weight = np.repeat(scale.ravel() ** 2, 32)
        index = quantise(x, levels)
        total = np.bincount(index, weight * x, 16) / np.bincount(index, weight, 16)
        levels = (total - total[::-1]) / 2  # symmetric
        levels *= 127 / levels[-1]
    levels = np.round(levels)
    scale = best_scales(blocks, levels)
    error = np.sqrt(np.mean((levels[quantise(blocks / scale, levels)] * scale - blocks) ** 2))
    print("levels:", ", ".join(str(int(x)) for x in levels))
    print(f"relative RMS error on Gaussian blocks: {error:.4f}")


if __name__ == "__main__":
    main()
