"""Compares patched models with stock ones in several releases of transformers.

Each release lives in an environment beside the present one, build/transformers/VERSION. In each,
every family that this release has runs through tests/test_transformers.py: logits, greedy, left
padding, beams, assisted decoding, caches of all kinds and cache formats ::

    python tools/test_transformers.py 5.15.0 5.24.0              # counts per release
    python tools/test_transformers.py 5.15.0 5.24.0 --readme     # and the list in README.md
    python tools/test_transformers.py 5.15.0 5.24.0 --reports    # counts of the last run of each
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from side_environment import side_environment

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / "build" / "transformers"
README = ROOT / "README.md"
BEGIN, END = "<!-- families -->\n", "<!-- end of families -->\n"
# Everything but the deliberate faults, which say something about the comparison, and the list that
# this program writes.
TESTS = ("tests/test_transformers.py", "-k", "not fault and not readme")
ALSO = {"deepseek_v3": "Kimi K2", "kimi_k25": "Kimi K2.5"}


@dataclass
class Result:
    """What one release gave."""

    version: str
    counts: Counter[str]  # passed, failed, skipped
    families: dict[str, Counter[str]]
    seconds: float

    @property
    def working(self) -> set[str]:
        """Families of which something passed and nothing failed."""
        return {f for f, n in self.families.items() if n["passed"] and not n["failed"]}


def report_of(version: str) -> Path:
    return ENVIRONMENTS / f"{version}.xml"


def run(version: str, arguments: list[str]) -> None:
    """The tests in one release; their output is shown, their report written."""
    python = side_environment(ENVIRONMENTS / version, [f"transformers=={version}"])
    report_of(version).unlink(missing_ok=True)
    pytest = [python, "-m", "pytest", "-q", "-m", "not exhaustive", "-p", "no:cacheprovider"]
    subprocess.run(
        [*pytest, f"--junitxml={report_of(version)}", *TESTS, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def read_report(version: str) -> Result:
    """What the report of a release says."""
    suite = ElementTree.parse(report_of(version)).getroot().find("testsuite")
    assert suite is not None
    result = Result(version, Counter(), {}, float(suite.get("time", 0)))
    for case in suite.iter("testcase"):
        outcome = "passed"
        if case.find("failure") is not None or case.find("error") is not None:
            outcome = "failed"
        elif case.find("skipped") is not None:
            outcome = "skipped"
        result.counts[outcome] += 1
        # test_same_text_as_stock[deepseek_v3-greedy]; refusals are of families that do not work
        name = re.fullmatch(r"(\w+)\[(\w+)-.*\]", case.get("name", ""))
        if name is not None and name[2] != "tiny_model":
            result.families.setdefault(name[2], Counter())[outcome] += 1
    return result


def families_section(results: list[Result]) -> str:
    """The part of the README between the two marks, from the runs of several releases."""
    results = sorted(results, key=lambda result: [int(x) for x in result.version.split(".")])
    since: dict[str, list[str]] = {}
    seen: set[str] = set()
    for result in results:
        since[result.version] = sorted(result.working - seen)
        seen |= result.working
    versions = [result.version for result in results]
    parts = []
    for version, names in since.items():
        named = ", ".join(f"`{n}`" + (f" ({ALSO[n]})" if n in ALSO else "") for n in names)
        parts += [f"since {version} {named}"] if names else []
    text = (
        "Families are found by structure. Compared with stock in transformers "
        f"{', '.join(versions[:-1])} and {versions[-1]}: {'; '.join(parts)}."
    )
    return textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False) + "\n"


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument("--readme", action="store_true", help="write the list in README.md")
    parser.add_argument("--reports", action="store_true", help="read the last reports, run nothing")
    options, arguments = parser.parse_known_args()
    if not options.reports:
        for version in options.versions:
            run(version, arguments)
    results = [read_report(version) for version in options.versions]
    width = max(len(result.version) for result in results)
    for result in results:
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(result.counts.items()))
        print(
            f"transformers {result.version:{width}}  {len(result.working)} families  {counts}"
            f"  {result.seconds:.0f} s"
        )
        for family, of_family in result.families.items():
            if of_family["failed"]:
                print(f"  {family}: {of_family['failed']} failed, {of_family['passed']} passed")
    if options.readme:
        text = README.read_text()
        begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        README.write_text(text[:begin] + families_section(results) + text[end:])
    if any(result.counts["failed"] or not result.counts["passed"] for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
