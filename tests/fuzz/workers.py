"""Cases in processes of their own, which write down what they are about to do.

A worker is a fork: torch is imported once. It must not have used torch's threads before, so the
parent runs no case itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
import json
import mmap
import os
import resource
import signal
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.fuzz import sanitize

# Seconds of a case, which takes milliseconds (`Worker._too_long`).
TIME_LIMIT = 30.0
# Address space of a worker: what asks for more than memory has room for must be told so.
_ADDRESS_SPACE = 6 << 30
# The operator new of ASan ends the process where the real one throws, and the call is refused.
_NO_MEMORY = "AddressSanitizer: allocator is out of memory"
_HEAD = struct.Struct("<qqq")  # index, cases done, cases that failed
_STATUS_BYTES = 1 << 14
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


@dataclass
class Failure:
    index: int
    kind: str
    details: str
    spec: dict[str, Any]


# A case: (index, tell) -> the spec; tell(spec) is to be called before the case runs. Raises what
# is wrong.
Case = Callable[[int, Callable[[Any], None]], None]


class Worker:
    """One process, on cases [first, end)."""

    def __init__(self, folder: Path, number: int, case: Case, first: int, end: int) -> None:
        self.case, self.end = case, end
        self.failures_path = folder / f"worker-{number}.jsonl"
        self.log_path = folder / f"worker-{number}.log"
        for path in (self.failures_path, self.log_path):
            path.write_bytes(b"")
        self._status = mmap.mmap(-1, _STATUS_BYTES)
        self._read = 0
        self._watched = (0, 0)  # process and case
        self._waited = self._used = self._looked = 0.0
        self.done = self.failed = 0
        self.pid = 0
        self.start(first)

    def start(self, first: int) -> None:
        """A process for the cases from ``first`` on."""
        self._tell(first, self.done, self.failed)
        sys.stdout.flush()
        sys.stderr.flush()
        self._log_size = self.log_path.stat().st_size
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                self._work(first)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def _tell(self, index: int, done: int, failed: int, text: str = "") -> None:
        _HEAD.pack_into(self._status, 0, index, done, failed)
        data = text.encode()[: _STATUS_BYTES - _HEAD.size - 1] + b"\0"
        self._status[_HEAD.size : _HEAD.size + len(data)] = data

    def status(self) -> tuple[int, int, int, str]:
        text = self._status[_HEAD.size :].split(b"\0", 1)[0].decode(errors="replace")
        return (*_HEAD.unpack_from(self._status, 0), text)

    def _work(self, first: int) -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no worker outlives its parent
        log = os.open(self.log_path, os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 2)
        faulthandler.enable(sys.stderr)
        warnings.simplefilter("ignore")  # of what torch calls a prototype
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if not sanitize.running():  # their shadows are larger than any limit
            resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
        _, done, failed, _ = self.status()
        for index in range(first, self.end):
            spec: Any = None

            def tell(value: Any, index: int = index) -> None:
                nonlocal spec
                spec = value
                self._tell(index, done, failed, json.dumps(value))  # noqa: B023

            try:
                self.case(index, tell)
            except Exception as error:
                failed += 1
                self._record(index, error, spec)
            done += 1
        self._tell(self.end, done, failed)

    def _record(self, index: int, error: Exception, spec: Any) -> None:
        kind = getattr(error, "kind", None)
        details = getattr(error, "details", "")
        if kind is None:  # the fuzzer's own fault
            kind, details = f"fuzzer: {type(error).__name__}", traceback.format_exc()
        with self.failures_path.open("a") as file:
            failure = Failure(index, kind, details, spec)
            file.write(json.dumps(asdict(failure)) + "\n")

    def new_failures(self) -> list[Failure]:
        """Those written since the last call, but for a line that is being written."""
        with self.failures_path.open("rb") as file:
            file.seek(self._read)
            lines = [line for line in file if line.endswith(b"\n")]
        self._read += sum(map(len, lines))
        return [Failure(**json.loads(line)) for line in lines]

    def poll(self, time_limit: float) -> Failure | bool | None:
        """True: over. A failure: it died, or took too long. None: at work."""
        pid, code = os.waitpid(self.pid, os.WNOHANG)
        index, self.done, self.failed, text = self.status()
        if pid == 0:
            if not self._too_long(index, time_limit):
                return None
            os.kill(self.pid, signal.SIGABRT)  # faulthandler writes where it was
            time.sleep(1)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            reason = "hang"
        elif os.waitstatus_to_exitcode(code) == 0:
            return True
        else:
            status = os.waitstatus_to_exitcode(code)
            reason = f"died: {signal.Signals(-status).name}" if status < 0 else "died: exit"
        words = self._last_words()
        if _NO_MEMORY in words:
            reason = _NO_MEMORY
        self.done += 1
        self.failed += reason != _NO_MEMORY
        spec = json.loads(text) if text else None
        return Failure(index, reason, words, spec)

    def _too_long(self, index: int, time_limit: float) -> bool:
        """Whether the case has had its time: of processors, or five times as much of the clock.

        Counted from look to look, of which none counts for more than a second: whoever stops a
        machine stops this process too.
        """
        now, used = time.monotonic(), self._processor_seconds()
        if self._watched != (self.pid, index):
            self._watched, self._waited, self._used = (self.pid, index), 0.0, used
        else:
            self._waited += min(now - self._looked, 1.0)
        self._looked = now
        return used - self._used > time_limit or self._waited > 5 * time_limit

    def _processor_seconds(self) -> float:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def _last_words(self) -> str:
        """What the process wrote: where it was, and a sanitizer's report."""
        with self.log_path.open(errors="replace") as file:
            file.seek(self._log_size)
            lines = file.read().splitlines()
        reports = ("runtime error", "ERROR: ", "WARNING: ThreadSanitizer")
        telling = [x for x in lines if any(report in x for report in reports)]
        frames = [x for x in lines if "flashmla" in x and x.lstrip().startswith("#")]
        return "\n".join((telling + frames)[:8] or lines[:8])

    def go_on(self, index: int) -> bool:
        """Starts again behind a case. False: there is none left."""
        if index + 1 >= self.end:
            return False
        self.start(index + 1)
        return True


def run(
    folder: Path,
    case: Case,
    first: int,
    count: int,
    workers: int,
    time_limit: float = TIME_LIMIT,
    progress: bool = True,
) -> Iterator[Failure | tuple[int, int]]:
    """Runs cases [first, first + count). Yields failures, and at last (passed, failed)."""
    folder.mkdir(parents=True, exist_ok=True)
    edges = [first + count * i // workers for i in range(workers + 1)]
    ranges = [(a, b) for a, b in itertools.pairwise(edges) if a < b]
    everyone = [Worker(folder, i, case, a, b) for i, (a, b) in enumerate(ranges)]
    alive = list(everyone)
    began = last_line = time.monotonic()
    try:
        while alive:
            time.sleep(0.05)
            for worker in list(alive):
                over = worker.poll(time_limit)
                yield from worker.new_failures()
                if isinstance(over, Failure):
                    if over.kind != _NO_MEMORY:
                        yield over
                    over = not worker.go_on(over.index)
                if over:
                    alive.remove(worker)
            now = time.monotonic()
            if progress and now - last_line > 10:
                done, failed = (sum(getattr(w, n) for w in everyone) for n in ("done", "failed"))
                rate = done / (now - began)
                print(
                    f"{done} of {count}, {failed} failed, {rate:.0f} per second",
                    file=sys.stderr,
                    flush=True,
                )
                last_line = now
    finally:
        for worker in alive:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(worker.pid, signal.SIGKILL)
                os.waitpid(worker.pid, 0)
    done, failed = (sum(getattr(w, n) for w in everyone) for n in ("done", "failed"))
    yield done - failed, failed


def attempt(case: Callable[[], None], time_limit: float = TIME_LIMIT) -> Failure | None:
    """Runs one case in a process of its own."""

    def one(index: int, tell: Callable[[Any], None]) -> None:
        tell(None)
        case()

    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"fuzz-{os.getpid()}"
    try:
        for result in run(folder, one, 0, 1, 1, time_limit, progress=False):
            if isinstance(result, Failure):
                return result
    finally:
        for path in folder.glob("*"):
            path.unlink()
        folder.rmdir()
    return None
