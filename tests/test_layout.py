"""The rooms of csrc/kernels: which of them may include which."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "kernels"
INCLUDE = re.compile(r'#include "(?:kernels/)?([^"]+)"')

MAY_INCLUDE = {
    "levels": {"attention", "formats", "call", "arithmetic", "simd"},
    "attention": {"formats", "call", "arithmetic", "simd"},
    "formats": {"call", "arithmetic", "simd"},
    "call": {"arithmetic"},
    "simd": {"arithmetic"},
    "arithmetic": set(),
}


def wrong_includes(kernels: Path) -> list[str]:
    """Includes that go against the direction, and files that stand in no room."""
    wrong = []
    for file in sorted(kernels.rglob("*")):
        if file.suffix not in (".h", ".cpp"):
            continue
        room, *rest = file.relative_to(kernels).parts
        if room not in MAY_INCLUDE or len(rest) != 1:
            wrong.append(f"{file.relative_to(kernels)}: in no room")
            continue
        for name in INCLUDE.findall(file.read_text()):
            target = name.split("/")[0]
            if target != room and target not in MAY_INCLUDE[room]:
                wrong.append(f"{room}/{rest[0]} includes {name}")
    return wrong


def test_includes_go_one_way():
    assert {p.name for p in KERNELS.iterdir()} == set(MAY_INCLUDE)
    assert wrong_includes(KERNELS) == []


def test_a_wrong_include_is_found(tmp_path):
    for room in MAY_INCLUDE:
        (tmp_path / room).mkdir()
    (tmp_path / "call" / "plan.cpp").write_text('#include "kernels/attention/mask.h"\n')
    (tmp_path / "simd" / "avx2.h").write_text('#include "kernels/arithmetic/numeric.h"\n')
    (tmp_path / "levels" / "level.h").write_text('#include "ops/ops.h"\n')
    (tmp_path / "stray.h").write_text("")
    assert wrong_includes(tmp_path) == [
        "call/plan.cpp includes attention/mask.h",
        "levels/level.h includes ops/ops.h",
        "stray.h: in no room",
    ]
