"""Byte tokenizer with one token for each common run of spaces.

The vocabulary has 262 entries:

* ids 0 to 255 are the bytes of the UTF-8 text,
* ids 256 to 260 stand for runs of 2, 4, 8, 12 and 16 spaces,
* id 261 is ``<|endoftext|>``, which separates files.

A run of ``n`` spaces is written with the longest pieces first (16, 12, 8, 4, 2, 1), so Python's
usual indentation levels cost one or two tokens.  Any string survives ``decode(encode(text))``
unchanged, except that the literal text ``<|endoftext|>`` becomes the separator token (and is
written back as such).

``python tokenizer.py`` writes the same tokenizer as ``tokenizer.json`` and
``tokenizer_config.json`` for ``transformers.AutoTokenizer``; there the space tokens are merges of
a byte-level BPE, which give exactly the same ids.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

EOT = "<|endoftext|>"
SPACE_RUNS = (2, 4, 8, 12, 16)
SPACE_IDS = {run: 256 + i for i, run in enumerate(SPACE_RUNS)}
EOT_ID = 256 + len(SPACE_RUNS)
VOCAB_SIZE = EOT_ID + 1

_PIECES: list[bytes] = (
    [bytes([i]) for i in range(256)] + [b" " * run for run in SPACE_RUNS] + [EOT.encode()]
)
_RUN = re.compile(rb"( {2,})")


def _split_run(length: int) -> list[int]:
    """Ids of a run of ``length`` spaces, longest pieces first."""
    ids: list[int] = []
    for run in reversed(SPACE_RUNS):
        count, length = divmod(length, run)
        ids += [SPACE_IDS[run]] * count
    return ids + [32] * length


def encode(text: str) -> list[int]:
    """Token ids of ``text``."""
    ids: list[int] = []
    for number, part in enumerate(text.split(EOT)):
        if number:
            ids.append(EOT_ID)
        for piece in _RUN.split(part.encode("utf-8")):
            if piece.startswith(b"  "):
                ids += _split_run(len(piece))
            else:
                ids += piece
    return ids


def decode(ids: Iterable[int], errors: str = "replace") -> str:
    """Text of token ``ids``; bytes that are not UTF-8 are treated as ``errors`` says."""
    return b"".join(_PIECES[i] for i in ids).decode("utf-8", errors)


def decode_stream(ids: Iterable[int]) -> Iterator[str]:
    """Text of each token as it arrives; a character is held back until all its bytes are here."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        text = decoder.decode(_PIECES[i])
        if text:
            yield text
    text = decoder.decode(b"", final=True)
    if text:
        yield text


def byte_length(ids: Iterable[int]) -> int:
    """Number of UTF-8 bytes the ``ids`` stand for (the separator counts as none)."""
    return sum(0 if i == EOT_ID else len(_PIECES[i]) for i in ids)


def _byte_characters() -> list[str]:
    """The printable stand-in that byte-level BPE uses for each of the 256 bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    table = {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(hidden)}
    return [table[b] for b in range(256)]


def build(folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = _byte_characters()
    space = characters[32]
    vocab = {character: i for i, character in enumerate(characters)}
    vocab |= {space * run: i for run, i in SPACE_IDS.items()}
    merges = [(space * a, space * b) for a, b in ((1, 1), (2, 2), (4, 4), (8, 8), (8, 4))]
    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([EOT])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=EOT,
        eos_token=EOT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    # The name that every release of transformers knows.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    build(Path(__file__).parent)
