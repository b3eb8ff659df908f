"""What vLLM will look for is there, and costs nothing where vLLM is not. The rest: with_vllm/."""

from __future__ import annotations

import importlib
import re

import pytest
from programs import ROOT, run_python

GROUPS = ("vllm.platform_plugins", "vllm.general_plugins")


@pytest.mark.parametrize("group", GROUPS)
def test_entry_points_lead_somewhere(group: str) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split(f'[project.entry-points."{group}"]')[1].split("\n[")[0]
    targets = re.findall(r'^torch_flash_mla = "([\w.]+):(\w+)"$', section, re.MULTILINE)
    assert len(targets) == 1
    module, function = targets[0]
    assert callable(getattr(importlib.import_module(module), function))


def test_nothing_of_vllm_is_imported() -> None:
    code = "import sys, torch_flash_mla, torch_flash_mla.integrations.vllm\n"
    assert run_python(code + "print([m for m in sys.modules if m.split('.')[0] == 'vllm'])") == (
        "[]\n"
    )


def test_switched_off_without_looking_at_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = importlib.import_module("torch_flash_mla.integrations.vllm")
    monkeypatch.setenv("TORCH_FLASH_MLA_DISABLE", "1")
    monkeypatch.setattr(plugin, "_vllm_version", lambda: pytest.fail("vLLM was looked at"))
    assert plugin.platform_plugin() is None
    plugin.general_plugin()
