"""One context over several processes gives what one process gives."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from context_parallel import CASES, PACKED, Maker, Results, files
from mla_cases import FLOAT_ERROR
from programs import ROOT, run
from torch import Tensor
from transformers_cases import tiny_model
from transformers_compare import TOLERANCE

from torch_flash_mla.integrations.transformers import MLACache
from torch_flash_mla.integrations.transformers.context_parallel import ContextShare

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("context parallel"),
]


def torchrun(size: int, program: str, *arguments: Path | str, **environment: str) -> str:
    """Output of the ranks of a program of ``tests/``."""
    return run(
        *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"),
        f"--nproc-per-node={size}",
        ROOT / "tests" / program,
        *arguments,
        OMP_NUM_THREADS="1",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        **environment,
    )


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The results of all cases by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(request.param, "context_parallel.py", folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Results]:
    """The same by this process, as they are asked for."""
    return {}


def expected(alone: dict[str, Results], name: str) -> Results:
    if name not in alone:
        alone[name] = CASES[name](Maker(None))
    return alone[name]


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", ["pieces", "families", "generation", "changes"])
def test_small_models(ranks: list[Any], alone: dict[str, Results], name: str) -> None:
    wanted = expected(alone, name)
    for results in ranks:
        assert results[name].keys() == wanted.keys()
        for case, value in results[name].items():
            assert torch.equal(value, ranks[0][name][case]), f"{case}: ranks differ"
            if value.is_floating_point():
                apart = (value - wanted[case]).abs().max() / wanted[case].abs().max()
                assert apart <= TOLERANCE, f"{case}: {apart:.1e}"
            else:
                assert torch.equal(value, wanted[case]), case


def test_long_context(ranks: list[Any], alone: dict[str, Results]) -> None:
    """3000 tokens and more, float32: within the bound of the operators, the same tokens."""
    wanted = expected(alone, "long, float32")
    for results in ranks:
        actual = results["long, float32"]
        apart = error(actual["logits"], wanted["logits"])
        print(f"{len(ranks)} processes: logits differ by {apart:.1e}")
        assert apart <= FLOAT_ERROR[torch.float32]
        assert torch.equal(actual["tokens"], wanted["tokens"])


def test_long_context_in_bfloat16(ranks: list[Any], alone: dict[str, Results]) -> None:
    """As near to float32 as one process is in bfloat16."""
    exact = expected(alone, "long, float32")["logits"]
    one = error(expected(alone, "long, bfloat16")["logits"], exact)
    for results in ranks:
        several = error(results["long, bfloat16"]["logits"], exact)
        print(f"error of {len(ranks)} processes {several:.2e}, of one {one:.2e}")
        assert several <= 1.1 * one


@pytest.mark.parametrize("name", PACKED)
def test_long_context_in_packed_pages(
    ranks: list[Any], alone: dict[str, Results], name: str
) -> None:
    """As near to rows of float32 as one process is with that format."""
    exact = expected(alone, "long, float32")["logits"]
    one = error(expected(alone, f"long, {name}")["logits"], exact)
    for results in ranks:
        several = error(results[f"long, {name}"]["logits"], exact)
        print(f"{name}: error of {len(ranks)} processes {several:.2e}, of one {one:.2e}")
        assert several <= 1.1 * one


def test_files(ranks: list[Any], tmp_path: Path) -> None:
    """Each rank continues from its own file (as from memory, to the bit: ``files`` looks)."""
    wanted = files(Maker(None), tmp_path)["auto"]
    for results in ranks:
        apart = (results["files"]["auto"] - wanted).abs().max() / wanted.abs().max()
        assert apart <= TOLERANCE


REFUSED = {
    "tokens": "the tokens of this step differ between rank 0 and rank 1: every rank runs",
    "number": "the tokens of this step differ between rank 0 and rank 1: every rank runs",
    "page": "the tokens of this step differ between rank 0 and rank 1: every rank runs",
    "weights": "kv_b_proj (layer 1 of the cache) differ between rank 0 and rank 1: every rank",
    "attention weights": "an MLACache with a process_group has neither dropout nor attention",
    "tp_plan": "kv_b_proj must be a matrix (this one: expanded: Linear has a forward of its own; "
    "with tp_plan it is none)",
    "gradients": "gradients through an MLACache with a process_group: train without a cache",
    "fixed": "max_cache_len: got 64 with a process_group, whose caches grow",
    "no group": "process_group: got str, expected a ProcessGroup of torch.distributed",
    "no member": "process_group: this process is no member of the group",
    "neighbour": "it holds of its context the share of rank {other} of {size}, and this process "
    "keeps the share of rank {rank} of {size}: every rank loads its own file",
    "share": "the share of rank {rank} of {size}, and this process keeps all of it",
    "whole": "it holds of its context all of it, and this process keeps the share of rank {rank}",
}


def test_refusals(ranks: list[Any]) -> None:
    size = len(ranks)
    for rank, results in enumerate(ranks):
        wanted = {name: text for name, text in REFUSED.items() if rank or name != "no member"}
        assert results["refused"].keys() == wanted.keys()
        for name, text in wanted.items():
            names = {"rank": rank, "other": (rank + 1) % size, "size": size}
            assert text.format(**names) in results["refused"][name]


@pytest.mark.parametrize("page", [1, 3, 64])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_shares(size: int, page: int) -> None:
    """Every token has one place, in one share."""
    shares = []
    for rank in range(size):
        share = object.__new__(ContextShare)
        share.rank, share.size, share.page = rank, size, page
        shares.append(share)
    for length in (0, 1, page, page + 1, 5 * size * page + 2 * page + 1):
        everything = torch.arange(-1, length)
        positions = [share.positions(0, length) for share in shares]
        assert torch.cat(positions).sort().values.tolist() == list(range(length))
        for share, own in zip(shares, positions, strict=True):
            assert len(own) == share.count(length)
            assert len(own) <= -(-length // (size * page)) * page
            assert share.positions(length // 3, length).tolist() == [
                x for x in own.tolist() if x >= length // 3
            ]
            places = share._index(everything)
            assert places[own + 1].tolist() == list(range(len(own)))
            assert (places >= 0).sum() == len(own)


def test_a_group_of_one_is_an_ordinary_cache() -> None:
    """Nothing is exchanged, and files are those of any cache."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        cache = MLACache(tiny_model().config, process_group=torch.distributed.group.WORLD)
        assert cache.pages.context is None
    finally:
        torch.distributed.destroy_process_group()
