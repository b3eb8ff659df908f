"""Cache files: safetensors with one JSON document in the metadata.

The document says what the tensors are (``kind``, ``version``, sizes, block table, lengths, model);
the tensors are the pools of pages, and the state of layers that keep no pages. A file is written
beside its final name and renamed, so it is whole or absent. It is read by mapping it: nothing is
read before it is used, and a page of memory that is written to becomes private to the process
(copy on write), so the file never changes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

VERSION = 1
_KEY = "torch_flash_mla"


class StoredTensors:
    """The tensors of an open cache file by name: views of one private mapping of it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = set(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(f"no tensor {name!r}")
        return self._file.get_tensor(name)


def write(
    path: str | os.PathLike[str], kind: str, header: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Writes a cache file: whole and on disk when this returns, unchanged when it raises.

    Args:
        path: what to write or to replace; its folder must exist.
        kind: class that can load it.
        header: what JSON can hold.
        tensors: any CPU tensors.
    """
    from safetensors.torch import save_file

    target = Path(path)
    document = json.dumps({"kind": kind, "version": VERSION, **header})
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        dense = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(dense, unfinished, metadata={_KEY: document})
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], StoredTensors]:
    """Header and tensors of a cache file. Decode them in a :func:`decoding` block.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no cache file, of another kind or version, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    with open(name, "rb"):  # errors of the system as Python words them
        pass
    try:
        file = safe_open(name, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{name}: not a safetensors file, or a damaged one ({error})") from error
    document = (file.metadata() or {}).get(_KEY)
    if document is None:
        raise ValueError(f"{name}: a safetensors file, but no cache of torch_flash_mla")
    with decoding(name):
        header = json.loads(document)
        found, version = header["kind"], header["version"]
    if version != VERSION:
        raise ValueError(f"{name}: cache file of version {version}, expected {VERSION}")
    if found != kind:
        raise ValueError(f"{name}: holds a {found}, expected a {kind}: load it with {found}.load")
    return header, StoredTensors(file)


@contextlib.contextmanager
def decoding(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what goes wrong with a damaged header into one kind of error, with the file's name."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{os.fspath(path)}: damaged cache file ({what})") from error
