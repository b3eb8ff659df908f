"""python -m torch_flash_mla.bench: sub-commands run and report what they say. Never how fast."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_flash_mla
from torch_flash_mla import ops
from torch_flash_mla.bench import baselines, cases
from torch_flash_mla.bench.__main__ import main
from torch_flash_mla.bench.measure import Effort, race

SHORT = ["--rounds", "1", "--seconds", "0.001"]


def run(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """Rows of a sub-command, after looking at what every report has."""
    path = tmp_path / "report.json"
    threads = torch.get_num_threads()
    isa = torch_flash_mla.cpu_isa()
    main([arguments[0], "--quick", *SHORT, "--json", str(path), *arguments[1:]])
    assert torch.get_num_threads() == threads
    assert torch_flash_mla.cpu_isa() == isa
    report = json.loads(path.read_text())
    assert report["command"] == arguments[0]
    assert report["machine"]["torch"] == torch.__version__
    assert report["rows"]
    for row in report["rows"]:
        for key in ("seconds", "gflops", "gbs", "share", "roof_gflops", "torch_gflops"):
            assert key not in row or (math.isfinite(row[key]) and row[key] > 0), row
    return report["rows"]


def test_roof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, "roof")
    levels = torch_flash_mla.available_isas()
    assert {row["isa"] for row in rows} == {*levels, "memory"}
    assert all(row["instruction"] for row in rows)
    for level in levels:
        assert any(row["isa"] == level and row["arithmetic"] == "f32" for row in rows)
    out = capsys.readouterr().out
    assert "% of roof" not in out
    assert "GFLOP/s" in out


def test_decode_sweeps_formats_levels_heads_and_queries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["--formats", "all", "--isa", "all", "--heads", "1,5", "--lengths", "70"]
    rows = run(tmp_path, "decode", *sweep, "--queries", "1,2", "--batch", "2")
    levels = torch_flash_mla.available_isas()
    assert len(rows) == len(cases.FORMATS) * len(levels) * 2 * 2
    for row in rows:
        flop = 2 * row["heads"] * row["queries"] * 2 * 70 * (2 * 512 + 64)
        assert row["gflops"] == pytest.approx(flop / row["seconds"] / 1e9)
        assert row["share"] == pytest.approx(row["gflops"] / row["roof_gflops"])
        assert "torch_gflops" in row
        with torch_flash_mla.force_isa(row["isa"]):
            assert row["arithmetic"] == cases.arithmetic(row["format"])
    out = capsys.readouterr().out
    assert "% of roof" in out
    assert torch.__version__ in out


def test_decode_other_layouts(tmp_path: Path) -> None:
    small = ["--formats", "bf16", "--heads", "2", "--lengths", "100", "--no-baseline"]
    (row,) = run(tmp_path, "decode", *small, "--two-tensors")
    assert row["tensors"] == 2
    assert "torch_gflops" not in row
    run(tmp_path, "decode", *small, "--rope", "0")
    (row,) = run(tmp_path, "decode", *small, "--topk", "30", "--queries", "2")
    flop = 2 * 2 * 2 * 30 * (2 * 512 + 64)
    assert row["gflops"] == pytest.approx(flop / row["seconds"] / 1e9)


def test_a_short_decode_tells_its_overhead(tmp_path: Path) -> None:
    (row,) = run(tmp_path, "decode", "--formats", "bf16", "--lengths", "16")
    assert math.isfinite(row["above"])


def test_prefill(tmp_path: Path) -> None:
    forms = ["--forms", "auto,absorbed", "--heads", "2", "--lengths", "33"]
    rows = run(tmp_path, "prefill", *forms, "--formats", "bf16,q8_kv")
    assert [(r["format"], r["form"]) for r in rows] == [
        (name, form) for name in ("bf16", "q8_kv") for form in ("auto", "absorbed")
    ]
    for row in rows:
        flop = 2 * (2 * 320 * 33 * 34 / 2 + 2 * 33 * 512 * 256)
        assert row["gflops"] == pytest.approx(flop / row["seconds"] / 1e9)
        assert row["torch_padded_gflops"] > 0


def test_append(tmp_path: Path) -> None:
    rows = run(tmp_path, "append", "--formats", "all", "--lengths", "1,3")
    assert len(rows) == 2 * len(cases.FORMATS)
    assert all(math.isfinite(row["above"]) for row in rows)


def test_threads(tmp_path: Path) -> None:
    rows = run(tmp_path, "threads", "--threads", "2", "--lengths", "64", "--heads", "2")
    assert {row["threads"] for row in rows} == {1, 2}
    assert {row["sequences"] for row in rows} == {"1 x 64", "64 x 1..64"}
    assert all(row["times_one"] == 1 for row in rows if row["threads"] == 1)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("roof", []),
        ("decode", ["--lengths", "16,32", "--heads", "1,2", "--queries", "1,2"]),
        ("prefill", ["--lengths", "8,16", "--heads", "1"]),
        ("append", ["--lengths", "1"]),
        ("threads", ["--threads", "2", "--lengths", "16", "--heads", "1"]),
    ],
)
def test_plot(tmp_path: Path, command: str, arguments: list[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    main([command, "--quick", *SHORT, "--plot", str(path), *arguments])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_against_takes_the_best_rate_of_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "other.py"
    script.write_text("import sys\nprint('3 GF/s', sys.argv[1] + '.5 GF/s')\n")
    command = f"{sys.executable} {script} {{heads}} {{n_kv}} {{format}}"
    small = ["--formats", "bf16", "--heads", "7", "--lengths", "64"]
    (row,) = run(tmp_path, "decode", *small, "--against", command)
    assert row["against_gflops"] == 7.5
    assert row["times_against"] == pytest.approx(row["gflops"] / 7.5)

    # A command that asks for a label runs once per name that the format has elsewhere.
    monkeypatch.setitem(baselines.LABELS, "bf16", ["4", "9"])
    labelled = f"{sys.executable} {script} {{label}}"
    assert baselines.rate_of_command(labelled, "bf16") == 9.5
    assert baselines.rate_of_command(labelled, "fp32") == 0
    with pytest.raises(RuntimeError, match="--against"):
        baselines.rate_of_command(f"{sys.executable} {tmp_path / 'missing.py'}", "bf16")


def test_baselines_compute_the_same_attention() -> None:
    cache = cases.paged_cache("fp32", [50, 50])
    case = cases.Decode(cache, heads=3)
    torch.manual_seed(5)
    theirs: Any = baselines.sdpa_decode(case)()
    torch.manual_seed(5)
    q = torch.randn(2, 1, 3, 576)
    ours, _ = ops.mla_attention(
        q, cache.kv_cache, cache.block_table, cache.cache_seqlens, 512, cache.dims.scale
    )
    torch.testing.assert_close(ours, theirs)


def test_a_round_gives_medians_and_the_best_round_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    # Warm-up, probe and three calls in the first turn, probe and three calls in the second.
    durations = iter([9, 9, 1, 8, 7, 9, 5, 6, 6])

    def call() -> None:
        now[0] += next(durations)

    def missing() -> None:
        raise NotImplementedError

    turns = []
    effort = Effort(rounds=2, seconds=0, least=3)
    found = race({"a": call, "b": missing}, effort, lambda: turns.append(now[0]))
    assert found == {"a": 6}
    assert len(turns) == 2


def test_arithmetic_and_roof_refuse_unknown_names() -> None:
    with pytest.raises(ValueError, match="q9"):
        ops.arithmetic("q9", torch.bfloat16)
    with pytest.raises(TypeError, match="q: dtype"):
        ops.arithmetic("q8_kv", torch.int8)
    with pytest.raises(ValueError, match="int4"):
        ops.roof("int4", 1)


def test_roofs_exist_for_every_arithmetic_in_use(isa: str) -> None:
    for name in cases.FORMATS:
        assert ops.roof(cases.arithmetic(name), 10) > 0
    assert ops.roof("f32", 20) == 2 * ops.roof("f32", 10)


@pytest.mark.parametrize(
    "arguments", [["--formats", "q9"], ["--isa", "mmx"], ["--heads", "0"], ["--lengths", "x"]]
)
def test_unknown_names_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["decode", *arguments])
    assert error.value.code == 2
