"""Patched models of transformers against stock ones: same tokens, same logits, at every step.

Three kinds of evidence keep these comparisons honest: the operator is called once per MLA layer and
forward pass and ``expand_kv`` never (``watch``); random weights are large enough for attention to
matter; and four deliberate faults (``FAULTS``) must each make the same comparison fail.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import transformers
from packaging.version import Version
from programs import ROOT
from transformers import PreTrainedModel
from transformers_cases import (
    TINY_MODEL,
    families,
    refused_families,
    shared_key_families,
    small_model,
    tiny_model,
)
from transformers_compare import (
    FAULTS,
    MODES,
    SHARED_KEY_FAULTS,
    check_fault,
    check_format,
    check_logits,
    check_mode,
    check_shared_key_fault,
)

from torch_flash_mla.formats import PACKED_FORMATS
from torch_flash_mla.integrations.transformers import patch

# Plain; one key head that is its value; odd head count; sparse with sinks; sparse, layers share
# keys or have no rope; dims differ per layer, with a sliding window.
FAST_FAMILIES = (
    "deepseek_v3",
    "deepseek_v4",
    "minicpm3",
    "hy_v4",
    "mistral_large4",
    "dots3_note",
)
TINY = "tiny_model"

ModelOf = Callable[[str], PreTrainedModel]


def cases(what: Any, fast: Callable[[str, str], bool], but: tuple[str, ...] = ()) -> list[Any]:
    """Every family (``but`` some) with every entry of ``what``; all but ``fast`` ones are slow."""
    untrained = not (TINY_MODEL / "model.safetensors").exists()
    skip = pytest.mark.skipif(untrained, reason="examples/tiny_model has no weights")
    params = []
    for family in (*(x for x in families() if x not in but), TINY):
        for entry in what:
            marks = [] if fast(family, entry) else [pytest.mark.slow]
            marks += [skip] if family == TINY else []
            params.append(pytest.param(family, entry, marks=marks, id=f"{family}-{entry}"))
    return params


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model_of() -> ModelOf:
    """Stock models, built once per family. Tests leave them unpatched."""
    models: dict[str, PreTrainedModel] = {}

    def get(family: str) -> PreTrainedModel:
        if family not in models:
            models[family] = tiny_model() if family == TINY else small_model(family)
        return models[family]

    return get


def test_the_families_are_found() -> None:
    assert {"deepseek_v2", "deepseek_v3", "kimi_k25", "minicpm3"} <= set(families())
    assert "deepseek_v4" in shared_key_families()
    assert len(families()) >= 9


def test_the_readme_lists_them() -> None:
    """``make test-transformers README=1`` writes the list, by the release that first had each."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index("<!-- families -->") : text.index("<!-- end of families -->")]
    listed: set[str] = set()
    for version, names in re.findall(r"since\s([\d.]+)\s([^;]*)", section):
        if Version(version) <= Version(transformers.__version__):
            listed |= set(re.findall(r"`(\w+)`", names))
    assert listed == set(families())


@pytest.mark.parametrize("family", refused_families())
def test_sparse_families_that_cache_expanded_keys_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match=r"sparse MLA needs transformers >= 5\.18"):
        patch(small_model(family))


@pytest.mark.parametrize(
    ("family", "mode"),
    cases(MODES, lambda f, mode: f == "deepseek_v3" or (f in FAST_FAMILIES and mode == "padded")),
)
def test_same_text_as_stock(model_of: ModelOf, family: str, mode: str) -> None:
    check_mode(model_of(family), MODES[mode])


@pytest.mark.parametrize(("family", "what"), cases(["logits"], lambda f, _: f in FAST_FAMILIES))
def test_same_logits_as_stock(model_of: ModelOf, family: str, what: str) -> None:
    check_logits(model_of(family))


@pytest.mark.parametrize(
    ("family", "kv_cache_dtype"),
    cases(PACKED_FORMATS, lambda f, _: f == "deepseek_v3", shared_key_families()),
)
def test_packed_formats(model_of: ModelOf, family: str, kv_cache_dtype: str) -> None:
    check_format(model_of(family), kv_cache_dtype)


@pytest.mark.parametrize(
    ("family", "fault"), cases(FAULTS, lambda f, _: f in FAST_FAMILIES, shared_key_families())
)
def test_a_fault_is_noticed(
    model_of: ModelOf, family: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_fault(model_of(family), fault, monkeypatch)


@pytest.mark.parametrize("fault", SHARED_KEY_FAULTS)
@pytest.mark.parametrize("family", shared_key_families())
def test_a_fault_of_shared_keys_is_noticed(
    model_of: ModelOf, family: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_shared_key_fault(model_of(family), fault, monkeypatch)
