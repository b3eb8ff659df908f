"""The example programs run and print what they promise."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from programs import ROOT, load_program, run
from transformers_cases import TINY_MODEL, small_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with the byte tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    small_model("deepseek_v3", vocab_size=262).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MODEL / name, folder)
    return folder


def table_row(output: str, title: str) -> list[str]:
    line = next(line for line in output.splitlines() if line.startswith(f"│ {title}"))
    return [cell.strip() for cell in line.strip("│").split("│")]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "q8_kv"])
def test_generate(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], kv_cache_dtype: str
) -> None:
    arguments = ["--model", str(checkpoint), "--kv-cache-dtype", kv_cache_dtype, "--compare"]
    arguments += ["--prompt", "def f(x):", "--max-new-tokens", "6", "--temperature", "0"]
    assert load_program("examples/generate.py").main(arguments) == 0
    output = capsys.readouterr().out
    assert "2 of 2 attention layers patched" in output
    same = re.search(r"first (\d+) of \d+ characters are the same", output)
    assert same is not None
    assert int(same[1]) >= len("def f(x):")
    patched, stock = table_row(output, f"patched, {kv_cache_dtype}"), table_row(output, "stock")
    assert patched[1] == stock[1] == "9"
    assert patched[3] == stock[3] == "6"
    assert float(patched[4]) > 0
    assert stock[5] == str(2 * (64 + 32) * 2)
    assert patched[5] == (stock[5] if kv_cache_dtype == "auto" else str(2 * (64 + 32 + 8)))


@pytest.mark.skipif(
    not (TINY_MODEL / "model.safetensors").exists(), reason="examples/tiny_model has no weights"
)
def test_generate_with_the_tiny_model(capsys: pytest.CaptureFixture[str]) -> None:
    """The default model, as `make demo` runs it."""
    assert load_program("examples/generate.py").main(["--compare", "--max-new-tokens", "24"]) == 0
    output = capsys.readouterr().out
    assert "4 of 4 attention layers patched" in output
    assert table_row(output, "patched, q8_kv")[5] == str(4 * 584)
    assert table_row(output, "stock")[5] == str(4 * 576 * 2)


def test_generate_names_a_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_program("examples/generate.py").main(["--model", str(tmp_path)])
    assert "holds no weights" in capsys.readouterr().err


def test_layer_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_program("benchmarks/layer.py").main(["--history", "64", "--steps", "1"]) == 0
    output = capsys.readouterr().out
    assert output.count("x │") == 3


def test_shared_keys_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--small", "--history", "256", "--chunk", "8", "--steps", "1"]
    assert load_program("benchmarks/shared_keys.py").main(arguments) == 0
    assert capsys.readouterr().out.count("x │") == 6


def test_errors_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_program("benchmarks/errors.py").main(["--isa", "scalar", "--formats", "q8_kv"]) == 0
    cells = [cell.strip() for cell in table_row(capsys.readouterr().out, "q8_kv")]
    assert cells[2:4] == ["scalar", "F32"]
    assert all(0.99 < float(cell.split(",")[0]) < 1.01 for cell in cells[4:])


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "q8_kv"])
def test_shared_prompt(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kv_cache_dtype: str
) -> None:
    """The second run reads the file of the first and writes the same continuations."""
    arguments = ["--model", str(checkpoint), "--kv-cache-dtype", kv_cache_dtype]
    arguments += ["--prompt-tokens", "250", "--samples", "3", "--max-new-tokens", "5"]
    arguments += ["--cache", str(tmp_path / "prompt.mla")]
    outputs = []
    for _ in range(2):
        assert load_program("examples/shared_prompt.py").main(arguments) == 0
        outputs.append(capsys.readouterr().out)
    texts = [output.rpartition("╯")[0] for output in outputs]
    assert texts[0] == texts[1]
    assert texts[0].count("╭") == 3
    assert "computed by the model" in outputs[0]
    assert "computed by the model" not in outputs[1]
    summary = " ".join(outputs[0].split())
    assert "A prompt of 250 tokens" in summary
    ratios = re.search(r"continuations: ([0-9.]+) times .* take ([0-9.]+) times", summary)
    assert ratios is not None
    # Three full blocks, and a fourth that each continuation has its own copy of: six against four.
    assert 1.5 <= float(ratios[1]) < 1.6 < 2.9 < float(ratios[2])


@pytest.mark.skipif(
    not (TINY_MODEL / "model.safetensors").exists(), reason="examples/tiny_model has no weights"
)
def test_context_parallel() -> None:
    """Two processes keep a context together, and say what that costs."""
    output = run(
        *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node=2", "examples/context_parallel.py"),
        *("--prompt-tokens", "400", "--max-new-tokens", "8"),
        PYTHONPATH=str(ROOT),
    )
    # Values and a log-sum-exp of each head, in bfloat16 and float32: 4 * (128 * 2 + 4).
    assert re.search(r"sends every other one 1040 bytes .* prompt, 1040 per new token", output)
    assert re.search(r"--- 408 tokens take 0\.95 MB, over 2 ranks:", output)
    shares = [float(share) for share in re.findall(r"rank \d: ([0-9.]+) MB", output)]
    assert len(shares) == 2 and max(shares) < 0.95


def test_prompt_benchmark(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = load_program("benchmarks/prompt.py")
    config = benchmark.v2_lite_config()
    config.hidden_size = config.intermediate_size = 64
    monkeypatch.setattr(benchmark, "v2_lite_config", lambda: config)
    assert benchmark.main(["--tokens", "96", "--rounds", "1"]) == 0
    output = capsys.readouterr().out
    assert output.count("x │") >= 6
    error = re.search(r"patched ([0-9.e+-]+), padded", output)
    assert error is not None
    assert 0 < float(error[1]) < 0.1
    assert re.search(
        r"file of [0-9.]+ MB: written in [0-9.]+ ms, read and verified in [0-9.]+ ms", output
    )
