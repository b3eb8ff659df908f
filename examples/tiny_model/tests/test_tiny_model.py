"""The tiny model: its tokenizer, its data split and its committed weights."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

FOLDER = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(FOLDER))
import data  # noqa: E402
import tokenizer  # noqa: E402

sys.path.remove(str(FOLDER))

transformers = pytest.importorskip("transformers")

TEXTS = [
    "",
    " ",
    "def f(x):\n    if x:\n        return 1\n\treturn 2\r\n",
    "\n".join(" " * n + f"x{n}" for n in range(70)),
    "a  b   c     d\t \t  \t e" + " " * 1000,
    "naïve “ü” 漢字 🙂  \n    é\x00\x7f\u2028 \xa0  x",
    "<|endoftext|>import os\n<|endoftext|><|endoftext|>",
]


@pytest.fixture(scope="module")
def fast() -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    if not (FOLDER / "model.safetensors").exists():
        pytest.skip("the weights are not here: examples/tiny_model/train.py makes them")
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16).eval()


def random_text(seed: int) -> str:
    generator = random.Random(seed)
    pieces = [" ", "  ", "    ", "\n", "\t", "x", "def", "é", "漢", "🙂", "\\", "'", "\x01"]
    return "".join(generator.choices(pieces, k=400))


@pytest.mark.parametrize("text", TEXTS + [random_text(seed) for seed in range(5)])
def test_round_trip(text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(ids)) == text
    assert tokenizer.byte_length(ids) == len(text.replace(tokenizer.EOT, "").encode())


@pytest.mark.parametrize("text", TEXTS + [random_text(seed) for seed in range(5)])
def test_fast_tokenizer_agrees(text: str, fast: transformers.PreTrainedTokenizerBase) -> None:
    ids = fast(text)["input_ids"]
    assert ids == tokenizer.encode(text)
    assert fast.decode(ids) == text


def test_vocabulary(fast: transformers.PreTrainedTokenizerBase) -> None:
    assert len(fast) == tokenizer.VOCAB_SIZE
    assert fast.eos_token_id == fast.bos_token_id == tokenizer.EOT_ID
    assert tokenizer.encode("        pass") == [tokenizer.SPACE_IDS[8], *b"pass"]


def test_stream_holds_incomplete_characters_back() -> None:
    assert list(tokenizer.decode_stream("é".encode())) == ["é"]
    assert list(tokenizer.decode_stream(b"\xc3")) == ["\ufffd"]


def test_split_depends_on_the_path_alone(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"m{number}.py").write_text(f"x = {number}\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_x.py").write_text("never seen\n")
    kept, held = (data.read_sources(side, tmp_path) for side in (False, True))
    assert len(kept) + len(held) == 200
    assert 0 < len(held) < 30
    assert sorted(held) == sorted(
        f"x = {n}\n" for n in range(200) if data.is_held_out(Path(f"m{n}.py"))
    )


def test_held_out_text_is_not_in_the_training_sources() -> None:
    files = data.HELD_OUT_FILE.read_bytes().decode().split(tokenizer.EOT)[1:]
    assert len(files) > 10
    assert not set(files) & set(data.read_sources(held_out=False))


def test_size(model: transformers.PreTrainedModel) -> None:
    assert (FOLDER / "model.safetensors").stat().st_size < 14e6
    assert model.config.kv_lora_rank == 512
    assert model.config.qk_rope_head_dim == 64
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@torch.inference_mode()
def test_held_out_loss(model: transformers.PreTrainedModel) -> None:
    tokens = torch.from_numpy(data.held_out_tokens())
    starts = range(4096, len(tokens) - 1025, len(tokens) // 6)
    ids = torch.stack([tokens[start : start + 1025] for start in starts])
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss < 1.6  # nats per token; 5.57 is chance


@pytest.mark.parametrize("sample", [False, True])
def test_text_is_not_degenerate(
    sample: bool, model: transformers.PreTrainedModel, fast: transformers.PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(0)
    prompt = fast("class Reader:\n    def __init__(self, ", return_tensors="pt")
    options = {"temperature": 0.8, "top_k": 40} if sample else {}
    out = model.generate(
        **prompt, do_sample=sample, max_new_tokens=160, min_new_tokens=160, **options
    )
    text = fast.decode(out[0, prompt["input_ids"].shape[1] :])
    assert text.isascii() or sample
    assert "self" in text
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert len(lines) >= 4
    most_common = Counter(text.split()).most_common(1)[0][1]
    assert most_common < 0.5 * len(text.split())
