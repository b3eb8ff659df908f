"""What the machine can do at most: dot products on registers, and reading memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

import torch_flash_mla
from torch_flash_mla import ops

ARITHMETICS = ("f32", "bf16", "int16", "int8")
# What the kernels execute, per level and arithmetic.
INSTRUCTIONS = {
    ("scalar", "f32"): "mul + add, 4 lanes",
    ("avx2", "f32"): "ymm vfmadd231ps",
    ("avx2", "int16"): "ymm vpmaddwd + vpaddd",
    ("avx2_vnni", "f32"): "ymm vfmadd231ps",
    ("avx2_vnni", "int16"): "ymm vpmaddwd + vpaddd",
    ("avx2_vnni", "int8"): "ymm vpdpbusd",
    ("avx2_vnni_evex", "f32"): "ymm vfmadd231ps",
    ("avx2_vnni_evex", "int16"): "ymm vpmaddwd + vpaddd",
    ("avx2_vnni_evex", "int8"): "ymm vpdpbusd",
    ("avx512_vnni", "f32"): "zmm vfmadd231ps",
    ("avx512_vnni", "int16"): "zmm vpdpwssd",
    ("avx512_vnni", "int8"): "zmm vpdpbusd",
    ("avx512_bf16", "f32"): "zmm vfmadd231ps",
    ("avx512_bf16", "bf16"): "zmm vdpbf16ps",
    ("avx512_bf16", "int16"): "zmm vpdpwssd",
    ("avx512_bf16", "int8"): "zmm vpdpbusd",
    # The level's own instructions: oneDNN's products on AMX exceed this roof.
    ("onednn", "f32"): "zmm vfmadd231ps",
    ("onednn", "bf16"): "zmm vdpbf16ps",
    ("onednn", "int16"): "zmm vpdpwssd",
    ("onednn", "int8"): "zmm vpdpbusd",
}
# About a millisecond: long beside the call and the meeting of threads, short beside a time slice.
_ITERATIONS = 200_000


def flop_of_spin(isa: str, arithmetic: str) -> float:
    """Operations of one :func:`spin`, 0 where the level has no such product."""
    with torch_flash_mla.force_isa(isa):
        return ops.roof(arithmetic, _ITERATIONS)


def spin(isa: str, arithmetic: str) -> Callable[[], object]:
    """A call that does nothing but the dot products of an arithmetic, on every thread."""
    return on_level(isa, functools.partial(ops.roof, arithmetic, _ITERATIONS))


def on_level(isa: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call, with the instruction set forced each time: contenders of several levels can take
    turns. Forcing costs some tenths of a microsecond."""

    def forced() -> object:
        ops.set_isa(isa)
        return call()

    return forced


def memory_reader(mebibytes: int) -> tuple[int, Callable[[], object]]:
    """(bytes, a call that reads that much memory once): choose much more than the last cache."""
    buffer = torch.ones(mebibytes * 2**20 // 8, dtype=torch.int64)
    return buffer.nbytes, buffer.sum
