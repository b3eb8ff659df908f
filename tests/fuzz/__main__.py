"""Runs the fuzzer: see the package. The last line says how many cases passed and failed."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Threads that wait for work must not take the time of those that have some.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[2]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--first", type=int, default=0, help="index of the first case")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--isa", help="a level, instead of all of the machine")
    parser.add_argument("--kind", choices=list(_KINDS), default="calls")
    parser.add_argument("--sanitize", action="store_true", help="with ASan and UBSan")
    parser.add_argument("--tsan", action="store_true", help="with TSan, for --kind threads")
    parser.add_argument("--time-limit", type=float, default=30, help="seconds for a case")
    parser.add_argument("--replay", metavar="SEED:INDEX", help="one case, in this process")
    parser.add_argument("--set", default="{}", help="fields of its spec, as JSON")
    parser.add_argument("--shrink", type=int, default=5, help="failures to make smaller")
    parser.add_argument("--json", type=Path, help="where to write all failures")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.sanitize or options.tsan:
        from tests.fuzz import sanitize

        if options.sanitize:
            sanitize.execute_again(sanitize.ADDRESS, "--sanitize")
        sanitize.execute_again(sanitize.THREAD, "--tsan")
    if options.replay:
        return replay(options)
    return _KINDS[options.kind](options)


def levels(options: argparse.Namespace) -> list[str]:
    import torch_flash_mla

    return [options.isa] if options.isa else torch_flash_mla.available_isas()


def replay(options: argparse.Namespace) -> int:
    """One case, where a debugger can watch it."""
    import torch_flash_mla
    from tests.fuzz import run, specs

    seed, index = map(int, options.replay.split(":"))
    spec = specs.draw(seed, index, torch_flash_mla.available_isas()) | json.loads(options.set)
    if options.isa:
        spec["isa"] = options.isa
    print(json.dumps(spec))
    try:
        run.run(spec)
    except run.Wrong as wrong:
        print(wrong)
        print("0 passed, 1 failed")
        return 1
    print("1 passed, 0 failed")
    return 0


def calls(options: argparse.Namespace) -> int:
    """Calls of the operators."""
    from tests.fuzz import run, specs

    isas = levels(options)

    def case(index: int, tell: Callable[[Any], None]) -> None:
        spec = specs.draw(options.seed, index, isas)
        tell(spec)
        run.run(spec)

    return report(options, case, run.run)


def threads(options: argparse.Namespace) -> int:
    """Calls from several Python threads at once."""
    from tests.fuzz import concurrency

    isas = levels(options)

    def case(index: int, tell: Callable[[Any], None]) -> None:
        specs = concurrency.draw(options.seed, index, isas)
        tell(specs)
        concurrency.run(specs)

    return report(options, case, None)


def report(
    options: argparse.Namespace,
    case: Callable[[int, Callable[[Any], None]], None],
    again: Callable[[Any], None] | None,
) -> int:
    """Runs cases in workers and prints what failed, the first of each kind made smaller."""
    from tests.fuzz import workers

    folder = ROOT / "build" / "fuzz" / f"{options.kind}-{os.getpid()}"
    kinds: dict[str, list[workers.Failure]] = {}
    passed = failed = 0
    found = workers.run(
        folder, case, options.first, options.count, options.workers, options.time_limit
    )
    for result in found:
        if isinstance(result, tuple):
            passed, failed = result
            continue
        group = kinds.setdefault(signature(result), [])
        group.append(result)
        if len(group) == 1:
            print(f"{options.seed}:{result.index} {result.kind}: {result.details}", flush=True)
    if options.json:
        options.json.write_text(json.dumps([vars(f) for g in kinds.values() for f in g]))
    if kinds:
        print()
    for i, (name, group) in enumerate(sorted(kinds.items(), key=lambda x: -len(x[1]))):
        seeds = " ".join(f"{options.seed}:{f.index}" for f in group[:5])
        print(f"{len(group)} x {name}: {seeds}", flush=True)
        if i < options.shrink and again is not None:
            print(f"    {smaller(options, group[0], again)}", flush=True)
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)


def signature(failure: Any) -> str:
    """What failures of one kind have in common."""
    spec = failure.spec
    if not isinstance(spec, dict):
        return failure.kind
    damaged = "hostile" if spec.get("mutations") else "valid"
    name = f"{failure.kind} ({damaged} {spec['kind']})"
    if failure.kind.startswith("wrong"):
        return f"{name} {failure.details.split(':')[0]}"
    return f"{name} {_without_numbers(failure.details)[:100]}"


def _without_numbers(text: str) -> str:
    lines = text.strip().split("\n")
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
    return re.sub(r"\[.*?\]|-?\d[\d.e+-]*", "#", line)


def smaller(options: argparse.Namespace, failure: Any, again: Callable[[Any], None]) -> str:
    """The command that shows a failure, with as little as is needed."""
    from tests.fuzz import shrink, workers

    limit = min(options.time_limit, 20)

    def fails(spec: Any) -> bool:
        found = workers.attempt(lambda: again(spec), limit)
        return found is not None and found.kind == failure.kind

    command = f"python -m tests.fuzz --replay {options.seed}:{failure.index}"
    if failure.spec is None or not fails(failure.spec):
        return f"{command}  # does not fail alone"
    least = shrink.shrink(failure.spec, fails)
    changed = {k: v for k, v in least.items() if failure.spec.get(k) != v}
    return f"{command} --set '{json.dumps(changed)}'" if changed else command


def other(name: str) -> Callable[[argparse.Namespace], int]:
    """A kind with a module of its own: run(seed, count) returns a summary with what is `wrong`."""

    def run_module(options: argparse.Namespace) -> int:
        module = importlib.import_module(f"tests.fuzz.{name}")
        summary = module.run(options.seed, options.count)
        for line in summary.wrong:
            print(line)
        print(summary)
        failed = len(summary.wrong)
        print(f"{options.count - failed} passed, {failed} failed")
        return int(failed > 0)

    return run_module


_KINDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "calls": calls,
    "threads": threads,
    "caches": other("caches"),
    "files": other("files"),
}

if __name__ == "__main__":
    sys.exit(main())
