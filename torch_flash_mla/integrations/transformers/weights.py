"""The dense kv_b weight of an MLA module, whatever wraps its projection.

The op takes ``w_kv_b [H, P + V, L]``. For a plain ``nn.Linear`` that is a view of its weight. A
wrapped or quantised projection (LoRA adapters, FP8, bitsandbytes, torchao, offloaded weights) is
still a linear map, so applying it to the identity matrix gives the same matrix. That takes about
2 GFLOP for DeepSeek-V2-Lite, hence the small cache below. It lives outside of the modules:
state_dict, deepcopy and pickling never see it.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

# Types of a weight that is nothing but its values; torch.export traces with the last two.
_PLAIN_TYPES = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)


class _Entry(NamedTuple):
    key: tuple[Any, ...]  # what the weight was made from
    weight: Tensor  # [out_features, L]


_dense_weights: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()


def kv_b_weight(proj: Any, heads: int, latent_dim: int, dtype: torch.dtype) -> Tensor:
    """The weight of ``proj`` as ``[heads, P + V, latent_dim]``, per head the rows ``[nope | v]``.

    Differentiable with respect to the parameters of ``proj``. The number of heads is the caller's
    (that of the query), so a tensor-parallel shard works like the whole.

    Raises:
        NotImplementedError: ``proj`` has a bias.
    """
    weight = _plain_weight(proj)
    if weight is None:
        weight = _weight_by_identity(proj, latent_dim, dtype)
    return weight.to(dtype).view(heads, -1, latent_dim)


def has_active_dropout(proj: nn.Module) -> bool:
    """Whether ``proj`` drops inputs at random now (LoRA while training): then it is no matrix."""
    return any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in proj.modules())


def _plain_weight(proj: Any) -> Tensor | None:
    """The weight of an unadorned linear layer, or None."""
    if hasattr(proj, "get_base_layer") and (proj.disable_adapters or proj.merged):
        return _plain_weight(proj.get_base_layer())
    if type(proj) is not nn.Linear or proj.bias is not None:
        return None
    if proj._forward_hooks or proj._forward_pre_hooks or hasattr(proj, "_hf_hook"):
        return None
    weight = proj.weight
    plain = type(weight) in _PLAIN_TYPES and weight.is_floating_point()
    return weight if plain and weight.itemsize > 1 and not weight.is_meta else None


def _weight_by_identity(proj: Any, latent_dim: int, dtype: torch.dtype) -> Tensor:
    """``proj`` applied to the identity, ``[out_features, latent_dim]``; remembered if it can be."""
    if torch.compiler.is_compiling():  # reading data_ptr and _version would break the graph
        return _apply_to_identity(proj, latent_dim, dtype)
    tensors = [*proj.parameters(), *proj.buffers()]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if needs_grad or not tensors or any(t.is_meta or t.is_inference() for t in tensors):
        return _apply_to_identity(proj, latent_dim, dtype)
    adapters = (
        tuple(getattr(proj, "active_adapters", ())),
        getattr(proj, "disable_adapters", None),
        tuple(sorted(getattr(proj, "scaling", {}).items())),
    )
    key = (dtype, adapters, tuple(_fingerprint(t) for t in tensors))
    entry = _dense_weights.get(proj)
    if entry is None or entry.key != key:
        with torch.inference_mode(False), torch.no_grad():
            entry = _Entry(key, _apply_to_identity(proj, latent_dim, dtype))
        _dense_weights[proj] = entry
    return entry.weight


def _fingerprint(tensor: Tensor) -> tuple[int, int]:
    """Changes when the values of a tensor are replaced or written to."""
    try:
        return tensor.data_ptr(), tensor._version
    except RuntimeError:  # a wrapper around other tensors has no storage of its own
        return id(tensor), tensor._version


def _apply_to_identity(proj: Any, latent_dim: int, dtype: torch.dtype) -> Tensor:
    if isinstance(getattr(proj, "bias", None), Tensor):
        raise NotImplementedError("kv_b_proj has a bias: the absorbed form has no place for one")
    return proj(torch.eye(latent_dim, dtype=dtype)).t().contiguous()
