"""``vllm serve`` on loopback, under clients that come together and some of which go early."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest
import torch
from engines import TINY_MODEL, held_out_prompts, reference_logprobs, transformers_model

CLIENTS = 16
REQUESTS = 200
NEW_TOKENS = 24


@dataclass
class Server:
    """A running server: its address, the file with its log, all its processes."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def family(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def resident(self) -> int:
        return sum(process.memory_info().rss for process in self.family())


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Server]:
    """``vllm serve`` of the tiny model; nothing of it is left afterwards, whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(TINY_MODEL)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    command += ["--max-model-len", "2048", "--enforce-eager", *options]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def _wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(server.url + "/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"not healthy after 180 s:\n{server.log.read_text()[-4000:]}")


@torch.no_grad()
def expected_answer(prompt: list[int]) -> list[int]:
    """The greedy continuation by transformers."""
    model = transformers_model(torch.float32)
    tokens = torch.tensor([prompt])
    answer = model.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    return answer[0, len(prompt) :].tolist()


async def stream(
    client: openai.AsyncOpenAI, prompt: list[int], cancel_after: int | None
) -> list[int]:
    """The token ids of one streamed answer; the client leaves after ``cancel_after`` of them."""
    answer: list[int] = []
    events = await client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=NEW_TOKENS,
        temperature=0.0,
        stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    async for event in events:
        answer += event.choices[0].token_ids or []
        if cancel_after is not None and len(answer) >= cancel_after:
            await events.close()
            break
    return answer


async def ask(url: str, prompts: list[list[int]], first: int, count: int) -> list[list[int]]:
    """``count`` requests by ``CLIENTS`` clients at a time; every seventh is given up midway."""
    turn = asyncio.Semaphore(CLIENTS)
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", timeout=120) as client:

        async def one(number: int) -> list[int]:
            async with turn:
                cancel_after = 5 if number % 7 == 3 else None
                return await stream(client, prompts[number % len(prompts)], cancel_after)

        return await asyncio.gather(*(one(first + number) for number in range(count)))


@pytest.mark.timeout(400)
def test_many_clients(tmp_path: Path) -> None:
    prompts = held_out_prompts([7 + 31 * i for i in range(20)])
    expected = [expected_answer(prompt) for prompt in prompts]
    # A small cache: pages are taken, given back and taken again all the time.
    options = ["--dtype", "float32", "--num-gpu-blocks-override", "100"]
    with serving(tmp_path, *options) as server:
        answers, resident = [], []
        for first in range(0, REQUESTS, REQUESTS // 4):
            answers += asyncio.run(ask(server.url, prompts, first, REQUESTS // 4))
            resident.append(server.resident())
        for number, answer in enumerate(answers):
            assert len(answer) >= (5 if number % 7 == 3 else NEW_TOKENS)
            assert answer == expected[number % len(prompts)][: len(answer)]
        print(f"resident memory in MiB: {[size >> 20 for size in resident]}")
        assert resident[-1] <= resident[1] + (64 << 20)

        family = server.family()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) in (0, -signal.SIGINT), server.log.read_text()[-4000:]
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive
    log = server.log.read_text()
    assert log.count("MLA on level") == 1
    assert "Traceback" not in log


@pytest.mark.timeout(200)
def test_packed_cache_and_metrics(tmp_path: Path) -> None:
    """The settings reach the engine by the command line, and its report of the cache grows."""
    setting = '{"torch_flash_mla": {"kv_cache_dtype": "q4_kv"}}'
    with serving(tmp_path, "--additional-config", setting) as server:
        prompt = held_out_prompts([500])[0]
        answer = asyncio.run(ask(server.url, [prompt], 0, 1))[0]
    assert len(answer) == NEW_TOKENS
    # 1 GiB / (4 layers * 356 bytes), in whole pages of 128 tokens
    log = server.log.read_text()
    tokens = 2**30 // (4 * 356 * 128) * 128
    assert f"KV cache size: {tokens:,} tokens" in log
    assert "KV cache q4_kv, 356 bytes per token and layer" in log
    exact = reference_logprobs(transformers_model(torch.bfloat16), prompt, answer)
    taken = exact.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert (exact.amax(1) - taken).max() < 0.5  # a token that transformers finds as good
