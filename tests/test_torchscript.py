"""TorchScript: MLAAttention scripted and traced, saved, and loaded by another process.

That C++ loads it too is in test_cpp_api.py. Adds 10 seconds to the fast tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cpp_examples import attention_demo
from programs import load_program, run_python
from torch import Tensor

import torch_flash_mla
from torch_flash_mla import MLAAttention

# torch announces on each call that TorchScript is deprecated; users shall see that, tests know.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

LIBRARY = Path(torch_flash_mla.library_path)

export = load_program("examples/cpp/export.py")


def saved(way: str, layer: MLAAttention, path: Path) -> None:
    if way == "script":
        module = torch.jit.script(layer)
    else:
        module = torch.jit.trace(layer, export.attention_inputs())
    module.save(path)


def layer(kv_cache_dtype: str = "q8_kv", q_lora_rank: int | None = 48) -> MLAAttention:
    torch.manual_seed(0)
    sizes = {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 48}
    module = MLAAttention(64, 4, q_lora_rank=q_lora_rank, kv_cache_dtype=kv_cache_dtype, **sizes)
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize("q_lora_rank", [None, 48])
@pytest.mark.parametrize("way", ["script", "trace"])
def test_saved_and_loaded(way: str, q_lora_rank: int | None, tmp_path: Path) -> None:
    """Equal results for sizes other than those it was traced with."""
    module = layer(q_lora_rank=q_lora_rank)
    saved(way, module, tmp_path / "layer.pt")
    loaded = torch.jit.load(tmp_path / "layer.pt")
    torch.testing.assert_close(attention_demo(loaded), attention_demo(module))
    for batch, new_tokens in ((1, 1), (4, 7)):
        inputs = export.attention_inputs(batch, new_tokens)
        pages = inputs[3].clone()
        expected = module(*inputs)
        written = inputs[3].clone()
        inputs[3].copy_(pages)
        torch.testing.assert_close(loaded(*inputs), expected)
        assert torch.equal(inputs[3], written)


def test_scripted_with_every_argument() -> None:
    """A scripted layer keeps the optional arguments."""
    module = layer("auto")
    hidden, cos, sin, _, table, lengths, slots = export.attention_inputs(2, 5)
    options = (True, torch.rand(2, 1, 5, 32) > 0.3, torch.tensor([1, 0], dtype=torch.int32), 4)

    def run(call: torch.nn.Module) -> tuple[Tensor, Tensor]:
        pages = torch.zeros(4, 16, 96)
        return call(hidden, cos, sin, pages, table, lengths, slots, *options), pages

    expected = run(module)
    torch.testing.assert_close(run(torch.jit.script(module)), expected)
    plain = module(hidden, cos, sin, expected[1], table, lengths, slots)
    assert not torch.allclose(plain, expected[0])


def test_a_fresh_process_needs_the_library_only(tmp_path: Path) -> None:
    for way in ("script", "trace"):
        saved(way, layer(), tmp_path / f"{way}.pt")
    output = run_python(
        """
import sys, torch
from cpp_examples import attention_demo
torch.ops.load_library(sys.argv[2])
for way in ("script", "trace"):
    print(attention_demo(torch.jit.load(f"{sys.argv[1]}/{way}.pt")).tolist())
assert "torch_flash_mla" not in sys.modules
""",
        tmp_path,
        LIBRARY,
    )
    expected = attention_demo(layer())
    for line in output.splitlines():
        torch.testing.assert_close(torch.tensor(eval(line)), expected)
    assert len(output.splitlines()) == 2


def test_without_the_library_the_operators_are_named_as_missing(tmp_path: Path) -> None:
    saved("script", layer(), tmp_path / "layer.pt")
    code = "import sys, torch; torch.jit.load(sys.argv[1] + '/layer.pt')"
    output = run_python(code, tmp_path, fails=True)
    assert "Unknown builtin op: flashmla::concat_and_cache_mla" in output
