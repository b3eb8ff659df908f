"""Tests that need vLLM, which has an environment of its own: ``make test-vllm``.

Without vLLM nothing here is collected. (The folder is not called ``vllm``: pytest puts ``tests/``
on the import path, where a folder of that name would pass for the package.)
"""

from __future__ import annotations

import importlib.util
import os

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
