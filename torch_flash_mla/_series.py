"""The series of torch that the package serves, and the library of each.

The one list of them. ``setup.py`` and ``tools/`` read this file by itself, so it imports nothing.
"""

from __future__ import annotations

# `make wheel` compiles operators for each of these; docs/installing.md says what ran on them.
SUPPORTED_TORCH = ("2.10", "2.11", "2.12", "2.13", "2.14", "2.15")


def series_of(version: str) -> str:
    """``"2.14"`` of ``"2.14.1+cu130"``."""
    return ".".join(version.split(".")[:2])


def order(series: str) -> tuple[int, ...]:
    """A key that sorts series by age."""
    return tuple(map(int, series.split(".")))


def library_name(series: str) -> str:
    """File name of the operators for ``series``, in the package's folder."""
    return f"_C_torch{series.replace('.', '')}.so"


def requirement(served: tuple[str, ...]) -> str:
    """What pip is told of a package that has the libraries of ``served``."""
    if not served:
        return f"torch>={SUPPORTED_TORCH[0]}"
    served = tuple(sorted(served, key=order))
    if len(served) == 1:
        return f"torch=={served[0]}.*"
    major, minor = order(served[-1])
    between = [s for s in SUPPORTED_TORCH if order(served[0]) < order(s) < order(served[-1])]
    missing = [f",!={series}.*" for series in between if series not in served]
    return f"torch>={served[0]},<{major}.{minor + 1}{''.join(missing)}"
