"""Cache files: safetensors with one JSON document in the metadata.

The document says what the tensors are: ``kind`` and ``version`` of the file, sizes, block table,
lengths, model, and for each tensor its dtype, shape and checksum; a second entry of the metadata is
the checksum of the document. Checksums are CRC-32: made to notice damage, at several GB/s with
nothing but the standard library. They do not tell who wrote a file.

A file is written beside its final name and renamed, so it is whole or absent. Nothing in a file is
believed: a tensor is taken only where document, safetensors header and the size of the file agree
on it, before memory is taken for it. One open file serves for everything that is read, so replacing
it meanwhile does no harm. Mapped tensors are copy on write: a page of memory that is written to
becomes private to the process, and the file never changes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import mmap as memory_map
import os
import secrets
import stat
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

VERSION = 2  # 1 had no checksums, and no release wrote it
PIECE = 1 << 20  # bytes that are written, or read and verified, at a time: they stay in the cache

_DOCUMENT = "torch_flash_mla"
_CHECKSUM = "torch_flash_mla.crc32"  # of the document
_ALIGNMENT = 64  # of the first tensor in the file
_LONGEST_HEADER = 100_000_000  # as in safetensors itself
_LONGEST = 2**48  # of a dimension
_MOST_DIMENSIONS = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class RefusedFile(ValueError):
    """A file that is not loaded; the message begins with its name."""


@dataclass
class Content:
    """A tensor for a file, in pieces along its first dimension: it need not lie in memory whole."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, tensor: Tensor) -> Content:
        return cls(tensor.dtype, tuple(tensor.shape), lambda: [tensor.detach()])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# Writing


def write(
    path: str | os.PathLike[str], kind: str, header: dict[str, Any], contents: dict[str, Content]
) -> None:
    """Writes a cache file: whole and on disk when this returns. When it raises, a file that was
    there is as it was.

    Each piece is copied before its checksum is taken, so tensors may change meanwhile. (An error of
    the very last step, putting the new name on disk, finds the new file in place.)

    Args:
        path: what to write or to replace; its folder must exist.
        kind: class that can load it.
        header: what JSON can hold.
        contents: CPU tensors.

    Raises:
        OSError: the system did not write it.
        ValueError: a tensor of a dtype that no file holds.
    """
    for name, content in contents.items():
        if content.dtype not in _NAMES:
            raise ValueError(f"{name}: got {content.dtype}, expected one of {[*_NAMES]}")
    # Dtypes with large items first, so that every tensor is aligned to its own.
    names = sorted(contents, key=lambda name: -contents[name].dtype.itemsize)
    checksums = dict.fromkeys(names, "0" * 8)

    def head() -> bytes:
        described = {
            name: [_NAMES[contents[name].dtype], contents[name].shape, checksums[name]]
            for name in names
        }
        text = {"kind": kind, "version": VERSION, **header, "tensors": described}
        return _head(json.dumps(text), names, contents)

    with _beside(Path(path)) as file:
        file.write(head())  # its size is that of the final one
        buffer = bytearray(PIECE)
        for name in names:
            checksums[name] = _write_content(file, contents[name], buffer)
        file.seek(0)
        file.write(head())


def _head(document: str, names: Iterable[str], contents: Mapping[str, Content]) -> bytes:
    """What stands before the tensors: the header of safetensors and its size."""
    metadata = {_DOCUMENT: document, _CHECKSUM: f"{zlib.crc32(document.encode()):08x}"}
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        begin, end = end, end + contents[name].nbytes
        entries[name] = {
            "dtype": _NAMES[contents[name].dtype],
            "shape": contents[name].shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_content(file: IO[bytes], content: Content, buffer: bytearray) -> str:
    """Appends a tensor; returns its checksum."""
    checksum, written = 0, 0
    copied = torch.frombuffer(buffer, dtype=torch.uint8)
    for piece in content.pieces():
        values = _bytes_of(piece.contiguous())
        for part in values.split(len(buffer)):
            copied[: len(part)] = part
            view = memoryview(buffer)[: len(part)]
            checksum = zlib.crc32(view, checksum)
            file.write(view)
            written += len(part)
    assert written == content.nbytes
    return f"{checksum:08x}"


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of ``target`` at the end, and vanishes after an error."""
    while True:  # nobody else has this name, in whatever thread, process or machine
        unfinished = target.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            file = open(unfinished, "xb")  # noqa: SIM115
            break
        except FileExistsError:
            continue
        except OSError as error:
            error.filename = os.fspath(target)
            raise
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Puts a new name on disk too, where the file system knows how."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def _bytes_of(tensor: Tensor) -> Tensor:
    """uint8 [nbytes], the memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8)


# Reading


@contextlib.contextmanager
def opened(
    path: str | os.PathLike[str], kind: str, mmap: bool, verify: bool
) -> Iterator[tuple[dict[str, Any], StoredTensors]]:
    """Header and tensors of a cache file. What the block finds wrong with them becomes a ValueError
    with the name of the file.

    Args:
        path: a file of :func:`write`.
        kind: the class that loads it.
        mmap: whether tensors are views of one private mapping.
        verify: whether tensors are compared with their checksums. The header always is.

    Raises:
        OSError: the file cannot be opened or read.
        ValueError: it is no cache file, of another kind or version, or damaged.
    """
    name = os.fspath(path)
    # A pipe of that name must not keep us waiting.
    with open(name, "rb", buffering=0, opener=_open_at_once) as file:
        try:
            yield _open(file, kind, mmap, verify)
        except RefusedFile as error:
            raise ValueError(f"{name}: {error}") from error
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            what = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise ValueError(f"{name}: damaged cache file ({what})") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _open(
    file: IO[bytes], kind: str, mmap: bool, verify: bool
) -> tuple[dict[str, Any], StoredTensors]:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise RefusedFile("not a file")
    try:
        metadata, entries, data = _read_head(file, status.st_size)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RefusedFile(f"not a safetensors file, or a damaged one ({error})") from error
    if _DOCUMENT not in metadata:
        raise RefusedFile("a safetensors file, but no cache of torch_flash_mla")
    document = metadata[_DOCUMENT]
    header = _parsed(document)
    if header["version"] != VERSION:
        raise RefusedFile(f"cache file of version {header['version']}, expected {VERSION}")
    if metadata.get(_CHECKSUM) != f"{zlib.crc32(document.encode()):08x}":
        raise ValueError("the header does not match its checksum")
    if header["kind"] != kind:
        found = header["kind"]
        raise RefusedFile(f"holds a {found}, expected a {kind}: load it with {found}.load")
    located = _located(Fields(header).mapping("tensors"), entries, status.st_size - data)
    return header, StoredTensors(file, status.st_size, data, located, mmap, verify)


def _read_head(file: IO[bytes], size: int) -> tuple[dict[str, str], dict[str, Any], int]:
    """Metadata and tensor entries of the header, and where the tensors begin."""
    if size < 8:
        raise ValueError(f"{size} bytes")
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    text = bytearray(length)
    _read(file, 8, memoryview(text))
    entries = _parsed(text.decode())
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError("metadata that is not text")
    return metadata, entries, 8 + length


def _parsed(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("JSON of too many levels") from error
    if not isinstance(values, dict):
        raise ValueError(f"JSON that is a {type(values).__name__}, not an object")
    return values


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} in the header")


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in the file, after document and safetensors header have agreed on it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the first tensor on
    nbytes: int
    checksum: str


def _located(
    described: Mapping[str, Any], entries: Mapping[str, Any], size: int
) -> dict[str, _Place]:
    """The tensors of a file that has ``size`` bytes of them."""
    if described.keys() != entries.keys():
        odd = sorted(described.keys() ^ entries.keys())
        raise ValueError(f"tensors: {', '.join(map(repr, odd[:3]))} is not in both headers")
    places, last = {}, 0
    for name, description in described.items():
        *described_as, checksum = description
        entry = Fields(entries[name], name)
        begin, end = entry.integers("data_offsets", 0, size)
        dtype, shape = entry.choice("dtype", _DTYPES), entry.integers("shape", 0, _LONGEST)
        if [dtype, shape] != described_as or len(shape) > _MOST_DIMENSIONS:
            raise ValueError(f"{name}: {dtype} {shape}, but {_short(described_as)} was saved")
        place = _Place(_DTYPES[dtype], tuple(shape), begin, end - begin, checksum)
        if math.prod(shape) * place.dtype.itemsize != place.nbytes:
            raise ValueError(f"{name}: {place.nbytes} bytes for {dtype} {shape}")
        if begin % place.dtype.itemsize:
            raise ValueError(f"{name}: begins at byte {begin}, not aligned for {dtype}")
        places[name], last = place, max(last, end)
    if last != size:
        raise ValueError(f"{size} bytes of tensors, expected {last}")
    return places


class StoredTensors:
    """The tensors of an open cache file, by name.

    Attributes:
        mmap: whether they are views of one private mapping of the file.
    """

    def __init__(
        self,
        file: IO[bytes],
        size: int,
        data: int,
        places: dict[str, _Place],
        mmap: bool,
        verify: bool,
    ) -> None:
        self.mmap = mmap
        self._file = file
        self._size = size
        self._data = data  # where the first tensor begins
        self._places = places
        self._verify = verify
        self._mapping: memory_map.mmap | None = None

    def check(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Raises ValueError if the file has no such tensor."""
        place = self.place(name)
        if (place.dtype, place.shape) != (dtype, shape):
            raise ValueError(
                f"{name}: got {place.dtype} {list(place.shape)}, expected {dtype} {list(shape)}"
            )

    def place(self, name: str) -> _Place:
        if name not in self._places:
            raise ValueError(f"no tensor {name!r}")
        return self._places[name]

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor: mapped, or read into memory of its own."""
        place = self.place(name)
        if not self.mmap or place.nbytes == 0:
            tensor = torch.empty(place.shape, dtype=place.dtype, device="cpu")
            self.read(name, tensor)
            return tensor
        if self._mapping is None:
            access = memory_map.PROT_READ | memory_map.PROT_WRITE
            self._mapping = memory_map.mmap(
                self._file.fileno(), self._size, memory_map.MAP_PRIVATE, access
            )
        if self._verify:  # through the file: if that is truncated now, it is an error and no signal
            self._read_pieces(name, None)
        return torch.frombuffer(
            self._mapping,
            dtype=place.dtype,
            count=math.prod(place.shape),
            offset=self._data + place.begin,
        ).view(place.shape)

    def read(self, name: str, out: Tensor) -> None:
        """Reads a tensor into a contiguous one of its dtype and shape."""
        place = self.place(name)
        assert (out.dtype, tuple(out.shape)) == (place.dtype, place.shape)
        self._read_pieces(name, _bytes_of(out))

    def _read_pieces(self, name: str, out: Tensor | None) -> None:
        place = self.place(name)
        buffer = bytearray(min(PIECE, place.nbytes))
        copied = torch.frombuffer(buffer, dtype=torch.uint8) if buffer else None
        checksum = 0
        for first in range(0, place.nbytes, PIECE):
            view = memoryview(buffer)[: place.nbytes - first]
            _read(self._file, self._data + place.begin + first, view)
            if self._verify:
                checksum = zlib.crc32(view, checksum)
            if out is not None and copied is not None:
                out[first : first + len(view)] = copied[: len(view)]
        if self._verify and place.checksum != f"{checksum:08x}":
            raise ValueError(f"{name} does not match its checksum")


def _read(file: IO[bytes], offset: int, out: memoryview) -> None:
    while out:
        count = os.preadv(file.fileno(), [out], offset)
        if count == 0:
            raise ValueError(f"it ends at byte {offset}")
        offset, out = offset + count, out[count:]


class Fields:
    """A JSON object from a file, whose fields are believed only in the form that is asked for.

    Args:
        values: what should be an object.
        of: what it belongs to, for messages.

    Raises:
        ValueError: no such object; a field that is missing or of another form.
    """

    def __init__(self, values: Any, of: str = "") -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"{of or 'header'}: got {_short(values)}, expected an object")
        self._values = values
        self._of = f"{of}." if of else ""

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise ValueError(f"{self._of}{name}: missing")
        return self._values[name]

    def integer(self, name: str, least: int, most: int | None = None) -> int:
        return _stored_integer(f"{self._of}{name}", self[name], least, most)

    def optional_integer(self, name: str, least: int, most: int | None = None) -> int | None:
        return None if self[name] is None else self.integer(name, least, most)

    def integers(self, name: str, least: int, most: int | None = None) -> list[int]:
        return _stored_integers(f"{self._of}{name}", self[name], least, most)

    def lists(self, name: str, least: int, most: int | None = None) -> list[list[int]]:
        """A list of lists of integers."""
        return [
            _stored_integers(f"{self._of}{name}[{i}]", row, least, most)
            for i, row in enumerate(self.sequence(name))
        ]

    def sequence(self, name: str) -> list[Any]:
        if not isinstance(self[name], list):
            raise ValueError(f"{self._of}{name}: got {_short(self[name])}, expected a list")
        return self[name]

    def choice(self, name: str, known: Collection[str]) -> str:
        value = self[name]
        if not isinstance(value, str) or value not in known:
            raise ValueError(
                f"{self._of}{name}: got {_short(value)}, expected one of {list(known)}"
            )
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        if not isinstance(self[name], dict):
            raise ValueError(f"{self._of}{name}: got {_short(self[name])}, expected an object")
        return self[name]


def _stored_integers(name: str, values: Any, least: int, most: int | None) -> list[int]:
    if not isinstance(values, list):
        raise ValueError(f"{name}: got {_short(values)}, expected a list")
    return [_stored_integer(f"{name}[{i}]", v, least, most) for i, v in enumerate(values)]


def _stored_integer(name: str, value: Any, least: int, most: int | None) -> int:
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"{least} .. {most}"
        raise ValueError(f"{name}: got {_short(value)}, expected {bounds}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
