"""Several processes by vLLM's own means: tensor parallelism over gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import TINY_MODEL, engine, generate, held_out_prompts, tokens_of
from programs import ROOT

LENGTHS = [1, 40, 130, 700]


def in_processes(folder: Path, **options: Any) -> tuple[list[list[int]], str]:
    """What ``parallel_program.py`` generates, and all that it prints.

    Its processes end with it, come what may.
    """
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps(held_out_prompts(LENGTHS)))
    program = Path(__file__).with_name("parallel_program.py")
    arguments = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "PYTHONPATH": str(ROOT),
    }
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    process = subprocess.Popen(
        [sys.executable, str(program), str(prompts), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=900)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-4000:]
    tokens = json.loads(next(line for line in output.splitlines() if line.startswith("[[")))
    return tokens, output


@pytest.mark.timeout(1800)
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks are bound to two cores")
@pytest.mark.parametrize("name", ["auto", "q8_kv"])
def test_tensor_parallel(tmp_path: Path, measured: Callable[[str], None], name: str) -> None:
    setting = {"torch_flash_mla": {"kv_cache_dtype": name}}
    found, output = in_processes(
        tmp_path,
        model=str(TINY_MODEL),
        dtype="float32",
        tensor_parallel_size=2,
        additional_config=setting,
    )
    assert output.count("MLA on level") == 2, "each rank says once that it runs here"
    with engine(name) as llm:
        expected = tokens_of(generate(llm, held_out_prompts(LENGTHS), max_tokens=32))
    differ = sum(
        one != other
        for mine, samples in zip(found, expected, strict=True)
        for one, other in zip(mine, samples[0], strict=True)
    )
    measured(f"two processes, {name}: {differ} of {32 * len(LENGTHS)} tokens differ from one")
    assert differ == 0
