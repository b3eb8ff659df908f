"""What the layers of an MLACache hold beside pages: as part of a file, and when something fails.

The layer classes are those of transformers, whose state is attributes: tensors, counters, flags, or
dicts of these by the number of a state. A file may set the attributes that are listed here, to
values of the kinds that are listed here, and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from torch_flash_mla._cache_file import Content, Fields, StoredTensors

# Tensors, and which dimension counts the sequences; None: a single number.
_TENSORS: dict[str, int | None] = {
    "keys": 0,
    "values": 0,
    "indexer_keys": 0,
    "indexer_position_ids": 1,
    "conv_states": 0,
    "recurrent_states": 0,
    "cumulative_length": None,  # an int in layers that grow
    "indexer_cumulative_length": None,
}
_COUNTS = {
    "batch_size",
    "conv_kernel_size",
    "cumulative_length",
    "cumulative_length_int",
    "k_head_dim",
    "max_batch_size",
    "num_heads",
    "v_head_dim",
}
_FLAGS = {
    "has_previous_state",
    "is_conv_states_initialized",
    "is_indexer_initialized",
    "is_initialized",
    "is_recurrent_states_initialized",
    "record_past",
}
_DTYPES = {"dtype", "indexer_dtype"}
_DEVICES = {"device", "indexer_device"}
_STORED = {*_TENSORS, *_COUNTS, *_FLAGS, *_DTYPES, *_DEVICES}

# A layer has these before it is used, from the config.
_GIVEN = {
    "_is_croppable",
    "_sliding_window_tensor",
    "max_cache_len",
    "number_of_states",
    "sliding_window",
}

_ELEMENT_TYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
_MOST = 2**31 - 1  # of a counter


def encode(
    layer: Any, name: str, elsewhere: set[str], contents: dict[str, Content]
) -> dict[str, Any]:
    """The state of a layer as JSON.

    Args:
        layer: a cache layer.
        name: what its tensors are called in the file.
        elsewhere: attributes that others keep.
        contents: where its tensors are put.

    Raises:
        ValueError: a state that no file can hold.
    """
    state = []
    for attribute, value in vars(layer).items():
        if attribute in elsewhere or attribute in _GIVEN:
            continue
        try:
            if attribute not in _STORED:
                raise TypeError(f"{name}.{attribute} is unknown")
            state.append([attribute, _encoded(value, f"{name}.{attribute}", contents)])
        except TypeError as error:
            what = type(layer).__name__
            raise ValueError(f"{name}: a {what} cannot be stored: {error}") from error
    return {"class": type(layer).__name__, "values": {"dict": state}}


def _encoded(value: Any, name: str, contents: dict[str, Content]) -> Any:
    """Plain values as they are, others as a one-entry dict that names their kind."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, Tensor):
        contents[name] = Content.of(value)
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device) and value.type == "cpu":
        return {"device": "cpu"}
    if isinstance(value, dict) and all(type(key) is int for key in value):
        return {"dict": [[k, _encoded(v, f"{name}.{k}", contents)] for k, v in value.items()]}
    raise TypeError(f"{name} is a {type(value).__name__}")


def decode(
    layer: Any, name: str, elsewhere: set[str], stored: Any, tensors: StoredTensors, batch: int
) -> dict[str, Any]:
    """The attributes that a file gives to a new layer, the inverse of :func:`encode`.

    Args:
        layer: as the config makes it.
        name: what its tensors are called in the file.
        elsewhere: attributes that others keep.
        stored: what ``encode`` returned.
        tensors: those of the file.
        batch: sequences in the cache.

    Raises:
        ValueError: another class of layer; an attribute or a value that a file may not set.
    """
    fields = Fields(stored, name)
    fields.choice("class", [type(layer).__name__])
    decoder = _Decoder(tensors, batch)
    attributes: dict[str, Any] = {}
    for attribute, value in Fields(fields["values"], name).sequence("dict"):
        whole = f"{name}.{attribute}"
        if attribute not in _STORED or attribute in elsewhere or attribute in attributes:
            raise ValueError(f"{whole}: not an attribute that a file may set")
        if isinstance(value, dict) and "dict" in value:
            wanted = vars(layer).get(attribute)
            if not isinstance(wanted, dict):
                raise ValueError(f"{whole}: got several states, expected one")
            entries = _entries(value["dict"], list(wanted), whole)
            attributes[attribute] = {
                key: decoder.value(attribute, entry, f"{whole}.{key}")
                for key, entry in entries.items()
            }
        else:
            attributes[attribute] = decoder.value(attribute, value, whole)
    return attributes


def _entries(pairs: Any, keys: list[int], name: str) -> dict[int, Any]:
    if not isinstance(pairs, list) or [pair[0] for pair in pairs] != keys:
        raise ValueError(f"{name}: expected the states {keys}")
    return {key: entry for key, (_, entry) in zip(keys, pairs, strict=True)}


class _Decoder:
    def __init__(self, tensors: StoredTensors, batch: int) -> None:
        self.tensors = tensors
        self.batch = batch

    def value(self, attribute: str, value: Any, name: str) -> Any:
        if value == {"tensor": name} and attribute in _TENSORS:
            return self.tensor(attribute, name)
        if isinstance(value, dict) and list(value) == ["dtype"] and attribute in _DTYPES:
            return _ELEMENT_TYPES[Fields(value, name).choice("dtype", _ELEMENT_TYPES)]
        if value == {"device": "cpu"} and attribute in _DEVICES:
            return torch.device("cpu")
        if type(value) is bool and attribute in _FLAGS:
            return value
        if type(value) is int and attribute in _COUNTS and 0 <= value <= _MOST:
            if attribute == "batch_size" and value != self.batch:
                raise ValueError(f"{name}: got {value}, expected {self.batch}")
            return value
        if value is None and attribute not in _FLAGS:
            return None
        raise ValueError(f"{name}: not a value that a file may set")

    def tensor(self, attribute: str, name: str) -> Tensor:
        place = self.tensors.place(name)
        dimension = _TENSORS[attribute]
        if dimension is None:
            self.tensors.check(name, torch.int64, ())
        elif attribute == "indexer_position_ids":
            self.tensors.check(name, torch.int64, place.shape)
        elif not place.dtype.is_floating_point:
            raise ValueError(f"{name}: got {place.dtype}, expected a floating point type")
        if dimension is not None and place.nbytes > 0:
            found = place.shape[dimension : dimension + 1]
            if found != (self.batch,):
                raise ValueError(
                    f"{name}: got shape {list(place.shape)}, expected {self.batch} sequences in "
                    f"dimension {dimension}"
                )
        tensor = self.tensors[name]
        if dimension is None and not 0 <= int(tensor) <= _MOST:
            raise ValueError(f"{name}: got {int(tensor)}, expected 0 .. {_MOST}")
        return tensor


@contextlib.contextmanager
def unchanged_on_error(layers: Iterable[Any]) -> Iterator[None]:
    """Gives layers their attributes back if the block raises.

    Layers of transformers replace what they change, but for counters in tensors, which are
    remembered by value.
    """
    before = []
    for layer in layers:
        attributes = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(layer).items()}
        numbers = [
            (value, value.clone())
            for value in attributes.values()
            if isinstance(value, Tensor) and value.dim() == 0
        ]
        before.append((layer, attributes, numbers))
    try:
        yield
    except BaseException:
        for layer, attributes, numbers in before:
            for tensor, value in numbers:
                tensor.copy_(value)
            vars(layer).clear()
            vars(layer).update(attributes)
        raise
