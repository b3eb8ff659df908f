"""Tests that need vLLM, which has an environment of its own: ``make test-vllm``.

Without vLLM nothing here is collected. (The folder is not called ``vllm``: pytest puts ``tests/``
on the import path, where a folder of that name would pass for the package.)
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import pytest

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("vllm") is None else []

# Read when vLLM is imported, and inherited by the processes that it starts.
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # else one core in two stays idle on a small machine
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # engines in this process, where calls can be counted
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    TOKENIZERS_PARALLELISM="false",
)


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Takes a line of what a test measured, for the end of the run: passed or failed."""
    return lambda line: record_property("measured", line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints those lines."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    properties = [
        pair for report in reports if report.when == "call" for pair in report.user_properties
    ]
    lines = [line for name, line in properties if name == "measured"]
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)
