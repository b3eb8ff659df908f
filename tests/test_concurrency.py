"""Threads, signals, forks and memory that runs out, around calls of the operators."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

import torch_flash_mla as mla
from torch_flash_mla import ops, reference

L, R = 64, 32


def run(code: str, timeout: float = 120) -> str:
    """Output of a program that must succeed."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, f"{result.returncode}: {result.stdout}{result.stderr}"
    return result.stdout.strip()


WRITER = """
import sys, threading, time
import torch
from torch_flash_mla import ops
torch.set_num_threads(1)
L, R, B, blocks, page = 64, 32, 4, 16, 16
cache = torch.zeros(blocks, page, L + R)
given = {
    "block_table": torch.zeros(B, blocks, dtype=torch.int32),
    "cache_seqlens": torch.full((B,), blocks * page, dtype=torch.int32),
    "slot_mapping": torch.zeros(512, dtype=torch.long),
    "cu_seqlens_q": torch.arange(B + 1, dtype=torch.int32),
    "cache_leftpad": torch.zeros(B, dtype=torch.int32),
    "topk_length": torch.full((B,), 8, dtype=torch.int32),
    "indices": torch.zeros(B, 1, 8, dtype=torch.int32),
}
name = sys.argv[1]
tensor, right = given[name], given[name].clone()
stop = False
def write():
    while not stop:
        tensor.fill_(2**30)
        tensor.copy_(right)
thread = threading.Thread(target=write)
thread.start()
q, rows = torch.zeros(B, 1, 4, L + R), torch.zeros(512, L + R)
end = time.monotonic() + 1.5
calls = 0
while time.monotonic() < end:
    try:
        if name == "slot_mapping":
            ops.concat_and_cache_mla(rows[:, :L], rows[:, L:], cache, tensor)
        elif name == "cu_seqlens_q":
            ops.mla_attention(q[:, 0], cache, given["block_table"], given["cache_seqlens"], L, 0.1,
                              cu_seqlens_q=tensor)
        else:
            more = {k: given[k] for k in ("cache_leftpad", "topk_length", "indices") if k == name}
            if name == "topk_length":
                more["indices"] = given["indices"]
            ops.mla_attention(
                q, cache, given["block_table"], given["cache_seqlens"], L, 0.1, **more
            )
        calls += 1
    except (ValueError, IndexError):
        pass
stop = True
thread.join()
print(calls)
"""


@pytest.mark.parametrize(
    "name",
    [
        "block_table",
        "cache_seqlens",
        "slot_mapping",
        "cu_seqlens_q",
        "cache_leftpad",
        "topk_length",
        "indices",
    ],
)
def test_integers_that_another_thread_writes(name: str) -> None:
    """They are read once, when they are checked: no call leaves its tensors."""
    result = subprocess.run(
        [sys.executable, "-c", WRITER, name], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0


def problem(seed: int) -> tuple[tuple[Tensor, Tensor, None, Tensor], Tensor]:
    """Arguments of a small call, and what comes out."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 1 + seed % 3, 5, L + R, generator=generator)
    cache = torch.randn(2, 200, L + R, generator=generator)
    arguments = q, cache, None, torch.tensor([200 - seed, 40 + seed], dtype=torch.int32)
    return arguments, reference.mla_attention(*arguments, L, 0.1, True)[0]


def test_sixty_four_threads() -> None:
    """Results are right while other threads call and the number of torch's threads changes."""
    problems = [problem(seed) for seed in range(8)]
    before = torch.get_num_threads()
    wrong: list[int] = []

    def work(i: int) -> None:
        arguments, expected = problems[i % len(problems)]
        for turn in range(15):
            torch.set_num_threads(1 + (i + turn) % 3)
            out, _ = ops.mla_attention(*arguments, L, 0.1, True)
            if not torch.allclose(out.double(), expected, rtol=1e-4, atol=1e-5):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    assert not wrong


INTERRUPT = """
import os, signal, threading, time
import torch
from torch_flash_mla import ops
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
threads = {threads}
torch.set_num_threads(threads)
keys, most = {keys}, {tokens}
cache = torch.randn(1, keys, 576)
lengths = torch.tensor([keys], dtype=torch.int32)
w = torch.randn(128, 256, 512)
queries = torch.randn(1, most, 128, {width})
def call(tokens):
    q = queries[:, :tokens]
    return {call}[0]
call(2)
sent = 0.0
def interrupt():
    global sent
    sent = time.process_time()
    os.kill(os.getpid(), signal.SIGINT)
threading.Timer(0.5, interrupt).start()
try:
    call(most)  # takes half a minute or more
except KeyboardInterrupt:
    seconds = (time.process_time() - sent) / threads  # of the processors: others may keep them busy
    assert seconds < 1, seconds
else:
    raise SystemExit("not interrupted")
call(2)  # the next call is an ordinary one
handled = []
signal.signal(signal.SIGINT, lambda *_: handled.append(1))  # a handler that raises nothing
for _ in range(20):  # until it comes during a call, on a busy machine too
    timer = threading.Timer(0.01, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    out = call(most // 100)
    if handled:
        break
    timer.join()
    handled.clear()
assert handled and out.isfinite().all()
print("ok")
"""
KV_B = "ops.mla_attention_kv_b(q, cache, None, lengths, w, 128, 0.1, form='{}')"
LONG_CALLS = {
    "attention": "ops.mla_attention(q, cache, None, lengths, 512, 0.1)",
    "absorbed": KV_B.format("absorbed"),
    "expanded": KV_B.format("expanded"),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", LONG_CALLS)
def test_interrupt(call: str, threads: int) -> None:
    """SIGINT ends a call that would take much longer within a second, and leaves nothing behind."""
    # Results of a gigabyte would take a second to be allocated alone.
    size = {"keys": 65536, "tokens": 500, "width": 576}
    if call != "attention":
        size = {"keys": 8192, "tokens": 4000, "width": 192}
    assert run(INTERRUPT.format(threads=threads, call=LONG_CALLS[call], **size)) == "ok"


FORK = """
import os
import torch
from torch_flash_mla import ops
cache = torch.randn(1, 100, 96)
lengths = torch.tensor([100], dtype=torch.int32)
q = torch.randn(1, 64, 5, 96)
torch.set_num_threads(2)
before = ops.mla_attention(q, cache, None, lengths, 64, 0.1)[0]
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    after = ops.mla_attention(q, cache, None, lengths, 64, 0.1)[0]
    os._exit(0 if torch.allclose(before, after, rtol=1e-4, atol=1e-5) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return ops.mla_attention(q, cache, None, lengths, 64, 0.1)[0]
for rows in torch.utils.data.DataLoader(Rows(), num_workers=2, multiprocessing_context="fork"):
    assert torch.allclose(rows[0], before, rtol=1e-4, atol=1e-5)
print("ok")
"""


def test_fork() -> None:
    assert run(FORK) == "ok"


OUT_OF_MEMORY = """
import resource
import torch
from torch_flash_mla import ops
torch.set_num_threads(1)
ops.set_isa([name for name in ops.available_isas() if name != "onednn"][-1])  # JIT compiles
q, cache = torch.randn(1, 2, 16, 576), torch.randn(1, 64, 576)
lengths = torch.tensor([64], dtype=torch.int32)
ops.mla_attention(q[..., :1, :9], cache[..., :9], None, lengths, 8, 0.1)
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
message = bytearray(4096)  # a message takes memory too
resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 20), limits[1]))
blocks = []
try:  # nothing is left below the limit
    while True:
        blocks.append(bytearray(1 << 16))
except MemoryError:
    del message
try:
    ops.mla_attention(q.expand(1, 2, 16, 576), cache, None, lengths, 512, 0.1)
except (RuntimeError, MemoryError) as error:
    message = str(error)
else:
    message = "none"
del blocks
resource.setrlimit(resource.RLIMIT_AS, limits)
out, _ = ops.mla_attention(q, cache, None, lengths, 512, 0.1)
assert out.isfinite().all()
print(message.splitlines()[0])
"""


def test_out_of_memory() -> None:
    """What could not be allocated is named, and the next call works."""
    message = run(OUT_OF_MEMORY)
    assert "cannot allocate" in message, message


def test_scratch_that_no_machine_has() -> None:
    q = torch.zeros(1, 1).expand(1 << 20, 1 << 10, 1 << 8, 1)
    lengths = torch.zeros(1, dtype=torch.int32).expand(1 << 20)
    table = torch.zeros(1, 1, dtype=torch.int32).expand(1 << 20, 1)
    with pytest.raises(RuntimeError, match=r"out: cannot allocate"):
        mla.mla_attention(q, torch.zeros(1, 1, 1), table, lengths, 1, 0.1)


def test_environment() -> None:
    """An unknown level is named with those that there are, also when the variable is gone since."""
    call = (
        "try: ops.merge_attn_states(*[torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1)] * 2)\n"
        "except ValueError as error: print(error)\n"
    )
    code = f"import os, torch\nfrom torch_flash_mla import ops\n{call}"
    code += f"del os.environ['FLASHMLA_ISA']\n{call}"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"FLASHMLA_ISA": "bogus"},
    )
    first, second = result.stdout.splitlines()
    assert first == second and "bogus" in first and "scalar" in first
