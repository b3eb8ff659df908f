"""How a layer reads its kv_b_proj: one of three ways, looked at anew at each call.

The op takes ``w_kv_b [H, P + V, L]``, a matrix. Where that comes from depends on what kv_b_proj is
at that moment:

* *in place*: a linear layer that is nothing else; the matrix is a view of its weight. Where
  accelerate keeps the weight in memory or in a file between calls, it is taken from there, as
  accelerate's own hook does before each call of the layer.
* *dense copy*: a kind that announces itself as a matrix in other clothes (quantised weights that
  can be dequantised, adapters that can be merged). Its products with the unit vectors are kept, and
  hold as long as the bytes they were made of: a checksum of those is compared at each call. What
  makes the copy is itself compared with what kv_b_proj gives for other inputs.
* *expanded*: everything else (hooks, a bias, a forward of its own, something that is being trained,
  weights that are elsewhere, a class nobody knows). There is no matrix then: the layer runs
  kv_b_proj over the latents and attends to the expanded keys, as the stock layer does.

Copies live outside of the modules: state_dict, deepcopy and pickling never see them.
"""

from __future__ import annotations

import enum
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Types of a weight that is nothing but its values; torch.export traces with the last two.
_PLAIN_TYPES = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)

# Packages whose layers are functions of their tensors and plain attributes.
_QUANTISERS = {"bitsandbytes", "compressed_tensors", "hqq", "optimum", "torchao", "transformers"}

_LINEAR_FORWARD = nn.Linear.forward
_CONSTANTS = {type(None), bool, int, float, str, bytes, torch.dtype, torch.device}

# What every module has: calls are looked at by _is_intercepted, parts one by one.
_OF_ALL_MODULES = vars(nn.Module()).keys() - {"training", "_parameters", "_buffers"}


class Way(enum.Enum):
    """How kv_b_proj is read."""

    IN_PLACE = "in place"
    DENSE_COPY = "dense copy"
    EXPANDED = "expanded"


@dataclass(frozen=True)
class Reading:
    """How kv_b_proj is read, and why so."""

    way: Way
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.way.value}: {self.reason}" if self.reason else self.way.value


@dataclass
class _Copy:
    """What is known of a kv_b_proj that is not read in place.

    Attributes:
        attributes: of the module and its parts.
        contents: checksums of its tensors.
        weight: [out_features, L]; None: it is no matrix, or does not hold still.
        reason: what it is made of, or why there is no weight.
        settled: whether a second call found the same contents, or it is known to be no matrix.
    """

    attributes: tuple[Any, ...]
    contents: list[_Checksum]
    weight: Tensor | None
    reason: str
    settled: bool = False


_ELSEWHERE = "its weights are elsewhere"
_Precision: TypeAlias = tuple[torch.dtype, torch.dtype | None]  # of the latents; of autocast
_copies: WeakKeyDictionary[nn.Module, dict[_Precision, _Copy]] = WeakKeyDictionary()


def kv_b_weight(proj: Any, heads: int, latent_dim: int, dtype: torch.dtype) -> Tensor | None:
    """The weight of ``proj`` as ``[heads, P + V, latent_dim]``, per head the rows ``[nope | v]``.

    Differentiable with respect to the weight of a plain linear layer. The number of heads is the
    caller's (that of the query), so a tensor-parallel shard works like the whole.

    Returns:
        None where ``proj`` has to be applied to the latents.
    """
    weight = _weight_in_place(proj)
    if weight is None:
        weight = _dense_copy(proj, latent_dim, dtype)[0]
    return None if weight is None else weight.to(dtype).view(heads, -1, latent_dim)


def reading(proj: Any, latent_dim: int, dtype: torch.dtype) -> Reading:
    """How :func:`kv_b_weight` reads ``proj`` as it is now, for latents of ``dtype``."""
    if _weight_in_place(proj) is not None:
        return Reading(Way.IN_PLACE, "offloaded by accelerate" if _offloaded(proj) else "")
    weight, reason = _dense_copy(proj, latent_dim, dtype)
    return Reading(Way.EXPANDED if weight is None else Way.DENSE_COPY, reason)


def _weight_in_place(proj: Any) -> Tensor | None:
    """The weight of a linear layer that is nothing else, or None."""
    if type(proj) is not nn.Linear or proj.bias is not None:
        return None
    if nn.Linear.forward is not _LINEAR_FORWARD or _has_any_global_hook():
        return None
    weight = proj.weight
    if _is_intercepted(proj):
        values = _offloaded(proj)
        if values is None:
            return None
        weight = values["weight"].to(weight.dtype)
    plain = type(weight) in _PLAIN_TYPES and weight.is_floating_point()
    return weight if plain and weight.itemsize > 1 and not weight.is_meta else None


def _offloaded(proj: nn.Linear) -> Mapping[str, Tensor] | None:
    """Where accelerate keeps the weight of a linear layer that is nothing else, or None."""
    hooks: Any = sys.modules.get("accelerate.hooks")
    hook: Any = vars(proj).get("_hf_hook")
    if hooks is None or type(hook) is not hooks.AlignDevicesHook or not proj.weight.is_meta:
        return None
    # In a graph the values of today would be constants.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    forward, replaced = vars(proj).get("forward"), vars(proj).get("_old_forward")
    if not (
        isinstance(forward, functools.partial)
        and forward.args == (proj,)
        and forward.func.__qualname__ == "add_hook_to_module.<locals>.new_forward"
        and forward.func.__module__ == hooks.__name__
        and getattr(replaced, "__func__", None) is _LINEAR_FORWARD
        and getattr(replaced, "__self__", None) is proj
    ):
        return None
    if _has_hooks(proj) or hook.no_grad or not hook.offload:
        return None
    return hook.weights_map if torch.device(hook.execution_device).type == "cpu" else None


def _is_intercepted(module: Any) -> bool:
    """Whether somebody takes part in calls of this very module."""
    return "forward" in module.__dict__ or _has_hooks(module)


def _has_hooks(module: Any) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _dense_copy(proj: nn.Module, latent_dim: int, dtype: torch.dtype) -> tuple[Tensor | None, str]:
    """The matrix that ``proj`` applies and what it is made of; None and why there is none."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None, "in a graph, which cannot tell whether a copy still holds"
    reason = _why_expanded(proj)
    if reason is not None:
        return None, reason
    held = _Held(proj)
    if any(t.is_meta or t.device.type != "cpu" for t in held.tensors):
        return None, _ELSEWHERE
    if held.is_opaque:
        return None, "nobody can look into its tensors"
    if held.trainable:
        return None, "it is being trained (requires_grad)"
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    copies = _copies.setdefault(proj, {})
    known = copies.get((dtype, autocast))
    same = known is not None and known.attributes == held.attributes
    if known is not None and same and known.weight is None and known.settled:
        return None, known.reason
    with torch.inference_mode(False), torch.no_grad():
        contents = held.contents()
        same = known is not None and same and known.contents == contents
        if known is not None and same and known.weight is not None:
            copy = replace(known, settled=True)
        elif known is None or known.settled or same:
            copy = _make_copy(proj, held.attributes, contents, latent_dim, dtype)
        else:  # the last one was made in vain: wait until it holds still
            copy = _Copy(held.attributes, contents, None, "its values change from call to call")
    copies[dtype, autocast] = copy
    return copy.weight, copy.reason


def _why_expanded(proj: nn.Module) -> str | None:
    """What rules out a dense copy before anything is computed; None: nothing does."""
    if _has_any_global_hook():
        return "a hook for all modules"
    for module in proj.modules():
        if _is_intercepted(module):
            what = "a forward of its own" if "forward" in module.__dict__ else "hooks"
            return f"{type(module).__name__} has {what}"
    base: Any = proj
    while hasattr(base, "get_base_layer"):  # adapters of PEFT, which can be merged
        base = base.get_base_layer()
    if type(base) is nn.Linear:
        weight = base.weight
        if weight.is_meta:
            return _ELSEWHERE
        if type(weight) in _PLAIN_TYPES and base is proj:
            return "it has a bias" if base.bias is not None else f"its weight is {weight.dtype}"
        if type(weight) in _PLAIN_TYPES or type(weight).dequantize is not Tensor.dequantize:
            return None
        return f"its weight is a {type(weight).__name__}"
    if hasattr(type(base), "dequantize") or _package(type(base)) in _QUANTISERS:
        return None
    return f"nothing says that a {type(base).__name__} is a matrix"


class _Held:
    """Everything that a module and its parts hold: plain attributes, and tensors without wrappers.

    Attributes:
        attributes: comparable; changes with every attribute but not with values of tensors.
        tensors: the plain ones, those that wrapper subclasses and attributes hold included.
        trainable: whether a tensor requires a gradient.
        is_opaque: whether a tensor wraps others and does not say which.
    """

    def __init__(self, proj: nn.Module) -> None:
        self.tensors: list[Tensor] = []
        self.trainable = self.is_opaque = False
        # What was looked at, by address: kept, so that no address comes twice.
        self._seen: dict[int, Any] = {}
        modules = list(proj.modules())
        self._packages = {_package(type(module)) for module in modules} - {"torch"}
        self.attributes = tuple(
            (type(module), name, self._look(value))
            for module in modules
            for name, value in vars(module).items()
            if name not in _OF_ALL_MODULES
        )

    def _look(self, value: Any) -> Any:
        kind = type(value)
        if kind in _CONSTANTS:
            return value
        if isinstance(value, Tensor):
            return self._look_at_tensor(value)
        if isinstance(value, (tuple, list)):
            return tuple(self._look(entry) for entry in value)
        if id(value) in self._seen:
            return list(self._seen).index(id(value))
        if isinstance(value, dict):
            self._seen[id(value)] = value
            return tuple([(key, self._look(entry)) for key, entry in value.items()])
        if isinstance(value, (set, frozenset)):
            return frozenset(map(self._look, value))
        if _package(kind) in self._packages and not callable(value):
            attributes = {x: getattr(value, x) for x in _slots(kind) if hasattr(value, x)}
            attributes.update(getattr(value, "__dict__", {}))
            if attributes:
                self._seen[id(value)] = value
                return kind, self._look(attributes)
        return _Same(value)

    def _look_at_tensor(self, tensor: Tensor) -> Any:
        self.trainable |= tensor.requires_grad
        kind = type(tensor), tensor.dtype, tuple(tensor.shape)
        if is_traceable_wrapper_subclass(tensor):
            self._packages.add(_package(type(tensor)))
            names, context = tensor.__tensor_flatten__()
            parts = tuple(self._look(getattr(tensor, name)) for name in names)
            return kind, parts, self._look(context)
        if type(tensor) in _PLAIN_TYPES:
            self.tensors.append(tensor)
            return kind
        self._packages.add(_package(type(tensor)))
        attributes = self._look(vars(tensor))  # such as the scales of a bitsandbytes weight
        if _has_memory(tensor):
            self.tensors.append(tensor.as_subclass(Tensor))
        else:
            self.is_opaque = True
        return kind, attributes

    def contents(self) -> list[_Checksum]:
        """Checksums of all tensors, comparable."""
        return [_Checksum(tensor) for tensor in self.tensors]


class _Same:
    """Equal to another one of the same object, as long as that lives: addresses come again."""

    def __init__(self, value: Any) -> None:
        try:
            self._value: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self._value = lambda: value
        self._hash = id(value)

    def __eq__(self, other: object) -> bool:
        value = self._value()
        return isinstance(other, _Same) and value is not None and value is other._value()

    def __hash__(self) -> int:
        return self._hash


def _slots(cls: type[Any]) -> Iterator[str]:
    for base in cls.__mro__:
        names = vars(base).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__"):
                yield name


def _has_memory(tensor: Tensor) -> bool:
    """False for a subclass that wraps other tensors."""
    with torch._C.DisableTorchFunctionSubclass():
        try:
            tensor.untyped_storage().data_ptr()
        except RuntimeError:
            return False
        return True


def _package(cls: type[Any]) -> str:
    return cls.__module__.partition(".")[0]


class _Checksum:
    """Sums of each 256 bytes of a tensor, as words of 8 bytes: one pass, as fast as memory."""

    def __init__(self, tensor: Tensor) -> None:
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if data.data_ptr() % 8:
            data = data.clone()
        whole = data.numel() // 256 * 256
        sums = data[:whole].view(torch.int64).view(-1, 32).sum(1)
        self._values = sums, data[whole:].clone()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Checksum) and all(map(torch.equal, self._values, other._values))

    __hash__ = None  # type: ignore[assignment]


def _make_copy(
    proj: nn.Module,
    attributes: tuple[Any, ...],
    contents: list[_Checksum],
    latent_dim: int,
    dtype: torch.dtype,
) -> _Copy:
    """Makes the copy, and compares it with ``proj`` itself."""
    try:
        with torch.random.fork_rng(devices=[]):  # dropout shows as a difference
            weight = _apply_to_identity(proj, latent_dim, dtype)
            reason = _difference(proj, weight, latent_dim, dtype)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = f"it does not take {latent_dim} unit vectors ({error})"
    after = _Held(proj)
    if reason is None and (after.attributes != attributes or after.contents() != contents):
        reason = "a call of it changes it"
    if reason is not None:
        return _Copy(attributes, contents, None, reason, settled=True)
    return _Copy(attributes, contents, weight, _describe(proj))


def _difference(proj: Any, weight: Tensor, latent_dim: int, dtype: torch.dtype) -> str | None:
    """How ``proj(x)`` differs from ``x W^T`` beyond rounding; None: it does not.

    The rows are what latents are like, from much smaller to much larger ones (activations that are
    quantised round or saturate), and zero (whatever is added shows).
    """
    generator = torch.Generator("cpu").manual_seed(0)
    rows = torch.randn(13, latent_dim, generator=generator, device="cpu")
    rows *= torch.tensor([0.0] + 4 * [0.03] + 4 * [1.0] + 4 * [8.0], device="cpu")[:, None]
    rows = rows.to(dtype)
    actual = proj(rows)
    if not isinstance(actual, Tensor) or actual.shape != (len(rows), len(weight)):
        return "it does not return one row for one row"
    with torch.autocast("cpu", enabled=False):
        expected = rows.float() @ weight.float().t()
    if actual[0].count_nonzero():
        return "it adds something to its product"
    # A product of this precision is rounded a few times: inputs, weight, result.
    bound = max(0.75 * torch.finfo(actual.dtype).eps, 1e-5)
    error = (actual[1:].float() - expected[1:]).norm(dim=1) / expected[1:].norm(dim=1)
    if not bool((error <= bound).all()):
        return f"it is no matrix: products differ by {float(error.max()):.1e}"
    return None


def _describe(proj: Any) -> str:
    names = []
    while hasattr(proj, "get_base_layer"):
        names.append(f"{_package(type(proj))} {type(proj).__name__}")
        proj = proj.get_base_layer()
    dressed = type(proj) is nn.Linear and type(proj.weight) not in _PLAIN_TYPES
    names.append(type(proj.weight if dressed else proj).__name__)
    return " over ".join(names)


def _apply_to_identity(proj: Any, latent_dim: int, dtype: torch.dtype) -> Tensor:
    """``proj`` of each unit vector: ``[out_features, latent_dim]``, if ``proj`` is a matrix."""
    unit_vectors = torch.eye(latent_dim, dtype=dtype, device="cpu")
    return proj(unit_vectors).t().contiguous()
