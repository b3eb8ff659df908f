"""The text the tiny model learns from: the standard library's Python sources.

Whether a file is held out depends on its path inside the library alone, so the split is the same
on every machine and nearly the same for every Python version.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import numpy as np
import tokenizer

HELD_OUT_SHARE = 0.05
# Third-party packages, byte code, tests, generated tables and old grammars.
SKIP_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
SKIP_FOLDERS |= {"encodings", "pydoc_data", "lib-dynload", "lib2to3", "ensurepip"}
SKIP_FILES = {"_sysconfigdata", "sre_constants", "token", "keyword", "entities", "html_entities"}
HELD_OUT_FILE = Path(__file__).with_name("heldout.txt")


def _wanted(path: Path) -> bool:
    """Whether the file at ``path`` (relative to the library) belongs to the data at all."""
    if SKIP_FOLDERS.intersection(path.parts[:-1]) or path.parts[0].startswith("config-"):
        return False
    return not any(path.stem == name or path.stem.startswith(name + "_") for name in SKIP_FILES)


def is_held_out(path: Path) -> bool:
    """Whether the file at ``path`` (relative to the library) is kept out of training."""
    digest = hashlib.sha256(path.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def read_sources(held_out: bool, root: Path | None = None) -> list[str]:
    """The sources of one side of the split, ordered by the hash of their path."""
    root = root or Path(sysconfig.get_path("stdlib"))
    found: list[tuple[str, str]] = []
    for file in root.rglob("*.py"):
        path = file.relative_to(root)
        if not _wanted(path) or is_held_out(path) != held_out:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            found.append((hashlib.sha256(path.as_posix().encode()).hexdigest(), text))
    return [text for _, text in sorted(found)]


def join(texts: list[str]) -> str:
    """One text in which each source is preceded by the separator token."""
    return "".join(tokenizer.EOT + text for text in texts)


def training_tokens() -> np.ndarray:
    """Token ids of all training sources."""
    return np.array(tokenizer.encode(join(read_sources(held_out=False))), dtype=np.int64)


def held_out_tokens() -> np.ndarray:
    """Token ids of the committed held-out text."""
    text = HELD_OUT_FILE.read_bytes().decode("utf-8")
    return np.array(tokenizer.encode(text), dtype=np.int64)


if __name__ == "__main__":
    HELD_OUT_FILE.write_bytes(join(read_sources(held_out=True)).encode("utf-8"))
    print(f"{HELD_OUT_FILE}: {HELD_OUT_FILE.stat().st_size} bytes")
