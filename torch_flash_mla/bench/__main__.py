"""Measures the operators against what this machine can do.

    python -m torch_flash_mla.bench roof      instruction roofs of every level, memory bandwidth
    python -m torch_flash_mla.bench decode    new tokens against a cache, beside PyTorch's attention
    python -m torch_flash_mla.bench step      a decoding step as models call it, weights from memory
    python -m torch_flash_mla.bench prefill   whole prompts, beside PyTorch's attention
    python -m torch_flash_mla.bench append    new tokens into the cache
    python -m torch_flash_mla.bench threads   decode with 1, 2, 4, .. threads

Everything in one table row is measured in the same seconds, taking turns: the operator, the
instruction roof of the arithmetic that computes the row (dot products on registers alone), PyTorch,
and the command of --against. A turn gives a median, the best turn counts. Decode counts
2 * heads * queries * keys * (latent + rope + latent) flop.

Examples:

    python -m torch_flash_mla.bench decode --formats bf16,q8_kv --heads 16,128 --lengths 1024,65536
    python -m torch_flash_mla.bench decode --isa all --queries 1,2,4,8 --json rows.json
    python -m torch_flash_mla.bench decode --latent 512 --rope 0       (or --two-tensors)
    python -m torch_flash_mla.bench decode --lengths 65536 --topk 2048
    python -m torch_flash_mla.bench step --formats bf16,q8_kv --shapes 1x1024,8x1024 --threads 2
    python -m torch_flash_mla.bench step --against ../another_checkout
    python -m torch_flash_mla.bench prefill --lengths 1,64,512 --history 0,16384 --forms all
    python -m torch_flash_mla.bench decode --against 'other_benchmark {format} {heads} {n_kv}'

--against runs any program once per round and takes the largest number before "GF/s" in its output.
{format}, {isa}, {heads}, {n_kv} and {queries} in the command name the case; {label} is the format's
name in other benchmarks (such as "q8_0->bf16"), and a command that uses it runs once per such name.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import torch_flash_mla
from torch_flash_mla import ops

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError as error:
    raise SystemExit(
        f"torch_flash_mla.bench: {error}. It prints with rich and plots with matplotlib: "
        "pip install rich matplotlib"
    ) from None

from torch_flash_mla.bench import cases, report, suites
from torch_flash_mla.bench.measure import Effort


@dataclasses.dataclass(frozen=True)
class Command:
    """A sub-command: its suite, its title, and what it sweeps unless told otherwise."""

    suite: suites.Suite
    title: str
    formats: str = "all"
    heads: str = "16,128"
    lengths: str = "4096"
    queries: str = "1"
    quick: tuple[str, str, str] = ("bf16,q8_kv", "16", "1024")  # formats, heads, lengths


DEFAULT_SHAPES = "1x1024,1x4096,1x16384,8x1024"

COMMANDS = {
    "roof": Command(suites.roofs, "instruction roofs and memory"),
    "decode": Command(suites.decode, "decode: mla_attention"),
    "step": Command(
        suites.step,
        "decoding step: mla_attention_kv_b, weights from memory",
        lengths="1",  # see --shapes
        quick=("bf16,q8_kv", "16", "1"),
    ),
    "prefill": Command(
        suites.prefill,
        "prompts: mla_attention_kv_b, useful work",
        formats="bf16",
        heads="16",
        lengths="512,2048",
        quick=("bf16", "4", "256"),
    ),
    "append": Command(
        suites.append,
        "append: concat_and_cache_mla",
        lengths="1,64,4096",
        quick=("bf16,q8_kv", "16", "1,64"),
    ),
    "threads": Command(
        suites.threads,
        "threads: mla_attention",
        formats="bf16,q8_kv",
        heads="16",
        lengths="16384",
        quick=("q8_kv", "16", "512"),
    ),
}


def _names(allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Parses a comma-separated list of known names, or "all"."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(allowed) if text == "all" else tuple(text.split(","))
        for name in names:
            if name not in allowed:
                expected = ", ".join(allowed)
                raise argparse.ArgumentTypeError(f"{name!r} is none of {expected}, all")
        return names

    return parse


def _numbers(text: str) -> tuple[int, ...]:
    numbers = _counts(text)
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers above 0")
    return numbers


def _counts(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers, 0 or more")
    return numbers


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    """Parses "8x1024,1x4096": sequences and keys of each."""
    shapes = []
    for part in text.split(","):
        batch, _, n_kv = part.partition("x")
        if not (batch.isdecimal() and n_kv.isdecimal() and int(batch) > 0 and int(n_kv) > 0):
            raise argparse.ArgumentTypeError(f"{part!r}: expected SEQUENCESxKEYS, such as 8x1024")
        shapes.append((int(batch), int(n_kv)))
    return tuple(shapes)


def _isas(text: str) -> tuple[str, ...]:
    if text == "auto":
        return (torch_flash_mla.cpu_isa(),)
    return _names(torch_flash_mla.available_isas())(text)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m torch_flash_mla.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        p = commands.add_parser(
            name,
            help=command.title,
            description=inspect.getdoc(command.suite),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        p.add_argument("--quick", action="store_true", help="small cases, short measurements")
        p.add_argument("--json", metavar="FILE", help="write machine, options and rows")
        p.add_argument("--plot", metavar="FILE", help="draw a picture (needs matplotlib)")
        p.add_argument("--isa", default="all" if name == "roof" else "auto", metavar="LEVELS",
                       help="auto (the best), all, or some of "
                       + ",".join(torch_flash_mla.available_isas()))  # fmt: skip
        p.add_argument("--threads", type=int, default=0, metavar="N",
                       help=f"default: {'all' if name == 'threads' else 1}")  # fmt: skip
        p.add_argument("--rounds", type=int, default=0, help="turns of each contender (5)")
        p.add_argument("--seconds", type=float, default=0.0, help="per turn (0.2)")
        if name == "roof":
            continue
        p.add_argument("--formats", type=_names(cases.FORMATS), metavar="LIST",
                       help=f"default {command.formats}; of {','.join(cases.FORMATS)}")  # fmt: skip
        if name == "step":
            p.add_argument("--shapes", type=_shapes, metavar="LIST",
                           help=f"sequences x keys, default {DEFAULT_SHAPES}")  # fmt: skip
            p.add_argument("--against", default="", metavar="PATH",
                           help="the root of another build of this package")  # fmt: skip
        else:
            p.add_argument("--lengths", type=_numbers, metavar="LIST",
                           help=f"{'new' if name in ('append', 'prefill') else 'cached'} tokens, "
                           f"default {command.lengths}")  # fmt: skip
        p.add_argument("--latent", type=int, default=512, help="width of the latent (512)")
        p.add_argument("--rope", type=int, default=64, help="width of the rope part (64)")
        if name == "append":
            continue
        p.add_argument("--heads", type=_numbers, metavar="LIST", help=f"default {command.heads}")
        if name in ("threads", "step"):
            continue
        p.add_argument("--onednn-rows", type=int, default=0, metavar="N",
                       help="query rows of a block from which on the level onednn makes its "
                       "products (as shipped); 1: always")  # fmt: skip
        p.add_argument("--two-tensors", action="store_true",
                       help="latent and rope part in two tensors (float formats)")  # fmt: skip
        p.add_argument("--no-baseline", action="store_true", help="leave PyTorch out")
        p.add_argument("--against", default="", metavar="CMD", help="a command to run beside")
        if name == "prefill":
            p.add_argument("--forms", type=_names(("auto", "absorbed", "expanded")),
                           default=("auto",), metavar="LIST",
                           help="auto (default), absorbed, expanded, all")  # fmt: skip
            p.add_argument("--history", type=_counts, default=(0,), metavar="LIST",
                           help="tokens cached before the new ones (0)")  # fmt: skip
        p.add_argument("--batch", type=int, default=1, help="sequences (1)")
        if name == "decode":
            p.add_argument("--queries", type=_numbers, default=(1,), metavar="LIST",
                           help="new tokens per sequence, causal (1)")  # fmt: skip
            p.add_argument("--topk", type=int, default=0,
                           help="sparse: so many random keys per query")  # fmt: skip
    return top


def options_of(arguments: argparse.Namespace) -> suites.Options:
    command = COMMANDS[arguments.command]
    given = vars(arguments)
    quick = command.quick if arguments.quick else (command.formats, command.heads, command.lengths)
    threads = arguments.threads
    if threads < 1:
        threads = torch.get_num_threads() if arguments.command == "threads" else 1
    return suites.Options(
        isas=_isas(arguments.isa),
        threads=threads,
        formats=given.get("formats") or _names(cases.FORMATS)(quick[0]),
        heads=given.get("heads") or _numbers(quick[1]),
        lengths=given.get("lengths") or _numbers(quick[2]),
        queries=given.get("queries", (1,)),
        onednn_rows=given.get("onednn_rows", 0),
        batch=given.get("batch", 1),
        topk=given.get("topk", 0),
        dims=cases.Dims(given.get("latent", 512), given.get("rope", 64)),
        two_tensors=given.get("two_tensors", False),
        forms=given.get("forms", ("auto",)),
        history=given.get("history", (0,)),
        baseline=not given.get("no_baseline", False),
        against=given.get("against", ""),
        shapes=given.get("shapes") or _shapes("1x256" if arguments.quick else DEFAULT_SHAPES),
        effort=Effort(
            arguments.rounds or (1 if arguments.quick else 5),
            arguments.seconds or (0.05 if arguments.quick else 0.2),
        ),
        memory=64 if arguments.quick else 512,
    )


def _expected_rows(command: str, options: suites.Options) -> int | None:
    """How many rows a suite will yield, for the progress bar; None: not known beforehand."""
    each = len(options.formats) * len(options.lengths) * len(options.isas)
    if command == "decode":
        return each * len(options.heads) * len(options.queries)
    if command == "step":
        return len(options.formats) * len(options.isas) * len(options.heads) * len(options.shapes)
    if command == "prefill":
        return each * len(options.history) * len(options.heads) * len(options.forms)
    return each if command == "append" else None


def measure(command: str, options: suites.Options) -> list[suites.Row]:
    """Runs a sub-command's suite under a progress bar (on stderr, so that tables can be piped)."""
    before = torch.get_num_threads()
    onednn_rows = ops.set_onednn_least_rows(max(options.onednn_rows, 1))
    if options.onednn_rows < 1:
        ops.set_onednn_least_rows(onednn_rows)
    rows: list[suites.Row] = []
    columns = (TextColumn(command), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    torch.set_num_threads(options.threads)
    try:
        with (
            Progress(*columns, console=Console(stderr=True), transient=True) as progress,
            torch_flash_mla.force_isa(torch_flash_mla.cpu_isa()),
            torch.no_grad(),
        ):
            task = progress.add_task(command, total=_expected_rows(command, options))
            for row in COMMANDS[command].suite(options):
                rows.append(row)
                progress.advance(task)
    finally:
        torch.set_num_threads(before)
        ops.set_onednn_least_rows(onednn_rows)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    top = parser()
    parsed = top.parse_args(arguments)
    try:
        options = options_of(parsed)
    except (ValueError, argparse.ArgumentTypeError) as error:
        top.error(str(error))
    where: dict[str, Any] = {**report.machine(), "threads": options.threads}
    # A pipe has no width: tables are printed whole.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(report.machine_line(where), style="dim", highlight=False, soft_wrap=True)
    rows = measure(parsed.command, options)
    if not rows:
        raise SystemExit("nothing was measured: no case of this selection is implemented")
    title = COMMANDS[parsed.command].title
    report.print_table(console, title, rows)
    if parsed.json:
        report.write_json(parsed.json, parsed.command, where, dataclasses.asdict(options), rows)
    if parsed.plot:
        from torch_flash_mla.bench.plot import write_plot

        write_plot(parsed.plot, parsed.command, title, where, rows)


if __name__ == "__main__":
    main()
