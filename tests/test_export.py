"""torch.export and AOTInductor: MLAAttention and a whole decoder step, with sizes left open.

Adds about a minute to `make test SLOW=1` on two cores, nearly all of it in the fixture `exported`,
which test_cpp_api.py uses too; 20 seconds of that are in the fast tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cpp_examples import PACKAGE_TOLERANCE, attention_demo, decode, slots_of
from programs import load_program, run_python
from torch import Tensor
from transformers import PreTrainedModel
from transformers_cases import small_model
from transformers_compare import prompt

import torch_flash_mla
from torch_flash_mla import DecoderStep, patch

FAMILY = "deepseek_v3"
BLOCK_SIZE = 8

export = load_program("examples/cpp/export.py")


pytestmark = pytest.mark.usefixtures("one_thread")


def patched_model(family: str = FAMILY) -> PreTrainedModel:
    model = small_model(family).requires_grad_(False)
    patch(model)
    return model


class Pages:
    """Pages of a DecoderStep that a test fills: ``blocks`` for each sequence, in random order."""

    def __init__(self, step: DecoderStep, batch: int, blocks: int) -> None:
        count = batch * blocks + 1
        self.step = step
        self.caches = step.new_caches(count, BLOCK_SIZE)
        self.table = torch.randperm(count)[: batch * blocks].view(batch, blocks).int()
        self.length = 0

    def __call__(self, call: Any, ids: Tensor) -> Tensor:
        """Logits of one call with the next tokens of each sequence."""
        positions = torch.arange(self.length, self.length + ids.shape[1])
        self.length += ids.shape[1]
        lengths = torch.full((len(ids),), self.length, dtype=torch.int32)
        slots = slots_of(self.table, positions, BLOCK_SIZE)
        return call(ids.contiguous(), self.caches, self.table, lengths, slots)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


# DecoderStep itself


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "q8_kv"])
@pytest.mark.parametrize(
    "family",
    [
        FAMILY,
        "minicpm3",
        *(
            pytest.param(family, marks=pytest.mark.slow)
            for family in (
                "axk1",
                "deepseek_v2",
                "glm4_moe_lite",
                "longcat_flash",
                "mistral4",
                "youtu",
            )
        ),
    ],
)
def test_step_decodes_what_generate_does(family: str, kv_cache_dtype: str) -> None:
    model = small_model(family).requires_grad_(False)
    patch(model, kv_cache_dtype)
    ids = prompt((9, 9))["input_ids"]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    step = DecoderStep(model, kv_cache_dtype)
    pages = Pages(step, 2, 4)
    logits = pages(step, ids)
    assert logits.shape == (2, 1, 96)
    for _ in range(12):
        ids = torch.cat([ids, logits.argmax(-1)], dim=1)
        logits = pages(step, ids[:, -1:])
    assert torch.equal(ids, expected)


def test_step_with_sequences_of_different_lengths() -> None:
    """Each row is what it would be alone, whether it brings few new tokens or has a short past."""
    step = DecoderStep(patched_model(), logits_to_keep=0)
    ids = prompt((13, 13))["input_ids"]
    alone = []
    for row, splits in enumerate(((5, 4, 4), (2, 1, 4))):
        pages = Pages(step, 1, 2)
        alone.append([pages(step, x) for x in ids[row : row + 1, : sum(splits)].split(splits, 1)])

    pages = Pages(step, 2, 2)
    lengths = [0, 0]
    for turn, news in enumerate(((5, 2), (4, 1), (4, 4))):
        width = max(news)
        new = torch.zeros(2, width, dtype=torch.int64)
        slots = torch.full((2, width), -1)
        for row, count in enumerate(news):
            positions = torch.arange(lengths[row], lengths[row] + count)
            new[row, width - count :] = ids[row, positions]
            slots[row, width - count :] = slots_of(pages.table, positions, BLOCK_SIZE)[row]
            lengths[row] += count
        logits = step(new, pages.caches, pages.table, torch.tensor(lengths).int(), slots)
        for row, count in enumerate(news):
            assert_near(logits[row : row + 1, width - count :], alone[row][turn])


@pytest.mark.parametrize("family", ["hy_v4", "kimi_linear", "dots3_note"])
def test_step_refuses_what_needs_more_than_pages(family: str) -> None:
    with pytest.raises(
        ValueError, match=r"model: the cache of layer \d is a .*, expected plain MLA"
    ):
        DecoderStep(patched_model(family))


def test_step_refuses_an_unpatched_model_and_missing_pages() -> None:
    model = small_model(FAMILY)
    with pytest.raises(ValueError, match=r"an unpatched module.*after patch\(model\)"):
        DecoderStep(model)
    patch(model)
    step = DecoderStep(model)
    ids, caches, *rest = step.example_inputs()
    with pytest.raises(ValueError, match="kv_caches: got 1 tensors, expected 2, one per layer"):
        step(ids, caches[:1], *rest)


def test_step_refuses_attention_weights() -> None:
    model = patched_model()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    step = DecoderStep(model)
    with pytest.raises(NotImplementedError, match="neither dropout nor attention weights"):
        step(*step.example_inputs())


# torch.export

SIZES = ((2, (3, 4, 1), 2), (1, (5, 1, 1), 1), (3, (1, 1, 9), 3))  # batch, new tokens, blocks


@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_attention(decomposed: bool) -> None:
    program = export.export_attention()
    program = program.run_decompositions() if decomposed else program
    # Decomposition wraps an operator that mutates: it becomes an argument of another.
    called = [x for node in program.graph.nodes for x in (node.target, *node.args)]
    assert called.count(torch.ops.flashmla.concat_and_cache_mla.default) == 1
    assert called.count(torch.ops.flashmla.mla_attention_kv_b.default) == 1
    expected = attention_demo(export.attention_layer())
    assert_near(attention_demo(program.module()), expected)
    for batch, new_tokens in ((1, 1), (4, 7), (1, 9)):
        inputs = export.attention_inputs(batch, new_tokens)
        pages = inputs[3].clone()
        expected = export.attention_layer()(*inputs)
        written = inputs[3].clone()
        inputs[3].copy_(pages)
        assert_near(program.module()(*inputs), expected)
        assert torch.equal(inputs[3], written)


@pytest.mark.parametrize(
    "family", ["minicpm3", pytest.param("deepseek_v3", marks=pytest.mark.slow)]
)
def test_exported_step(family: str, tmp_path: Path) -> None:
    """Any sizes, the pages written; again after decomposition, and loaded by another process."""
    model = patched_model(family)
    if family == "deepseek_v3":
        model.set_experts_implementation("batched_mm")  # the default is an operator in Python
    step = DecoderStep(model)  # 8-bit codes could round the other way after decomposition
    program = torch.export.export(
        step,
        step.example_inputs(block_size=BLOCK_SIZE),
        dynamic_shapes=step.dynamic_shapes(),
        strict=False,
    )
    called = [node.target for node in program.graph.nodes]
    assert called.count(torch.ops.flashmla.mla_attention_kv_b.default) == 2
    assert torch.ops.aten.eye.default not in called  # kv_b_proj's weight is taken, not computed
    ids = prompt((13, 13, 13))["input_ids"]
    last: tuple[Any, ...] = ()
    for call in (program.module(), program.run_decompositions().module()):
        for batch, news, blocks in SIZES:
            torch.manual_seed(2)
            eager = Pages(step, batch, blocks)
            torch.manual_seed(2)
            exported = Pages(step, batch, blocks)
            for new in news:
                tokens = ids[:batch, eager.length : eager.length + new]
                last = eager(step, tokens), eager
                assert_near(exported(call, tokens), last[0])
    torch.export.save(program, tmp_path / "step.pt2")
    logits, pages = last
    lengths = torch.full((3,), pages.length, dtype=torch.int32)
    slots = slots_of(pages.table, torch.arange(pages.length - 9, pages.length), BLOCK_SIZE)
    inputs = (ids[:, 2:11].contiguous(), pages.caches, pages.table, lengths, slots)
    torch.save((inputs, logits), tmp_path / "inputs.pt")
    run_python(
        """
import sys, torch, torch_flash_mla
inputs, expected = torch.load(sys.argv[1] + "/inputs.pt")
actual = torch.export.load(sys.argv[1] + "/step.pt2").module()(*inputs)
assert "transformers" not in sys.modules
torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
""",
        tmp_path,
    )


# AOTInductor. That C++ runs the same packages is in test_cpp_api.py.


@pytest.mark.slow
@pytest.mark.xdist_group("builds")
def test_packages_in_a_fresh_process(exported: Path) -> None:
    """Neither package needs Python code of ours: the process loads the library, and no more."""
    output = run_python(
        """
import sys, torch
from cpp_examples import attention_demo, decode
torch.ops.load_library(sys.argv[2])
layer = torch._inductor.aoti_load_package(sys.argv[1] + "/attention.pt2")
step = torch._inductor.aoti_load_package(sys.argv[1] + "/tiny_model.pt2")
assert "torch_flash_mla" not in sys.modules
print([attention_demo(layer).tolist(), decode(step, b"import os", 40)[0]])
""",
        exported,
        torch_flash_mla.library_path,
    )
    rows, tokens = eval(output)
    assert_near(torch.tensor(rows), attention_demo(export.attention_layer()), 5e-3)
    step = export.decoder_step()
    _, logits = decode(step, b"import os", 40, follow=tokens)
    chosen = logits.gather(1, torch.tensor(tokens[-40:]).unsqueeze(1)).squeeze(1)
    assert (logits.amax(dim=1) - chosen).max() <= 2 * PACKAGE_TOLERANCE * logits.abs().max()
    eager, _ = decode(step, b"import os", 40)
    ids = torch.tensor([list(b"import os")])
    patch(step.model, export.KV_CACHE_DTYPE)
    assert eager == step.model.generate(ids, max_new_tokens=40, do_sample=False)[0].tolist()
