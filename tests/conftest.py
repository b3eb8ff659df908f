"""What all tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from programs import ROOT, run

import torch_flash_mla
from torch_flash_mla import ops

# The level onednn makes the products of every row block in tests, however small.
ops.set_onednn_least_rows(1)

# One draw for all runs of a commit; elsewhere every run draws anew.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(params=torch_flash_mla.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction set of this machine."""
    with torch_flash_mla.force_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    """The same numbers in every run, and two threads, so that work is split on any machine."""
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture
def one_thread(_reproducible: None) -> None:
    """Models as small as those of the tests would spend their time on waking threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that examples/cpp/export.py fills: takes about 40 seconds, in slow tests only."""
    folder = tmp_path_factory.mktemp("exported")
    run(sys.executable, "examples/cpp/export.py", folder, PYTHONPATH=str(ROOT))
    return folder
