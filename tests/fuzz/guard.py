"""Memory between pages that must not be touched, for tensors whose ends lie on their edge."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def extent(t: Tensor) -> tuple[int, int]:
    """The bytes [begin, end) of its storage that ``t`` reaches."""
    if t.numel() == 0:
        return 0, 0
    last = t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.storage_offset() * t.element_size(), (last + 1) * t.element_size()


def storage_bytes(t: Tensor) -> Tensor:
    """uint8 view of all of the storage of ``t``."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


class Arena:
    """``size`` bytes with a page on either side that kills whoever touches it."""

    def __init__(self, size: int) -> None:
        size = -(-size // PAGE) * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = _libc.mmap(None, size + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        for guard in (address, address + PAGE + size):
            if _libc.mprotect(guard, PAGE, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect failed")
        self.size = size
        self._memory = (ctypes.c_uint8 * size).from_address(address + PAGE)  # lives on
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)

    def place(self, t: Tensor, end: bool) -> Tensor | None:
        """A copy of ``t``, strides and all, at an edge of the arena; None if it is too large."""
        begin, stop = extent(t)
        count = stop - begin
        if count == 0 or count > self.size:
            return None
        first = self.size - count if end else 0
        here = self._bytes[first : first + count]
        here.copy_(storage_bytes(t)[begin:stop])
        return here.view(t.dtype).as_strided(t.shape, t.stride())


class Arenas:
    """One arena for each tensor of a call."""

    def __init__(self, size: int = 1 << 20) -> None:
        self._size = size
        self._arenas: list[Arena] = []

    def place(self, tensors: list[Tensor], end: bool) -> list[Tensor]:
        """Copies of ``tensors`` at edges, all at the same; those too large stay what they are."""
        while len(self._arenas) < len(tensors):
            self._arenas.append(Arena(self._size))
        placed = (a.place(t, end) for a, t in zip(self._arenas, tensors, strict=False))
        return [t if p is None else p for t, p in zip(tensors, placed, strict=True)]
