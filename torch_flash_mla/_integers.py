"""Whole numbers as Python hands them over: what can be an index, but no bool, within bounds."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """``value`` as an int.

    Raises:
        TypeError: it is no integer: a float, a bool, a string.
        ValueError: it is outside ``least`` .. ``most``.
    """
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        raise TypeError(f"{name}: got {value}, expected an integer")
    try:
        number = operator.index(value)
    except TypeError:
        what = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name}: got {what}, expected an integer") from None
    if (least is not None and number < least) or (most is not None and number > most):
        bounds = f"at least {least}" if most is None else f"{least} .. {most}"
        raise ValueError(f"{name}: got {number}, expected {bounds}")
    return number


def integers(
    name: str, values: Tensor | Iterable[Any], least: int, most: int | None = None
) -> list[int]:
    """A list or tensor [n] of whole numbers as a list of ints.

    Raises:
        TypeError: no such list, or an entry that is no integer.
        ValueError: an entry outside ``least`` .. ``most``.
    """
    if isinstance(values, Tensor):
        if values.dim() != 1:
            raise TypeError(f"{name}: got shape {list(values.shape)}, expected one dimension")
        values = values.tolist()
    elif isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: got {values!r}, expected a list of integers")
    return [integer(f"{name}[{i}]", value, least, most) for i, value in enumerate(values)]
