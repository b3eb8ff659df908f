"""Pipelines and ``transformers serve`` with patched models: the same text as stock."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from programs import ROOT, run
from transformers import AutoTokenizer, pipeline
from transformers.utils.import_utils import is_serve_available
from transformers_cases import TINY_MODEL, tiny_model
from transformers_compare import watch

from torch_flash_mla.integrations.transformers import patch

PROMPT = "import os\n\n\ndef main("
SERVE = "torch_flash_mla.integrations.transformers.serve"

pytestmark = pytest.mark.skipif(
    not (TINY_MODEL / "model.safetensors").exists(), reason="examples/tiny_model has no weights"
)


def stock_text(tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    out = tiny_model().generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("when", ["before", "after"])
def test_pipeline(when: str) -> None:
    """The model may be patched before it goes into a pipeline, or inside of it."""
    torch.set_num_threads(1)
    model = tiny_model()
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    if when == "before":
        patch(model)
    generator: Any = pipeline("text-generation", model=model, tokenizer=tokenizer)
    if when == "after":
        patch(generator.model)
    arguments = {"max_new_tokens": 24, "do_sample": False, "return_full_text": False}
    with watch(model):
        ((out,),) = generator([PROMPT], **arguments)
    assert out["generated_text"] == stock_text(24)


@contextmanager
def server(*arguments: str) -> Iterator[tuple[str, Any]]:
    """Its address on this machine, and the file with its output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", "-W", "ignore", "-m", SERVE, str(TINY_MODEL), *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, process.stdout and process.stdout.read()
                time.sleep(0.5)
        yield address, process
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="transformers serve needs fastapi and others")
def test_server() -> None:
    with server("--dtype", "float32") as (address, process):
        body = {"model": str(TINY_MODEL), "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
        request = urllib.request.Request(
            f"{address}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = json.load(answer)["choices"][0]["text"]
        process.terminate()
        output = process.stdout.read()
    assert text == stock_text(24)
    assert "4 of 4 attention layers patched" in output


def test_continuous_batching_is_refused() -> None:
    command = [sys.executable, "-m", SERVE, str(TINY_MODEL), "--continuous-batching"]
    output = run(*command, fails=True, PYTHONPATH=str(ROOT))
    assert "vLLM with torch_flash_mla" in output
