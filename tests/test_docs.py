"""Every Python example of the documentation runs, and the site builds without a warning.

Adds about half a minute to `make test SLOW=1` on two cores.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page
    for folder in (".", "docs", "docs/api", "examples", "examples/tiny_model", "examples/cpp")
    for page in (ROOT / folder).glob("*.md")
)


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """(line of its first line, code) of the fenced blocks that say they are Python."""
    text = page.read_text()
    blocks = re.finditer(r"^```(?:python|py)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in blocks]


WITH_EXAMPLES = [page for page in PAGES if python_blocks(page)]


def test_examples_are_found() -> None:
    """No block hides behind another spelling of its fence."""
    names = {str(page.relative_to(ROOT)) for page in WITH_EXAMPLES}
    assert {"README.md", "docs/transformers.md", "docs/own_model.md"} <= names
    for page in PAGES:
        opened = re.findall(r"^\s*(?:```|~~~)+ *(?:python|py|pycon)\b.*$", page.read_text(), re.M)
        assert len(opened) == len(python_blocks(page)), page


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after the other like a program, in a folder that has examples/."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # the models are tiny
    names: dict[str, object] = {"__name__": "__main__"}
    for line, code in python_blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), names)


def test_promises_have_their_tests() -> None:
    """docs/reliability.md names a test for each: they exist under these names."""
    page = (ROOT / "docs" / "reliability.md").read_text()
    files_of_caches = page.index("## Files of caches")
    named = re.finditer(r"`(?:(test_\w+\.py)(?:::)?)?((?:Test\w+::)?test_\w+)?`", page)
    found = 0
    for name in named:
        file, test = name.groups()
        if not (file or test):
            continue
        if file is None:
            assert name.start() > files_of_caches, name[0]
            file = "test_cache_file.py"
        code = (ROOT / "tests" / file).read_text()
        for part in (test or "").split("::"):
            assert re.search(rf"^ *(?:def|class) {part}\b", code, re.MULTILINE) or not part, name[0]
        found += 1
    assert found > 60


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command += [str(ROOT / "docs"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    operators = (tmp_path / "api" / "operators.html").read_text()
    assert 'id="torch_flash_mla.ops.mla_attention"' in operators
    for page in (ROOT / "docs").rglob("*.md"):
        built = tmp_path / page.relative_to(ROOT / "docs").with_suffix(".html")
        assert built.exists(), built
