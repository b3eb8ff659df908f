"""Caches on disk: what comes back, what the file costs, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
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

FAMILY = "deepseek_v3"
FAMILIES = (FAMILY, "kimi_linear", "dots3_note", "hy_v4", "mistral_large4", "glm5_next")
FAMILIES = tuple(family for family in FAMILIES if family in families())


@pytest.fixture(autouse=True)
def _one_thread(_reproducible: None) -> None:
    """Models as small as these would spend their time on waking threads."""
    torch.set_num_threads(1)


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


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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

        loaded = PagedLatentCache.load(tmp_path / "cache")
        self.extend(loaded, 3, 2)  # the last blocks have room
        assert mapped()
        self.extend(loaded, 1, 2)
        assert not mapped()
        loaded = PagedLatentCache.load(tmp_path / "cache", mmap=False)
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

    def test_a_failed_write_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "cache"
        cache = self.filled()
        cache.save(path)
        before = digest(path)

        def half(tensors: Any, name: Path, metadata: Any) -> None:
            name.write_bytes(b"half a file")
            raise OSError("disk full")

        monkeypatch.setattr(safetensors.torch, "save_file", half)
        with pytest.raises(OSError, match="disk full"):
            cache.save(path)
        assert digest(path) == before
        assert list(tmp_path.iterdir()) == [path]

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
        for length in (4, 100, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match="not a safetensors file, or a damaged one"):
                load()
        safetensors.torch.save_file({"pool.0": torch.ones(2)}, path)
        with pytest.raises(ValueError, match="no cache of torch_flash_mla"):
            load()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"version": 2}, "cache file of version 2, expected 1"),
            ({"kind": "MLACache"}, r"holds a MLACache, expected a PagedLatentCache"),
            ({"lengths": [21]}, "block_table: got 2 rows for 1"),
            ({"lengths": [21, 99]}, "row 1 has 3 blocks for 99"),
            ({"lengths": [21, "x"]}, "TypeError"),
            ({"lengths": None}, "TypeError"),
            ({"block_table": [[0, 1, 2], [3, 4, 6]]}, "got 6, expected 0 .. 5"),
            ({"block_table": [[0, 1, 2], [3, 4, -1]]}, "got -1, expected 0 .. 5"),
            ({"block_table": [[0, 1, 2], [3, 4, 2]]}, "partly filled and shared"),
            ({"num_blocks": 10**12}, "num_blocks: got 1000000000000"),
            ({"num_blocks": 5}, "got 5, expected 0 .. 4"),
            ({"block_size": 16}, "row 0 has 3 blocks for 21"),
            ({"latent_dims": [64, 32]}, r"pool.1: got .* \[6, 8, 96\], expected .* \[6, 8, 64\]"),
            ({"latent_dims": [64, 64, 64], "rope_dims": [32] * 3}, "no tensor 'pool.2'"),
            ({"dtype": "float16"}, "pool.0: got torch.bfloat16"),
            ({"dtype": "nn"}, "dtype: got 'nn'"),
            ({"kv_cache_dtype": "q9"}, "kv_cache_dtype: got 'q9'"),
            ({"max_cache_len": 16}, "lengths: got 21, expected at most 16"),
            ({"max_batch": 1}, "block_table: got 2 rows for 2 of 1"),
        ],
        ids=lambda x: next(iter(x.items()))[0] if isinstance(x, dict) else "",
    )
    def test_headers_that_are_refused(
        self, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        path = tmp_path / "cache"
        self.filled().save(path)
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["torch_flash_mla"])
        stored = safetensors.torch.load_file(path)
        document = json.dumps(header | changes)
        safetensors.torch.save_file(stored, path, metadata={"torch_flash_mla": document})
        with pytest.raises(ValueError, match=message) as error:
            PagedLatentCache.load(path)
        assert str(error.value).startswith(str(path))


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
