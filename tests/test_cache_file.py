"""Caches on disk: what comes back, what the file costs, and what is refused."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers_cases import families, small_model

from torch_flash_mla import PagedLatentCache
from torch_flash_mla.formats import PACKED_FORMATS
from torch_flash_mla.integrations.transformers import MLACache, patch
from torch_flash_mla.integrations.transformers.fingerprint import difference, fingerprint

ROOT = str(Path(__file__).parents[1])
FAMILY = "deepseek_v3"
FAMILIES = (FAMILY, "kimi_linear", "dots3_note", "hy_v4", "mistral_large4", "glm5_next")
FAMILIES = tuple(family for family in FAMILIES if family in families())


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A patched model that tests do not change."""
    model = small_model(FAMILY)
    patch(model)
    return model


def tokens(count: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (batch, count), generator=torch.Generator().manual_seed(seed))


def run(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def filled(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> MLACache:
    cache = MLACache(model.config, **arguments)
    run(model, ids, cache)
    return cache


def parts(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """A cache file's header of safetensors, document and tensors."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["torch_flash_mla"]), data[8 + length :]


def joined(header: dict[str, Any], document: dict[str, Any], tensors: bytes) -> bytes:
    """The file again, with the right checksum of the document."""
    text = json.dumps(document)
    header["__metadata__"]["torch_flash_mla"] = text
    header["__metadata__"]["torch_flash_mla.crc32"] = f"{zlib.crc32(text.encode()):08x}"
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + tensors


def changed(path: Path, **changes: Any) -> None:
    """Changes fields of a document, for a reader that does not trust what has a right checksum."""
    header, document, tensors = parts(path.read_bytes())
    path.write_bytes(joined(header, document | changes, tensors))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Fields of a PagedLatentCache in a file.
DOCUMENT = (
    "block_size", "block_table", "dtype", "kind", "kv_cache_dtype", "latent_dims", "lengths",
    "max_batch", "max_cache_len", "num_blocks", "rope_dims", "tensors", "version",
)  # fmt: skip


class TestPages:
    """PagedLatentCache; its state machine goes through files too (test_cache.py)."""

    def filled(self, length: int = 21, batch: int = 2, **options: Any) -> PagedLatentCache:
        cache = PagedLatentCache(2, 64, 32, block_size=8, max_batch=batch, **options)
        self.extend(cache, length, batch)
        return cache

    def extend(self, cache: PagedLatentCache, length: int, batch: int) -> None:
        cache.reserve(batch, length)
        for layer in range(2):
            cache.append(layer, torch.randn(batch, length, 64), torch.randn(batch, length, 32))

    def rows(self, cache: PagedLatentCache, layer: int) -> Tensor:
        """The stored bytes of every sequence, in order."""
        pool = cache.kv_cache(layer)
        pool = pool.view(torch.uint8).reshape(-1, pool.shape[-1] * pool.itemsize)
        rows = []
        for row, length in enumerate(cache.cache_seqlens[: cache.batch].tolist()):
            position = torch.arange(length)
            slots = cache.block_table[row][position // 8] * 8 + position % 8
            rows.append(pool[slots.long()])
        return torch.cat(rows)

    @pytest.mark.parametrize("mmap", [True, False])
    @pytest.mark.parametrize("fixed", [False, True])
    @pytest.mark.parametrize("kv_cache_dtype", ["auto", *PACKED_FORMATS])
    def test_the_file_never_changes(
        self, tmp_path: Path, kv_cache_dtype: str, fixed: bool, mmap: bool
    ) -> None:
        """Loaded pages can be written to in every way; the next load sees none of it."""
        path = tmp_path / "cache"
        size = {"max_cache_len": 64} if fixed else {}
        cache = self.filled(kv_cache_dtype=kv_cache_dtype, **size)
        cache.save(path)
        before = digest(path)
        for _ in range(2):
            loaded = PagedLatentCache.load(path, mmap=mmap)
            assert loaded.max_cache_len == cache.max_cache_len
            for layer in range(2):
                assert torch.equal(self.rows(loaded, layer), self.rows(cache, layer))
            loaded.truncate(19)
            self.extend(loaded, 1, 2)  # into a block of the file
            assert not torch.equal(self.rows(loaded, 0), self.rows(cache, 0)[:40])
            self.extend(loaded, 30, 2)
            loaded.kv_cache(0).view(torch.uint8).zero_()
            loaded.reorder([1, 1])
            assert digest(path) == before

    def test_mapped_pools_are_copied_when_they_grow(self, tmp_path: Path) -> None:
        cache = self.filled()
        cache.save(tmp_path / "cache")

        def mapped() -> bool:
            return str(tmp_path / "cache") in Path("/proc/self/maps").read_text()

        loaded = PagedLatentCache.load(tmp_path / "cache", mmap=True)
        self.extend(loaded, 3, 2)  # the last blocks have room
        assert mapped()
        self.extend(loaded, 1, 2)
        assert not mapped()
        loaded = PagedLatentCache.load(tmp_path / "cache")
        assert not mapped()
        address = loaded.kv_cache(0).data_ptr()
        self.extend(loaded, 8, 2)  # there is room for more blocks
        assert loaded.kv_cache(0).data_ptr() == address

    def test_shared_blocks_are_stored_once(self, tmp_path: Path) -> None:
        path = tmp_path / "cache"
        cache = self.filled(804, batch=1)
        cache.fork(8)
        self.extend(cache, 3, 8)
        cache.save(path)
        assert path.stat().st_size < 1.1 * 808 * cache.bytes_per_token + 4096
        loaded = PagedLatentCache.load(path)
        assert loaded.num_used_blocks == cache.num_used_blocks == 100 + 8
        assert loaded.allocator.references.count(8) == 100
        assert torch.equal(self.rows(loaded, 1), self.rows(cache, 1))
        loaded.free(0)  # the others keep the prompt
        assert torch.equal(self.rows(loaded, 1), self.rows(cache, 1)[807:])

    def test_free_blocks_and_old_memory_are_left_out(self, tmp_path: Path) -> None:
        cache = self.filled(400)
        for layer in range(2):
            cache.kv_cache(layer)[cache.block_table[:2, 2]] = 77.0  # behind the truncated end
        cache.truncate(20)
        cache.save(tmp_path / "cache")
        stored = safetensors.torch.load_file(tmp_path / "cache")
        assert stored["pool.0"].shape == (6, 8, 96)
        rest = stored["pool.0"][(stored["pool.0"] == 77.0).all(-1)]
        assert len(rest) == 2 * 4  # tokens 16 .. 19 of both

    def test_an_empty_cache_and_layers_without_dims(self, tmp_path: Path) -> None:
        PagedLatentCache(3, None, None).save(tmp_path / "cache")
        loaded = PagedLatentCache.load(tmp_path / "cache")
        assert (loaded.batch, loaded.num_layers, loaded.latent_dims) == (0, 3, [0, 0, 0])
        for mmap in (True, False):
            for limit in ({}, {"max_cache_len": 20}):
                PagedLatentCache(2, 64, 32, block_size=8, max_batch=2, **limit).save(
                    tmp_path / "cache"
                )
                loaded = PagedLatentCache.load(tmp_path / "cache", mmap=mmap)
                assert (loaded.batch, loaded.latent_dims) == (0, [64, 64])
                self.extend(loaded, 9, 2)

    def test_files_that_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "cache"
        load: Callable[[], Any] = lambda: PagedLatentCache.load(path)  # noqa: E731
        with pytest.raises(FileNotFoundError, match="cache"):
            load()
        path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"cache: not a safetensors file"):
            load()
        path.write_bytes(b"text, not tensors" * 100)
        with pytest.raises(ValueError, match="not a safetensors file"):
            load()
        self.filled().save(path)
        whole = path.read_bytes()
        for length in (4, 100):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match="not a safetensors file, or a damaged one"):
                load()
        for data in (whole[:1000], whole[:-1], whole[:-1000], whole + b"x"):
            path.write_bytes(data)
            with pytest.raises(ValueError, match=r"cache: damaged cache file \("):
                load()
        safetensors.torch.save_file({"pool.0": torch.ones(2)}, path)
        with pytest.raises(ValueError, match="no cache of torch_flash_mla"):
            load()
        path.unlink()
        os.mkfifo(path)  # must not wait for a writer
        with pytest.raises(ValueError, match="not a file"):
            load()
        with pytest.raises(IsADirectoryError):
            PagedLatentCache.load(tmp_path)

    def test_a_safetensors_file(self, tmp_path: Path) -> None:
        """Readers of safetensors find the pools."""
        cache = self.filled()
        cache.save(tmp_path / "cache")
        stored = safetensors.torch.load_file(tmp_path / "cache")
        assert list(stored) == ["pool.0", "pool.1"]
        assert torch.equal(stored["pool.0"].view(-1, 96)[:21], cache.kv_cache(0).view(-1, 96)[:21])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"version": 1}, "cache file of version 1, expected 2"),
            ({"version": 3}, "cache file of version 3, expected 2"),
            ({"kind": "MLACache"}, r"holds a MLACache, expected a PagedLatentCache"),
            ({"lengths": [21]}, "block_table: 2 rows for 1"),
            ({"lengths": [21, 99]}, "row 1 has 3 blocks for 99"),
            ({"lengths": [21, "x"]}, r"lengths\[1\]: got 'x', expected 0 .. "),
            ({"lengths": [21, 21.0]}, r"lengths\[1\]: got 21.0, expected 0 .. "),
            ({"lengths": None}, "lengths: got None, expected a list"),
            ({"block_table": [[0, 1, 2], [3, 4, 6]]}, "got 6, expected 0 .. 5"),
            ({"block_table": [[0, 1, 2], [3, 4, -1]]}, "got -1, expected 0 .. 5"),
            ({"block_table": [[0, 1, 2], [3, 4, True]]}, "got True, expected 0 .. 5"),
            ({"block_table": [[0, 1, 2], [3, 4, 2]]}, "partly filled and shared"),
            ({"num_blocks": 10**12}, "num_blocks: got 1000000000000"),
            ({"num_blocks": 10**6}, "block_table: a block is unused"),
            ({"num_blocks": 5}, "got 5, expected 0 .. 4"),
            ({"block_size": 16}, "row 0 has 3 blocks for 21"),
            ({"block_size": 0}, "block_size: got 0"),
            ({"latent_dims": [64, 32]}, r"pool.1: got .* \[6, 8, 96\], expected .* \[6, 8, 64\]"),
            ({"latent_dims": [64, 64, 64], "rope_dims": [32] * 3}, "no tensor 'pool.2'"),
            ({"latent_dims": [64, 0], "rope_dims": [32] * 2}, "of a layer without latent_dims"),
            ({"latent_dims": [64] * 3}, "rope_dims: 2 of them for 3 layers"),
            ({"latent_dims": [2**62, 64]}, r"latent_dims\[0\]: got 4611686018427387904"),
            ({"dtype": "float16"}, "pool.0: got torch.bfloat16"),
            ({"dtype": "nn"}, "dtype: got 'nn'"),
            ({"dtype": ["bfloat16"]}, "dtype: got ..bfloat16"),
            ({"kv_cache_dtype": "q9"}, "kv_cache_dtype: got 'q9'"),
            ({"max_cache_len": 16}, r"lengths\[0\]: got 21, expected 0 .. 16"),
            ({"max_cache_len": 10**9}, "max_cache_len: 250000000 blocks wanted by a file of 6"),
            ({"max_cache_len": 2**64}, "max_cache_len: got 18446744073709551616"),
            ({"max_batch": 1}, "block_table: 2 rows for 2 lengths, of 1"),
            ({"max_batch": 2**64}, "max_batch: got 18446744073709551616"),
            ({"tensors": {}}, "tensors: 'pool.0', 'pool.1' is not in both headers"),
            ({"tensors": []}, r"tensors: got \[\], expected an object"),
        ],
        ids=lambda x: next(iter(x.items()))[0] if isinstance(x, dict) else "",
    )
    def test_headers_that_are_refused(
        self, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        """At once, and before memory is taken for anything."""
        path = tmp_path / "cache"
        self.filled().save(path)
        changed(path, **changes)
        start = time.monotonic()
        with pytest.raises(ValueError, match=message) as error:
            PagedLatentCache.load(path)
        assert time.monotonic() - start < 1
        assert str(error.value).startswith(str(path))

    @pytest.mark.parametrize("field", list(DOCUMENT))
    def test_every_field_is_looked_at(self, tmp_path: Path, field: str) -> None:
        path = tmp_path / "cache"
        self.filled().save(path)
        header, document, tensors = parts(path.read_bytes())
        assert set(document) == set(DOCUMENT)
        hostile: list[Any] = [-1, 2**64, 1.5, "x", True, {}, [[]], [None], None]
        for value in hostile:
            if value == document[field]:
                continue
            path.write_bytes(joined(header, document | {field: value}, tensors))
            with pytest.raises(ValueError, match="cache: "):
                PagedLatentCache.load(path)
        del document[field]
        path.write_bytes(joined(header, document, tensors))
        with pytest.raises(ValueError, match="damaged cache file"):
            PagedLatentCache.load(path)

    @pytest.mark.parametrize("mmap", [True, False])
    def test_fewer_blocks_than_declared(self, tmp_path: Path, mmap: bool) -> None:
        """Nothing of what the memory held before is taken for contents."""
        path = tmp_path / "cache"
        self.filled().save(path)
        header, document, tensors = parts(path.read_bytes())
        size = len(tensors) // 2 // 6
        header["pool.1"] |= {"shape": [5, 8, 96], "data_offsets": [6 * size, 11 * size]}
        document["tensors"]["pool.1"][1] = [5, 8, 96]
        path.write_bytes(joined(header, document, tensors[:-size]))
        with pytest.raises(ValueError, match=r"pool.1: got .* \[5, 8, 96\], expected .* \[6, 8"):
            PagedLatentCache.load(path, mmap=mmap, verify=False)

    def test_tensors_that_are_elsewhere(self, tmp_path: Path) -> None:
        """Swapped, overlapping, misaligned, of another shape or dtype in one of the two headers."""
        path = tmp_path / "cache"
        self.filled().save(path)
        header, document, tensors = parts(path.read_bytes())
        first, second = header["pool.0"]["data_offsets"], header["pool.1"]["data_offsets"]
        for entry in (
            {"data_offsets": second},
            {"data_offsets": [first[0] + 1, first[1] + 1]},
            {"data_offsets": [-2, first[1]]},
            {"data_offsets": [first[1], first[0]]},
            {"data_offsets": [first[0]]},
            {"data_offsets": None},
            {"dtype": "F16"},
            {"shape": [8, 6, 96]},
            {"shape": [6 * 8 * 96]},
        ):
            changed = {**header, "pool.0": header["pool.0"] | entry}
            path.write_bytes(joined(changed, document, tensors))
            with pytest.raises(ValueError, match=r"pool\.0: got .*, expected .*data_offsets"):
                PagedLatentCache.load(path, verify=False)
        for description in (["BF16", [6, 8, 96]], None, [None] * 3, ["X", [6, 8, 96], "0" * 8]):
            changed = document | {"tensors": document["tensors"] | {"pool.0": description}}
            path.write_bytes(joined(header, changed, tensors))
            with pytest.raises(ValueError, match="damaged cache file"):
                PagedLatentCache.load(path, verify=False)

    @pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
    def test_a_flipped_bit_is_refused_by_name(self, tmp_path: Path, mmap: bool) -> None:
        """In every tensor, and everywhere in the header."""
        path = tmp_path / "cache"
        cache = self.filled()
        cache.save(path)
        whole = path.read_bytes()
        begin = len(whole) - 2 * 6 * 8 * 96 * 2
        for position in (begin, begin + 6 * 8 * 96 * 2 - 1, len(whole) - 1):
            name = f"pool.{int(position >= begin + 6 * 8 * 96 * 2)}"
            data = bytearray(whole)
            data[position] ^= 4
            path.write_bytes(data)
            with pytest.raises(ValueError, match=f"{name} does not match its checksum") as error:
                PagedLatentCache.load(path, mmap=mmap)
            assert str(error.value).startswith(str(path))
            unseen = PagedLatentCache.load(path, mmap=mmap, verify=False)  # as its docs say
            assert not torch.equal(unseen.kv_cache(0), cache.kv_cache(0)[:6]) or name == "pool.1"
        for position in range(begin):
            data = bytearray(whole)
            data[position] ^= 1 << position % 8
            path.write_bytes(data)
            try:
                loaded = PagedLatentCache.load(path, mmap=mmap, verify=False)
            except ValueError as error:
                assert str(error).startswith(str(path))
            else:  # of a space, for instance
                assert torch.equal(self.rows(loaded, 0), self.rows(cache, 0))
                assert torch.equal(self.rows(loaded, 1), self.rows(cache, 1))

    def test_a_file_that_is_truncated_after_loading(self, tmp_path: Path) -> None:
        """What was read stays; a process that maps it is killed by the system, as documented."""
        path = tmp_path / "cache"
        cache = self.filled(2000)
        cache.save(path)
        whole = path.read_bytes()
        loaded = PagedLatentCache.load(path)
        os.truncate(path, 4096)
        assert torch.equal(self.rows(loaded, 1), self.rows(cache, 1))
        for mmap in (False, True):  # and one that is truncated already is an error
            with pytest.raises(ValueError, match="damaged cache file"):
                PagedLatentCache.load(path, mmap=mmap, verify=False)
        path.write_bytes(whole)
        program = f"""if True:
            import os
            from torch_flash_mla import PagedLatentCache
            cache = PagedLatentCache.load({str(path)!r}, mmap=True)
            os.truncate({str(path)!r}, 4096)
            cache.kv_cache(1).sum()
        """
        done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
        assert done.returncode == -signal.SIGBUS

    def test_a_mapped_file_may_be_replaced_or_deleted(self, tmp_path: Path) -> None:
        path = tmp_path / "cache"
        cache = self.filled(2000)
        cache.save(path)
        loaded = PagedLatentCache.load(path, mmap=True)
        self.filled(3).save(path)
        assert torch.equal(self.rows(loaded, 1), self.rows(cache, 1))
        path.unlink()
        assert torch.equal(self.rows(loaded, 0), self.rows(cache, 0))


class TestSaving:
    """What a save leaves behind, whatever happens to it."""

    def cache(self, tokens: int = 2000) -> PagedLatentCache:
        cache = PagedLatentCache(1, 64, 0, dtype=torch.float32, block_size=8)
        cache.reserve(1, tokens)
        cache.append(0, torch.randn(1, tokens, 64), torch.empty(1, tokens, 0))
        return cache

    def refused(self, folder: Path, kind: type[OSError], number: int) -> None:
        """A save over an old file fails with one of Python's own errors and changes nothing."""
        path = folder / "cache"
        before = digest(path)
        with pytest.raises(kind) as error:
            self.cache().save(path)
        assert error.value.errno == number
        assert digest(path) == before
        assert [*folder.iterdir()] == [path]

    def test_a_limit_of_file_size(self, tmp_path: Path) -> None:
        self.cache(9).save(tmp_path / "cache")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            self.refused(tmp_path, OSError, errno.EFBIG)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_a_full_disk(self, tmp_path: Path) -> None:
        """A file system of 256 KiB, mounted where nobody else sees it."""
        isolated = ["unshare", "--user", "--map-root-user", "--mount"]
        mount = f"mount -t tmpfs -o size=256k none {tmp_path}"
        if subprocess.run([*isolated, "sh", "-c", mount], capture_output=True).returncode:
            pytest.skip("no right to mount a file system")
        program = f"""if True:
            import os, torch
            from torch_flash_mla import PagedLatentCache
            os.chdir({str(tmp_path)!r})
            cache = PagedLatentCache(1, 64, 0, dtype=torch.float32)
            cache.reserve(1, 9)
            cache.append(0, torch.randn(1, 9, 64), torch.empty(1, 9, 0))
            cache.save("cache")
            before = open("cache", "rb").read()
            cache.reserve(1, 2000)
            try:
                cache.save("cache")
            except OSError as error:
                print(os.strerror(error.errno), os.listdir(), before == open("cache", "rb").read())
        """
        command = f"{mount} && exec {sys.executable} -c '{program.replace(chr(39), chr(34))}'"
        done = subprocess.run(
            [*isolated, "sh", "-c", command],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": ROOT},
        )
        assert done.stdout == "No space left on device ['cache'] True\n", done.stderr

    def test_errors_are_those_of_the_system(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="missing/cache"):
            self.cache(9).save(tmp_path / "missing" / "cache")
        (tmp_path / "folder").mkdir()
        with pytest.raises(IsADirectoryError):
            self.cache(9).save(tmp_path / "folder")
        (tmp_path / "file").write_text("")
        with pytest.raises(NotADirectoryError, match="file/cache"):
            self.cache(9).save(tmp_path / "file" / "cache")
        assert sorted(x.name for x in tmp_path.iterdir()) == ["file", "folder"]

    def test_an_interrupt(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache(9).save(tmp_path / "cache")
        before = digest(tmp_path / "cache")

        def interrupted(descriptor: int) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            self.cache().save(tmp_path / "cache")
        assert digest(tmp_path / "cache") == before
        assert len([*tmp_path.iterdir()]) == 1

    @pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
    def test_permissions_obey_the_umask(self, tmp_path: Path, umask: int) -> None:
        former = os.umask(umask)
        try:
            self.cache(9).save(tmp_path / "cache")
        finally:
            os.umask(former)
        assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o666 & ~umask

    def test_many_savers_and_readers_of_one_name(self, tmp_path: Path) -> None:
        """Every reader finds one whole file, whoever wrote it."""
        path = tmp_path / "cache"
        caches = [self.cache(tokens) for tokens in (100, 101, 102)]
        expected = [cache.kv_cache(0).view(-1, 64)[: 100 + i] for i, cache in enumerate(caches)]
        caches[0].save(path)
        errors: list[BaseException] = []
        loads = 0

        def repeat(work: Callable[[], None], times: int) -> None:
            try:
                for _ in range(times):
                    work()
            except BaseException as error:
                errors.append(error)

        def read() -> None:
            nonlocal loads
            loaded = PagedLatentCache.load(path, mmap=loads % 2 == 0)
            tokens = int(loaded.cache_seqlens[0])
            rows = loaded.kv_cache(0).view(-1, 64)[:tokens]
            assert torch.equal(rows, expected[tokens - 100])
            loads += 1

        threads = [threading.Thread(target=repeat, args=(read, 200))]
        threads += [
            threading.Thread(target=repeat, args=(lambda cache=cache: cache.save(path), 60))
            for cache in caches
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert loads == 200
        assert [*tmp_path.iterdir()] == [path]

    def test_appending_meanwhile(self, tmp_path: Path) -> None:
        """A file has the tokens of before, and no half-written ones fail its checksums."""
        cache = self.cache(500)
        expected = cache.kv_cache(0).view(-1, 64)[:500].clone()
        done = threading.Event()

        def append() -> None:
            while not done.is_set():
                cache.reserve(1, 3)
                cache.append(0, torch.randn(1, 3, 64), torch.empty(1, 3, 0))

        thread = threading.Thread(target=append)
        thread.start()
        try:
            for _ in range(30):
                cache.save(tmp_path / "cache")
                loaded = PagedLatentCache.load(tmp_path / "cache")
                assert loaded.cache_seqlens[0] >= 500
                assert torch.equal(loaded.kv_cache(0).view(-1, 64)[:500], expected)
        finally:
            done.set()
            thread.join()


class TestModels:
    @pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
    @pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_continues_as_the_cache_that_was_saved(
        self, family: str, fixed: bool, mmap: bool, tmp_path: Path
    ) -> None:
        """Equal logits for every later token; layers that are no pages come back too."""
        model = small_model(family)
        patch(model)
        size: dict[str, Any] = {"max_cache_len": 64} if fixed else {}
        cache = filled(model, tokens(21, batch=2), **size, block_size=8)
        path = tmp_path / "prompt.mla"
        cache.save(path, model)
        before = digest(path)
        loaded = MLACache.load(path, model, mmap=mmap)
        assert loaded.get_seq_length() == 21
        assert loaded.is_compileable == cache.is_compileable
        for step in (1, 1, 3, 9):
            new = tokens(step, batch=2, seed=step)
            assert torch.equal(run(model, new, loaded), run(model, new, cache))
        assert digest(path) == before

    @pytest.mark.parametrize("kv_cache_dtype", ["auto", "q8_kv", "q4_kv"])
    def test_forked_cropped_and_saved_again(
        self, model: PreTrainedModel, kv_cache_dtype: str, tmp_path: Path
    ) -> None:
        cache = filled(model, tokens(140), kv_cache_dtype=kv_cache_dtype)
        cache.save(tmp_path / "a", model)
        loaded = MLACache.load(tmp_path / "a", model)
        caches = [cache, loaded]
        for each in caches:
            each.fork(3)
            run(model, tokens(4, batch=3), each)
            each.crop(-2)
        loaded.save(tmp_path / "a", model)  # replaces the file that is mapped
        caches.append(MLACache.load(tmp_path / "a", model))
        new = tokens(3, batch=3, seed=1)
        expected = run(model, new, cache)
        for each in caches[1:]:
            assert torch.equal(run(model, new, each), expected)
        assert caches[2].pages.paged.num_used_blocks == cache.pages.paged.num_used_blocks

    def test_in_a_fresh_process(self, model: PreTrainedModel, tmp_path: Path) -> None:
        """generate() from the file, with the model read from disk there."""
        model.save_pretrained(tmp_path / "model")
        ids = tokens(100)
        filled(model, ids[:, :90]).save(tmp_path / "prompt.mla", model)
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        program = f"""if True:
            import torch
            from transformers import AutoModelForCausalLM
            from torch_flash_mla.integrations.transformers import MLACache, patch
            torch.set_num_threads(1)
            model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r})
            patch(model)
            cache = MLACache.load({str(tmp_path / "prompt.mla")!r}, model)
            sizes = []
            model.get_input_embeddings().register_forward_pre_hook(
                lambda module, inputs: sizes.append(inputs[0].numel())
            )
            ids = torch.tensor({ids.tolist()})
            out = model.generate(
                ids, past_key_values=cache, max_new_tokens=12, do_sample=False, pad_token_id=0
            )
            print(out.tolist(), sizes[0], sep=";")
        """
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            capture_output=True,
            text=True,
            check=True,
        )
        text, computed = done.stdout.strip().splitlines()[-1].split(";")
        assert json.loads(text) == expected.tolist()
        assert computed == "10"

    def test_other_models_are_refused(self, model: PreTrainedModel, tmp_path: Path) -> None:
        path = tmp_path / "prompt.mla"
        filled(model, tokens(9)).save(path, model)

        def refused(other: Any, message: str) -> None:
            with pytest.raises(ValueError, match="a cache of another model: .*" + message) as error:
                MLACache.load(path, other)
            assert str(error.value).startswith(str(path))

        MLACache.load(path, copy.deepcopy(model))
        refused(small_model(FAMILY, seed=1), "same config, but other weights")
        refused(small_model("deepseek_v2"), "by a DeepseekV3ForCausalLM, this is a DeepseekV2")
        refused(small_model(FAMILY, rms_norm_eps=1e-3), "rms_norm_eps: 1e-06, here 0.001")
        refused(copy.deepcopy(model).to(torch.bfloat16), "other weights, dtypes or adapters")
        for name in ("embed_tokens.weight", "layers.1.self_attn.kv_a_proj_with_mqa.weight"):
            other = copy.deepcopy(model)
            with torch.no_grad():
                other.get_parameter(f"model.{name}").mul_(1.01)
            refused(other, "other weights")

    @pytest.mark.parametrize(
        ("attribute", "value"),
        [
            ("update", {"dtype": "save"}),  # a method, and what torch has under that name
            ("get_seq_length", {"dtype": "seed"}),
            ("__class__", 1),
            ("pages", None),
            ("index", 1),
            ("_nan", {"tensor": "pool.0"}),
            ("keys", {"tensor": "pool.0"}),
            ("indexer_keys", {"tensor": "pool.0"}),
            ("max_cache_len", 8),
            ("dtype", {"dtype": "seed"}),
            ("dtype", {"dtype": "int8"}),
            ("dtype", {"dtype": ["float32"]}),
            ("dtype", "float32"),
            ("device", {"device": "meta"}),
            ("device", {"device": "cpu", "dtype": "float32"}),
            ("is_initialized", 1),
            ("is_initialized", None),
            ("cumulative_length", -1),
            ("cumulative_length", 2**40),
            ("cumulative_length", 1.0),
            ("batch_size", 7),
            ("batch_size", True),
            ("conv_states", {"dict": [[0, None]]}),
            ("history", 3),
            (3, 3),
        ],
    )
    def test_attributes_that_no_file_sets(
        self, model: PreTrainedModel, tmp_path: Path, attribute: Any, value: Any
    ) -> None:
        path = tmp_path / "prompt.mla"
        filled(model, tokens(9)).save(path, model)
        header, document, stored = parts(path.read_bytes())
        state = document["states"][0]["values"]["dict"]
        state[:] = [pair for pair in state if pair[0] != attribute] + [[attribute, value]]
        path.write_bytes(joined(header, document, stored))
        seed = torch.initial_seed()
        with pytest.raises(ValueError, match=rf"layer\.0\.{attribute}: ") as error:
            MLACache.load(path, model)
        assert str(error.value).startswith(f"{path}: damaged cache file")
        assert torch.initial_seed() == seed

    def test_states_that_do_not_fit_the_layer(self, tmp_path: Path) -> None:
        """Of layers that stayed stock: other classes, states, sizes, and tensors of others."""
        if "kimi_linear" not in FAMILIES:
            pytest.skip("no such model in this transformers")
        model, path = small_model("kimi_linear"), tmp_path / "prompt.mla"
        patch(model)
        filled(model, tokens(9, batch=2)).save(path, model)
        header, document, stored = parts(path.read_bytes())
        linear = [x["class"] for x in document["states"]].index("LinearAttentionLayer")
        name = f"layer.{linear}.conv_states.0"
        text = json.dumps(document["states"])
        own, other = json.dumps({"tensor": name}), json.dumps({"tensor": "pool.0"})
        for former, new, message in (
            (own, other, "not a value that a file may set"),
            (f"[[0, {own}]]", f"[[1, {own}]]", r"expected the states \[0\]"),
            (f"[[0, {own}]]", f"[[0, {own}], [1, {own}]]", r"expected the states \[0\]"),
            (f"[[0, {own}]]", "[]", r"expected the states \[0\]"),
            (f'{{"dict": [[0, {own}]]}}', own, "not a value that a file may set"),
            ('"class": "LinearAttentionLayer"', '"class": "DynamicLayer"', "class: got 'Dyn"),
        ):
            assert former in text
            changed = document | {"states": json.loads(text.replace(former, new))}
            path.write_bytes(joined(header, changed, stored))
            with pytest.raises(ValueError, match=message):
                MLACache.load(path, model)
        shape = header[name]["shape"]
        header[name]["shape"] = document["tensors"][name][1] = [1, 2 * shape[1], *shape[2:]]
        path.write_bytes(joined(header, document, stored))
        with pytest.raises(ValueError, match=rf"{name}: got shape .*expected 2 sequences"):
            MLACache.load(path, model)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"layers": [0]}, "pools of 2 of 1 layers"),
            ({"layers": [0, 7]}, r"layers\[1\]: got 7"),
            ({"layers": None}, "layers: got None"),
            ({"states": []}, "states: of 0 of 2 layers"),
            ({"states": [None, None]}, "layer.0: got None"),
            ({"shared_prefix": [3, 4]}, "shared_prefix: 3 copies in a batch of 2"),
            ({"shared_prefix": [0, 4]}, "shared_prefix: 0 copies"),
            ({"shared_prefix": [1.0, 4]}, r"shared_prefix\[0\]: got 1.0"),
            ({"shared_prefix": 3}, "shared_prefix: got 3"),
            ({"pages": None}, "pages: got None"),
            ({"pages": {}}, "dtype: missing"),
            ({"model": None}, "model: got None"),
            ({"model": {}}, "KeyError: 'class'"),
        ],
        ids=lambda x: next(iter(x.items()))[0] if isinstance(x, dict) else "",
    )
    def test_headers_that_are_refused(
        self, model: PreTrainedModel, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        path = tmp_path / "prompt.mla"
        filled(model, tokens(9, batch=2)).save(path, model)
        changed(path, **changes)
        with pytest.raises(ValueError, match=message) as error:
            MLACache.load(path, model)
        assert str(error.value).startswith(str(path))

    def test_a_flipped_bit_is_refused_by_name(self, tmp_path: Path) -> None:
        """In layers that stayed stock too."""
        model, path = small_model(FAMILIES[1]), tmp_path / "prompt.mla"
        patch(model)
        filled(model, tokens(9, batch=2)).save(path, model)
        whole = path.read_bytes()
        header, _, stored = parts(whole)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            data = bytearray(whole)
            data[len(whole) - len(stored) + entry["data_offsets"][0]] ^= 1
            path.write_bytes(data)
            for mmap in (False, True):
                with pytest.raises(ValueError, match=f"{name} does not match its checksum"):
                    MLACache.load(path, model, mmap=mmap)

    def test_adapters_count(self, model: PreTrainedModel) -> None:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["o_proj"])
        tuned = peft.get_peft_model(copy.deepcopy(model), config).eval()
        before = fingerprint(tuned)
        assert difference(fingerprint(model), before)
        with tuned.disable_adapter():
            assert difference(fingerprint(tuned), before)
        assert difference(fingerprint(tuned), before) is None
        nn.init.normal_(next(p for name, p in tuned.named_parameters() if "lora_B" in name))
        assert difference(fingerprint(tuned), before)

    def test_fields_that_do_not_matter(self, model: PreTrainedModel) -> None:
        before = fingerprint(model)
        other = copy.deepcopy(model)
        other.config.use_cache = False
        other.config.eos_token_id = 7
        other.config.field_of_a_later_release = 1
        assert difference(before, fingerprint(other)) is None
        compiled = torch.compile(other)
        assert difference(before, fingerprint(compiled)) is None

    def test_what_cannot_be_saved(self, model: PreTrainedModel, tmp_path: Path) -> None:
        path = tmp_path / "prompt.mla"
        with pytest.raises(ValueError, match="save of an empty cache"):
            MLACache(model.config).save(path, model)
        hybrid = small_model("kimi_linear")
        patch(hybrid)
        cache = filled(hybrid, tokens(9))
        cache.layers[0].history = [torch.ones(1)]
        with pytest.raises(ValueError, match=r"layer.0: a LinearAttentionLayer cannot be stored"):
            cache.save(path, hybrid)
        assert not path.exists()
        with pytest.raises(FileNotFoundError):
            MLACache.load(path, model)
