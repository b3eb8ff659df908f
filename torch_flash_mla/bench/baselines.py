"""What the operators are measured beside: PyTorch's own attention, used as well as it can be, and
any external command.

PyTorch has no quantised latent cache: its contenders read dense rows of the queries' dtype
(bfloat16 where ours read a packed format), already gathered from the pages, which favours PyTorch.
"""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.nn import functional

from torch_flash_mla.bench.cases import Decode, Prefill, Step, query_dtype
from torch_flash_mla.bench.measure import Effort

# What the formats are called in other benchmarks; the best of them counts.
LABELS = {
    "bf16": ["bf16 direct"],
    "fp16": ["f16->f32"],
    "q8_kv": ["q8kv direct", "q8kv int8"],
    "q8_0": ["q8_0->bf16"],
    "q6_0": ["q6_0->int8"],
}


def sdpa_decode(case: Decode) -> Callable[[], object]:
    """Heads as queries of one head, values as wide as keys and cut afterwards: torch's flash path.

    (With ``enable_gqa`` and narrower values torch takes a path about 80 times slower.) No mask:
    each query token sees all keys.
    """
    cache, dims = case.cache, case.cache.dims
    dtype = query_dtype(cache.format_name)
    keys = cache.dense(dtype)[:, None]
    batch = keys.shape[0]
    q = torch.randn(batch, 1, case.queries * case.heads, keys.shape[-1]).to(dtype)
    scale = dims.scale

    def call() -> object:
        out = functional.scaled_dot_product_attention(q, keys, keys, scale=scale)
        return out[..., : dims.latent]

    return call


def sdpa_prefill(case: Prefill, pad: bool) -> Callable[[], object]:
    """Keys and values of every head from the latent, as kv_b_proj makes them, then attention.

    Args:
        pad: values are padded to the width of keys, which torch's flash path asks for, and cut
            afterwards; else called as transformers does it.
    """
    dims, heads, n = case.cache.dims, case.heads, case.tokens
    dtype = query_dtype(case.cache.format_name)
    rows = case.cache.dense(dtype)
    length = rows.shape[1]
    weight = case.weight().flatten(0, 1)
    q = torch.randn(case.batch, heads, n, dims.nope + dims.rope).to(dtype)
    mask = None
    if case.history:
        mask = torch.ones(n, length, dtype=torch.bool).tril(case.history)[None, None]

    def call() -> object:
        latent, rope = rows.split([dims.latent, dims.rope], dim=-1)
        both = functional.linear(latent, weight).unflatten(-1, (heads, -1)).transpose(1, 2)
        nope, v = both.split([dims.nope, dims.value], dim=-1)
        k = torch.cat([nope, rope[:, None].expand(-1, heads, -1, -1)], dim=-1)
        if pad:
            v = functional.pad(v, (0, k.shape[-1] - v.shape[-1]))
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=dims.scale
        )
        return out[..., : dims.value]

    return call


def rate_of_command(command: str, format_name: str, **values: object) -> float:
    """Largest "N GF/s" that an external command prints for a case, 0 when it prints none.

    ``{label}`` in the command is the format's name in other benchmarks (tried one after another),
    ``{format}`` our own; ``values`` fill ``{heads}``, ``{n_kv}``, ``{queries}``, ``{isa}``.
    """
    best = 0.0
    labels = LABELS.get(format_name, []) if "{label}" in command else [""]
    for label in labels:
        line = command.format(label=label, format=format_name, **values)
        done = subprocess.run(shlex.split(line), capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"--against: {line!r} failed:\n{done.stderr[-2000:]}")
        best = max([best, *(float(x) for x in re.findall(r"([\d.]+) GF/s", done.stdout))])
    return best


class OtherBuild:
    """The step of a case by another build of this package, in a process of its own.

    A context; each call is one turn, and ``seconds`` the best of them. While it has no turn the
    process waits. Without a path it does nothing.

    Args:
        path: the folder that holds the other ``torch_flash_mla``, or "".
    """

    def __init__(self, path: str, case: Step, effort: Effort) -> None:
        self._path, self._case, self._effort = path, case, effort
        self._process: subprocess.Popen[str] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.seconds = 0.0

    def __enter__(self) -> OtherBuild:
        if not self._path:
            return self
        root = Path(self._path).resolve()
        if not (root / "torch_flash_mla" / "__init__.py").exists():
            raise SystemExit(f"--against: {self._path!r} holds no torch_flash_mla")
        self._folder = tempfile.TemporaryDirectory()
        inputs = Path(self._folder.name) / "step.pt"
        case, effort = self._case, self._effort
        torch.save(
            {
                "root": str(root),
                "threads": torch.get_num_threads(),
                "tensors": case.tensors(),
                "scalars": case.scalars(),
                "mebibytes": case.mebibytes,
                "effort": (effort.rounds, effort.seconds, effort.least),
            },
            inputs,
        )
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("other_build.py")), str(inputs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        self._turn()  # warm up
        return self

    def __call__(self) -> None:
        if self._process is not None:
            self.seconds = min(self.seconds or math.inf, self._turn())

    def _turn(self) -> float:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("turn\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: the answer is missing too
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"--against: the build in {self._path!r} failed, see above")
        return float(answer)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
        if self._folder is not None:
            self._folder.cleanup()
