"""The damaged files of ``fuzz/files.py``."""

from __future__ import annotations

import pytest
from fuzz import files


@pytest.mark.parametrize("seed", range(2))
def test_damaged_files(seed: int) -> None:
    """``python -m tests.fuzz SEED 20000 --kind files`` is the same at length."""
    summary = files.run(seed, 500)
    assert not summary.wrong
    assert summary.refused > 400
    assert summary.equal > 5
    assert len(summary.kinds) > 14
