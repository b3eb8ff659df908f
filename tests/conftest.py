"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import torch_flash_mla

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
