"""Prompts that are computed once: forks, prefixes and repeated rows, against the stock model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers_cases import families, small_model
from transformers_compare import assert_same_logits, prompt, watch

from torch_flash_mla.integrations.transformers import MLACache, patch

FAMILY = "deepseek_v3"
HYBRIDS = ("kimi_linear", "dots3_note", "hy_v4", "mistral_large4", "glm5_next")
HYBRIDS = tuple(family for family in HYBRIDS if family in families())


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    return small_model(FAMILY, max_position_embeddings=8192)


@pytest.fixture(scope="module")
def model(stock: PreTrainedModel) -> PreTrainedModel:
    copied = copy.deepcopy(stock)
    patch(copied)
    return copied


def tokens(count: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (batch, count), generator=torch.Generator().manual_seed(seed))


def run(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    """The logits of the last token."""
    with torch.no_grad():
        return model(ids, past_key_values=cache, logits_to_keep=1).logits


def filled(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> MLACache:
    cache = MLACache(model.config, **arguments)
    run(model, ids, cache)
    return cache


def generate(model: PreTrainedModel, ids: Tensor, new: int = 8, **arguments: Any) -> Tensor:
    torch.manual_seed(3)
    arguments = {"do_sample": False, **arguments}
    return model.generate(ids, max_new_tokens=new, pad_token_id=0, **arguments)


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Tokens of each forward pass: rows times length."""
    sizes: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: sizes.append(inputs[0].numel())
    )
    try:
        yield sizes
    finally:
        hook.remove()


def used(cache: MLACache) -> int:
    assert cache.pages.paged is not None
    return cache.pages.paged.num_used_blocks


class TestFork:
    @pytest.mark.parametrize("length", [4096, 4080])
    def test_eight_continuations_of_a_long_prompt(
        self, stock: PreTrainedModel, model: PreTrainedModel, length: int
    ) -> None:
        """They take less than 1.2 times the memory of one, and each is what stock makes of it."""
        ids, suffixes = tokens(length), tokens(3, batch=8, seed=1)
        cache = filled(model, ids)
        one, one_used = cache.nbytes, used(cache)
        cache.fork(8)
        whole = torch.cat([ids.repeat(8, 1), suffixes], dim=1)
        with watch(model), counted(model) as sizes:
            texts = generate(model, whole, past_key_values=cache)
        assert sizes[0] == 8 * 3
        assert cache.nbytes < 1.2 * one
        assert used(cache) < 1.2 * one_used
        assert cache.get_seq_length() == length + 3 + 7

        prefix = DynamicCache(config=stock.config)
        run(stock, ids, prefix)
        for row in range(8):
            text = generate(stock, whole[row : row + 1], past_key_values=copy.deepcopy(prefix))
            assert torch.equal(texts[row], text[0])
        assert len({tuple(text[length + 3 :].tolist()) for text in texts}) > 4

    @pytest.mark.parametrize("cached", [130, 129, 64, 7], ids=lambda n: f"{n} cached")
    @pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
    @pytest.mark.parametrize(
        "arguments",
        [
            {"num_return_sequences": 3, "do_sample": True, "temperature": 0.8},
            {"num_beams": 3, "num_return_sequences": 2},
        ],
        ids=["samples", "beams"],
    )
    def test_generate_forks_a_cached_prompt(
        self,
        stock: PreTrainedModel,
        model: PreTrainedModel,
        arguments: dict[str, Any],
        fixed: bool,
        cached: int,
    ) -> None:
        """One sequence in the cache, three rows from ``num_return_sequences`` or beams. If the
        whole prompt is cached, its last token is computed again."""
        ids = tokens(130)
        size = {"max_cache_len": 192, "max_batch": 3} if fixed else {}
        cache = filled(model, ids[:, :cached], **size)
        with watch(model), counted(model) as sizes:
            actual = generate(model, ids, past_key_values=cache, **arguments)
        assert sizes[0] == 3 * max(1, 130 - cached)
        assert torch.equal(actual, generate(stock, ids, **arguments))
        assert cache.batch_size == 3

    @pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
    def test_suffixes_of_different_lengths(
        self, stock: PreTrainedModel, model: PreTrainedModel, fixed: bool
    ) -> None:
        """Padding stands between the prompt and what follows it."""
        ids, lengths = tokens(70), (5, 2, 9)
        size = {"max_cache_len": 192, "max_batch": 3} if fixed else {}
        cache = filled(model, ids, **size)
        cache.fork(3)
        suffixes = prompt(lengths)
        whole = torch.cat([ids.repeat(3, 1), suffixes["input_ids"]], dim=1)
        mask = torch.cat([torch.ones(3, 70).long(), suffixes["attention_mask"]], dim=1)
        with watch(model):
            actual = generate(model, whole, attention_mask=mask, past_key_values=cache)
        for row, length in enumerate(lengths):
            alone = torch.cat([ids, whole[row : row + 1, 79 - length :]], dim=1)
            assert torch.equal(actual[row, 79:], generate(stock, alone)[0, 70 + length :])

    @pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
    @pytest.mark.parametrize("family", HYBRIDS)
    def test_layers_that_are_not_pages(self, family: str, fixed: bool) -> None:
        """Sliding windows, recurrent states and indexer keys fork along."""
        model = small_model(family)
        patch(model)
        ids, suffixes = tokens(21, batch=2), tokens(3, batch=4, seed=1)
        size: dict[str, Any] = {"max_cache_len": 64} if fixed else {}
        apart = filled(model, ids.repeat_interleave(2, dim=0), **size)
        cache = filled(model, ids, **size, max_batch=4)
        cache.fork(2)
        for step in range(3):
            new = suffixes[:, step : step + 1]
            assert_same_logits(run(model, new, cache), run(model, new, apart))
        keep = torch.tensor([False, True, True, False])
        cache.batch_select_indices(keep)
        apart = filled(model, ids, **size)  # rows 1 and 2 come from one prompt each
        for step in range(3):
            new = suffixes[keep, step : step + 1]
            run(model, new, apart)
        assert_same_logits(run(model, new, cache), run(model, new, apart))

    @pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
    def test_back_to_the_prompt(
        self, stock: PreTrainedModel, model: PreTrainedModel, fixed: bool
    ) -> None:
        """One of the continuations, without what followed the prompt, is the prompt again."""
        ids = tokens(130)
        cache = filled(model, ids, **({"max_cache_len": 192, "max_batch": 4} if fixed else {}))
        blocks = used(cache)
        for copies in (4, 2):
            arguments = {"num_return_sequences": copies, "do_sample": True}
            actual = generate(model, ids, past_key_values=cache, **arguments)
            assert torch.equal(actual, generate(stock, ids, **arguments))
            cache.batch_select_indices(torch.tensor([copies - 1]))
            cache.crop(130 - int(cache.get_seq_length()))
            assert fixed or used(cache) == blocks

    def test_a_whole_prompt_in_layers_that_cannot_go_back(self) -> None:
        """Their last token cannot be computed again; without it the prompt continues as stock."""
        stock = small_model("kimi_linear")
        model = copy.deepcopy(stock)
        patch(model)
        ids = tokens(21)
        cache = filled(model, ids)
        with pytest.raises(ValueError, match=r"whole prompt of 21 tokens.*prompt without it"):
            generate(model, ids, past_key_values=cache, num_return_sequences=2, do_sample=True)
        assert (cache.batch_size, cache.get_seq_length()) == (1, 21)
        arguments = {"num_return_sequences": 2, "do_sample": True}
        actual = generate(model, ids, past_key_values=filled(model, ids[:, :20]), **arguments)
        assert torch.equal(actual, generate(stock, ids, **arguments))

    @pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
    def test_a_pass_that_failed(
        self, stock: PreTrainedModel, model: PreTrainedModel, fixed: bool
    ) -> None:
        """Its tokens are forgotten by crop, and it can be made again."""
        ids = tokens(30, batch=2)
        cache = filled(model, ids[:, :21], max_cache_len=64 if fixed else None, block_size=8)

        def fail(*args: Any) -> None:
            raise RuntimeError("no memory")

        for layer in range(2):
            hook = model.model.layers[layer].mlp.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="no memory"):
                run(model, ids[:, 21:], cache)
            hook.remove()
            cache.crop(21 - int(cache.get_seq_length()))
        assert_same_logits(run(model, ids[:, 21:], cache), run(stock, ids, None))

    def test_refusals(self, model: PreTrainedModel) -> None:
        cache = MLACache(model.config)
        with pytest.raises(ValueError, match="fork of an empty cache"):
            cache.fork(2)
        cache.batch_repeat_interleave(2)  # as transformers: nothing to repeat
        ids = tokens(9)
        run(model, ids, cache)
        with pytest.raises(ValueError, match="n: got 0"):
            cache.fork(0)
        with pytest.raises(ValueError, match=r"holds 1 sequences, but 4 came: use fork"):
            run(model, ids.repeat(4, 1), cache)
        with pytest.raises(ValueError, match=r"got 4 sequences, but the cache holds 1: use fork"):
            generate(model, ids.repeat(4, 1), past_key_values=cache)
        with pytest.raises(ValueError, match=r"got 5 tokens, but the cache holds 9"):
            generate(model, ids[:, :5], past_key_values=cache)
        assert cache.get_seq_length() == 9

        fixed = filled(model, ids, max_cache_len=64)
        with pytest.raises(ValueError, match=r"made for 1 sequences.*max_batch=2"):
            fixed.fork(2)
        assert fixed.batch_size == 1

    def test_padding_on_the_left_of_a_shared_prompt(
        self, model: PreTrainedModel, tmp_path: Path
    ) -> None:
        cache = filled(model, tokens(9))
        cache.fork(2)
        ids, mask = tokens(12, batch=2), torch.ones(2, 12).long()
        mask[1, :3] = 0
        with pytest.raises(ValueError, match="pad between the prompt and what follows"):
            generate(model, ids, attention_mask=mask, past_key_values=cache)
        cache.save(tmp_path / "prompt.mla", model)
        loaded = MLACache.load(tmp_path / "prompt.mla", model)
        with pytest.raises(ValueError, match="pad between the prompt and what follows"):
            generate(model, ids, attention_mask=mask, past_key_values=loaded)
        assert cache.get_seq_length() == loaded.get_seq_length() == 9


class TestRepeatedRows:
    """generate() repeats a prompt for samples and beams: its pages are stored once."""

    @pytest.mark.parametrize("own", [False, True], ids=["default cache", "own cache"])
    @pytest.mark.parametrize(
        "arguments",
        [
            {"num_return_sequences": 5, "do_sample": True},
            {"num_return_sequences": 5, "do_sample": True, "prefill_chunk_size": 96},
            {"num_beams": 5},
        ],
        ids=["samples", "chunked", "beams"],
    )
    def test_share_the_prompt(
        self,
        stock: PreTrainedModel,
        model: PreTrainedModel,
        arguments: dict[str, Any],
        own: bool,
    ) -> None:
        inputs = prompt((200, 170))  # three full blocks and a part
        inputs["attention_mask"][1, :30] = 0
        if own:
            inputs["past_key_values"] = MLACache(model.config)
        ids = inputs.pop("input_ids")
        with watch(model):
            out = generate(model, ids, **inputs, **arguments, return_dict_in_generate=True)
        inputs.pop("past_key_values", None)
        assert torch.equal(out.sequences, generate(stock, ids, **inputs, **arguments))
        cache = out.past_key_values
        assert cache.batch_size == 10
        # Of the four blocks of each input, those that one forward pass fills are stored once:
        # three, or two where 96 and 192 tokens end in the middle of one. Beams share anyway.
        whole = 2 if "prefill_chunk_size" in arguments else 3
        assert used(cache) <= 2 * (whole + 5 * (4 - whole))

    def test_only_the_prompt(self, stock: PreTrainedModel, model: PreTrainedModel) -> None:
        """Later tokens are everybody's own, even those that fill whole blocks at once."""
        ids, more = tokens(40), tokens(20, batch=3, seed=1)
        cache = MLACache(model.config, block_size=8)
        arguments = {"num_return_sequences": 3, "do_sample": True}
        first = generate(model, ids, past_key_values=cache, **arguments)
        whole = torch.cat([first, more], dim=1)
        assert torch.equal(generate(model, whole, past_key_values=cache), generate(stock, whole))

    def test_not_again_after_a_crop(self, stock: PreTrainedModel, model: PreTrainedModel) -> None:
        """Rows that have come equal once may differ when their end is replaced."""
        ids, more = tokens(40), tokens(20, batch=2, seed=1)
        cache = MLACache(model.config, block_size=8)
        cache.share_prompt(2, 40)
        run(model, ids.repeat(2, 1), cache)
        cache.crop(-24)
        run(model, more[:, :-1], cache)
        actual = run(model, more[:, -1:], cache)
        whole = torch.cat([ids[:, :16].repeat(2, 1), more], dim=1)
        assert_same_logits(actual, run(stock, whole, None))

    def test_not_while_training(self, model: PreTrainedModel) -> None:
        """Dropout may make the rows differ."""
        trained = copy.deepcopy(model).train()
        out = generate(
            trained, tokens(70), new=2, num_return_sequences=2, do_sample=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert used(out.past_key_values) == 4


class TestPrefix:
    """A prompt that begins with what is cached costs its own tokens only."""

    @pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
    def test_rounds_of_a_conversation(
        self, stock: PreTrainedModel, model: PreTrainedModel, fixed: bool
    ) -> None:
        """Ask, change one's mind about the last 20 tokens, ask anew; the answers are stock's."""
        ids = tokens(100)
        cache = filled(model, ids[:, :90], **({"max_cache_len": 192} if fixed else {}))
        for change in range(3):
            with watch(model), counted(model) as sizes:
                actual = generate(model, ids, past_key_values=cache)
            assert sizes == [ids.shape[1] - 90 + 10 * (change > 0)] + 7 * [1]
            assert torch.equal(actual, generate(stock, ids))
            cache.crop(80 - int(cache.get_seq_length()))
            ids = torch.cat([ids[:, :80], tokens(20 + change, seed=change + 5)], dim=1)

    @pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
    def test_the_rest_in_chunks(
        self, stock: PreTrainedModel, model: PreTrainedModel, fixed: bool
    ) -> None:
        inputs = prompt((200, 187))
        cache = MLACache(model.config, max_cache_len=256 if fixed else None)
        arguments = {"attention_mask": inputs["attention_mask"], "past_key_values": cache}
        ids = inputs["input_ids"]
        with watch(model), counted(model) as sizes:
            actual = generate(model, ids, **arguments, prefill_chunk_size=48)
            assert sizes[:5] == [2 * 48] * 4 + [2 * 8]
            cache.crop(90 - int(cache.get_seq_length()))
            sizes.clear()
            again = generate(model, ids, **arguments, prefill_chunk_size=48)
            assert sizes[:3] == [2 * 48] * 2 + [2 * 14]
        expected = generate(stock, ids, attention_mask=inputs["attention_mask"])
        assert torch.equal(actual, expected)
        assert torch.equal(again, expected)

    def test_left_padding(self, stock: PreTrainedModel, model: PreTrainedModel) -> None:
        """Prompts that were padded when they were cached, with the same mask afterwards."""
        inputs = prompt((80, 61))
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        cache = MLACache(model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            model(
                ids[:, :70],
                attention_mask=mask[:, :70],
                position_ids=positions[:, :70],
                past_key_values=cache,
            )
        with watch(model), counted(model) as sizes:
            actual = generate(model, ids, attention_mask=mask, past_key_values=cache)
        assert sizes[0] == 2 * 10
        assert torch.equal(actual, generate(stock, ids, attention_mask=mask))
