"""Damaged cache files: each is refused as documented, or holds what was saved.

Files of both caches are damaged in every kind of byte they have, and loaded in every way. *Forged*
files are a kind of their own: a field is changed and the checksum made right again, so that what
refuses them is the comparison of the fields with each other and with the tensors. Of those that
load, all that is asked is that they hold what they say, within bounds.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from torch_flash_mla import MLACache, PagedLatentCache, ops
from torch_flash_mla.integrations.transformers.cache import cache_layer_of

SLOWEST = 1.0  # seconds of the processor that a load may take
LARGEST = 200e6  # bytes of memory that it may take
_DOCUMENT, _CHECKSUM = "torch_flash_mla", "torch_flash_mla.crc32"


@dataclass
class Summary:
    """What a run did, and everything that went wrong in it."""

    seed: int
    files: int = 0
    refused: int = 0
    equal: int = 0  # loaded, with the contents that were saved
    forged: int = 0  # loaded, with contents that somebody has changed on purpose
    slowest: float = 0.0  # seconds of the processor
    largest: int = 0  # bytes of memory
    kinds: Counter[str] = field(default_factory=Counter)  # how many were refused of each
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"files: seed {self.seed}, {self.files} files, {self.refused} refused, {self.equal} "
            f"loaded as saved, {self.forged} loaded as forged, slowest {self.slowest:.3f} s, "
            f"largest {self.largest / 1e6:.0f} MB, {len(self.wrong)} wrong"
        )


class Model(nn.Module):
    """What a cache file knows a model by."""

    def __init__(self) -> None:
        super().__init__()
        types = ["full_attention", "sliding_attention", "linear_attention", "indexed_attention"]
        self.config = PreTrainedConfig(num_hidden_layers=4, layer_types=types, sliding_window=5)
        self.weight = nn.Parameter(torch.ones(2))


@dataclass
class Saved:
    """A file as it was saved."""

    data: bytes
    load: Callable[..., Any]
    contents: dict[str, Any]
    body: int = 0  # where the tensors begin

    def __post_init__(self) -> None:
        self.body = 8 + int.from_bytes(self.data[:8], "little")


def saved_files(folder: Path) -> list[Saved]:
    """Small ones: growing and fixed, float and packed, shared blocks, nothing at all, a model's."""
    model, files = Model(), []

    def add(cache: Any) -> None:
        path = folder / "saved"
        if isinstance(cache, MLACache):
            cache.save(path, model)
            load = lambda path, **options: MLACache.load(path, model, **options)  # noqa: E731
        else:
            cache.save(path)
            load = PagedLatentCache.load
        files.append(Saved(path.read_bytes(), load, contents(load(path))))

    for options in (
        {"dtype": torch.float32, "block_size": 4},
        {"kv_cache_dtype": "q8_kv", "block_size": 8, "max_batch": 3, "max_cache_len": 20},
    ):
        cache = PagedLatentCache(2, 32, 32, **options)
        cache.reserve(1, 9)
        for layer in range(2):
            cache.append(layer, torch.randn(1, 9, 32), torch.randn(1, 9, 32))
        cache.fork(2)
        add(cache)
    add(PagedLatentCache(3, None, None))
    for fixed in (None, 16):
        cache = MLACache(model.config, max_cache_len=fixed, block_size=4)
        for layer in (0, 1, 3):
            keys = torch.randn(2, 1, 7, 6)
            carrier, _ = cache.update(keys[..., :4], keys[..., 4:], layer)
            pages = cache_layer_of(carrier)
            if pages is not None:
                pages.take()  # as an attention that reads them does
        cache.update_indexer(torch.randn(2, 7, 3), 3)
        cache.update_conv_state(torch.randn(2, 3, 4), 2, conv_kernel_size=4)
        cache.update_recurrent_state(torch.randn(2, 3, 3), 2)
        add(cache)
    return files


def contents(cache: Any) -> dict[str, Any]:
    """Everything that a cache holds, rows by sequence, as plain values."""
    found: dict[str, Any] = {}
    paged = cache
    if isinstance(cache, MLACache):
        paged = cache.pages.paged
        found["shared prefix"] = cache._shared_prefix
        for i, layer in enumerate(cache.layers):
            state = dict(sorted(vars(layer).items()))
            if state.pop("pages", None) is not None:
                state.pop("_nan", None)
            found[f"layer {i}"] = _plain(state)
    for name in ("dtype", "kv_cache_dtype", "block_size", "max_batch", "max_cache_len", "batch"):
        found[name] = str(getattr(paged, name))
    found["dims"] = paged.latent_dims, paged.rope_dims
    lengths = paged.cache_seqlens[: paged.batch]
    found["lengths"] = lengths.tolist()
    for layer, (latent, rope) in enumerate(zip(paged.latent_dims, paged.rope_dims, strict=True)):
        if latent and paged.batch:
            rows = ops.gather_cache(
                paged.kv_cache(layer),
                paged.block_table[: paged.batch],
                lengths,
                latent,
                latent + rope,
                torch.float32,
                paged.kv_cache_dtype,
            )
            found[f"rows {layer}"] = _plain(rows)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        flat = value.contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype), list(value.shape), bytes(flat.numpy())
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return repr(value)


# Damage


def _region(file: Saved, draw: random.Random) -> tuple[str, int, int]:
    """A kind of byte, and where it is."""
    document = file.data.index(b"kind", 8)
    end = file.data.index(f'"{_CHECKSUM}"'.encode())
    padding = len(file.data[: file.body].rstrip(b" "))
    regions = [
        ("header length", 0, 8),
        ("document", document, end),
        ("safetensors header", 8, document),
        ("safetensors header", end, padding),
        ("padding", padding, file.body),
        ("tensors", file.body, len(file.data)),
    ]
    return draw.choice([region for region in regions if region[1] < region[2]])


def _flip(file: Saved, draw: random.Random, others: list[Saved]) -> tuple[str, bytes]:
    name, begin, end = _region(file, draw)
    data = bytearray(file.data)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        data[draw.randrange(begin, end)] ^= 1 << draw.randrange(8)
    return f"bits of {name}", bytes(data)


def _overwrite(file: Saved, draw: random.Random, others: list[Saved]) -> tuple[str, bytes]:
    name, begin, end = _region(file, draw)
    first = draw.randrange(begin, end)
    last = min(end, first + draw.choice([1, 4, 8, 64, 512]))
    new = draw.choice([bytes(last - first), b"\xff" * (last - first), draw.randbytes(last - first)])
    return f"bytes of {name}", file.data[:first] + new + file.data[last:]


def _digits(file: Saved, draw: random.Random, others: list[Saved]) -> tuple[str, bytes]:
    """Another number in the headers, of the same length."""
    places = [i for i, byte in enumerate(file.data[: file.body]) if 48 <= byte <= 57]
    data = bytearray(file.data)
    data[draw.choice(places)] = draw.randrange(48, 58)
    return "digits", bytes(data)


def _truncate(file: Saved, draw: random.Random, others: list[Saved]) -> tuple[str, bytes]:
    places = [0, 1, 7, 8, 9, file.body - 1, file.body, len(file.data) - 1]
    return "truncated", file.data[: draw.choice([*places, draw.randrange(len(file.data))])]


def _extend(file: Saved, draw: random.Random, others: list[Saved]) -> tuple[str, bytes]:
    more = draw.choice([bytes(1), bytes(4096), draw.randbytes(64), file.data])
    return "extended", file.data + more


def _swap(file: Saved, draw: random.Random, others: list[Saved]) -> tuple[str, bytes]:
    """Two ranges of a page or so change places, or one is lost or comes twice."""
    size = draw.choice([1, 8, 64, 256])
    a, b = sorted(draw.randrange(len(file.data)) for _ in range(2))
    b = max(b, a + size)
    first, second = file.data[a : a + size], file.data[b : b + size]
    rest = file.data[b + size :]
    middle = file.data[a + size : b]
    ranges = draw.choice([(second, middle, first), (first, middle), (first, first, middle, second)])
    return "swapped, lost or doubled ranges", file.data[:a] + b"".join(ranges) + rest


def _graft(file: Saved, draw: random.Random, others: list[Saved]) -> tuple[str, bytes]:
    other = draw.choice(others)
    return "head of another file", other.data[: other.body] + file.data[file.body :]


def _blank(file: Saved, draw: random.Random, others: list[Saved]) -> tuple[str, bytes]:
    """What a crash leaves where a block was never written."""
    data = bytearray(file.data)
    first = draw.randrange(0, len(data), 512)
    data[first : first + 512] = bytes(len(data[first : first + 512]))
    return "a blank sector", bytes(data)


def _header(file: Saved, draw: random.Random, others: list[Saved]) -> tuple[str, bytes]:
    """The header of safetensors changed as JSON; the document as it was."""
    header = json.loads(file.data[8 : file.body])
    _change(header, draw, 3)
    return "entries of safetensors", _joined(header, file.data[file.body :], draw)


def _forge(file: Saved, draw: random.Random, others: list[Saved]) -> tuple[str, bytes]:
    """The document changed as JSON, and the checksum made right."""
    header = json.loads(file.data[8 : file.body])
    document = json.loads(header["__metadata__"][_DOCUMENT])
    for _ in range(draw.choice([1, 1, 2])):
        _change(document, draw, 5)
    text = json.dumps(document)
    header["__metadata__"] = {
        _DOCUMENT: text, _CHECKSUM: f"{zlib.crc32(text.encode()):08x}"
    }  # fmt: skip
    return "forged", _joined(header, file.data[file.body :], draw)


_HOSTILE: list[Any] = [
    0, 1, 2, 3, -1, 7, 64, 10**6, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, 1.5, 1e300, True, False,
    None, "", "x", "save", "seed", "nn", "float32", "q8_0", "auto", [], [0], [[0]], [-1], {}, [[]],
    {"dtype": "save"}, {"device": "meta"}, {"tensor": "pool.0"}, {"tensor": 3}, {"dict": []},
    {"dict": [[0, {"tensor": "pool.0"}]]}, ["update", {"dtype": "save"}], [1] * 1000, "\ud800",
]  # fmt: skip


def _change(value: Any, draw: random.Random, depth: int) -> None:
    """Changes, drops, doubles or adds one entry somewhere in a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return
    key = draw.choice(keys)
    if depth and isinstance(value[key], (dict, list)) and value[key] and draw.random() < 0.8:
        _change(value[key], draw, depth - 1)
        return
    how = draw.randrange(6)
    if how == 0:
        del value[key]
    elif how == 1 and isinstance(value, list):
        value.insert(draw.randrange(len(value) + 1), draw.choice(value))
    elif how == 2 and isinstance(value[key], int):
        value[key] += draw.choice([-8, -1, 1, 8, 10**6, 2**40])
    elif how == 3 and isinstance(value, dict):
        value[draw.choice([str(key), "more", "pool.0"])] = draw.choice(_HOSTILE)
    else:
        value[key] = draw.choice([*_HOSTILE, value[draw.choice(keys)]])


def _joined(header: dict[str, Any], tensors: bytes, draw: random.Random) -> bytes:
    text = json.dumps(header).encode()
    if draw.random() < 0.02:
        text = b'{"a":' + b"[" * 100_000 + text
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + tensors


DAMAGES = (
    _flip, _flip, _flip, _overwrite, _overwrite, _digits, _truncate, _extend, _swap, _graft, _blank,
    _header, _forge, _forge, _forge,
)  # fmt: skip


# Loading


def _peak() -> int:
    """Most memory of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _judge(
    file: Saved, kind: str, data: bytes, path: Path, options: dict[str, bool], summary: Summary
) -> None:
    """Loads one damaged file.

    Raises:
        AssertionError: it was not treated as documented.
    """
    path.write_bytes(data)
    _forget_peak()
    before, start = _peak(), time.process_time()
    cache = None
    try:
        cache = file.load(path, **options)
    except (ValueError, OSError) as error:
        summary.refused += 1
        summary.kinds[kind] += 1
        assert str(error).startswith(str(path)), f"a message without the file: {error}"
    except (RuntimeError, MemoryError) as error:
        summary.refused += 1
        assert kind == "forged" and "allocate" in str(error), f"{type(error).__name__}: {error}"
    seconds, memory = time.process_time() - start, _peak() - before
    summary.slowest = max(summary.slowest, seconds)
    summary.largest = max(summary.largest, memory)
    assert seconds < SLOWEST, f"took {seconds:.2f} s"
    assert memory < LARGEST, f"took {memory / 1e6:.0f} MB"
    if cache is not None:
        if contents(cache) == file.contents:
            summary.equal += 1
        else:
            assert kind == "forged", "loaded other contents"
            summary.forged += 1


def run(seed: int, count: int) -> Summary:
    """Damages and loads ``count`` files. What goes wrong is described in the summary."""
    summary = Summary(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    draw = random.Random(seed)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            files = saved_files(Path(folder))
            for number in range(count):
                file = draw.choice(files)
                kind, data = draw.choice(DAMAGES)(file, draw, files)
                # Without checksums of the tensors, only damage elsewhere can be noticed.
                whole = len(data) < len(file.data) or data.endswith(file.data[file.body :])
                options = {"mmap": draw.random() < 0.5, "verify": not whole or draw.random() < 0.5}
                summary.files += 1
                try:
                    _judge(file, kind, data, Path(folder) / "damaged", options, summary)
                except Exception as error:
                    where = f"file {number}, {kind}, {options}"
                    summary.wrong.append(f"{where}: {type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(threads)
    return summary
