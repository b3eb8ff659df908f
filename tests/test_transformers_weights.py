"""How a patched layer reads its kv_b_proj: whatever wraps, quantises, watches or trains it, the
logits are those of the stock model with the same kv_b_proj.

The kinds are made of plain modules here; test_transformers_matrix.py goes through the packages.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers import DynamicCache, PreTrainedModel
from transformers_cases import kv_b, mla_layers, small_model
from transformers_compare import CACHE_ARGUMENT, assert_near, prompt, watch

from torch_flash_mla import DecoderStep, force_isa
from torch_flash_mla.integrations.transformers import MLACache, patch, unpatch, weights

FAMILY = "deepseek_v3"
Wrap = Callable[[nn.Linear], Any]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    """A model that tests do not change."""
    return small_model(FAMILY).requires_grad_(False)


@pytest.fixture
def ids() -> Tensor:
    return prompt((10, 10))["input_ids"]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Grows by the module whenever one is multiplied with the unit vectors."""
    made: list[nn.Module] = []
    original = weights._apply_to_identity

    def counted(proj: Any, *args: Any) -> Tensor:
        made.append(proj)
        return original(proj, *args)

    monkeypatch.setattr(weights, "_apply_to_identity", counted)
    return made


def with_kv_b(plain: PreTrainedModel, wrap: Wrap) -> PreTrainedModel:
    """A copy of the model, every kv_b_proj wrapped."""
    model = copy.deepcopy(plain)
    for layer in mla_layers(model):
        layer.kv_b_proj = wrap(layer.kv_b_proj)
    return model


def logits(model: PreTrainedModel, ids: Tensor, cache: Any = None) -> Tensor:
    """Of a prompt, and of its last three tokens one by one, over ``cache`` (None: the model's)."""
    with torch.no_grad():
        out = model(ids[:, :-3], **{CACHE_ARGUMENT: cache}, use_cache=True)
        steps = [out.logits]
        cache = getattr(out, CACHE_ARGUMENT)
        for i in range(ids.shape[1] - 3, ids.shape[1]):
            steps.append(model(ids[:, i : i + 1], **{CACHE_ARGUMENT: cache}).logits)
    return torch.cat(steps, dim=1)


def assert_as_stock(model: PreTrainedModel, ids: Tensor, tolerance: float = 5e-4) -> Tensor:
    """A patched model gives what it gives unpatched, over each kind of cache. Returns that."""
    caches = (
        lambda: None,
        lambda: DynamicCache(config=model.config),
        lambda: MLACache(model.config, max_cache_len=64),
    )
    actual = [logits(model, ids, cache()) for cache in caches]
    unpatch(model)
    expected = logits(model, ids)
    patch(model)
    for result in actual:
        assert_near(result, expected, tolerance)
    return expected


def assert_reads(model: PreTrainedModel, what: str) -> None:
    report = patch(model)
    assert len(report.patched) == len(mla_layers(model))
    assert all(layer.kv_b_proj.startswith(what) for layer in report.layers), str(report)
    assert bool(report.expanded) is what.startswith("expanded")


# Kinds of projections


class SealedWeight(Tensor):
    """8-bit codes and a scale per row in the place of a weight. It does not say so."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, weight: Tensor) -> Any:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def dequantize(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            x, weight, bias = args
            return nn.functional.linear(x, weight.dequantize(), bias)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(func(args[0].codes), func(args[0].scale))
        raise NotImplementedError(str(func))


class CodedWeight(SealedWeight):
    """Says what it is made of, as the weights of torchao do."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: None, *shape: Any) -> CodedWeight:
        return CodedWeight(**parts)


def coded(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(CodedWeight.of(linear.weight), requires_grad=False)
    return linear


class CodedLayer(nn.Module):
    """A layer of its own kind, as hqq and bitsandbytes have them; its scale is a plain attribute.

    Args:
        step: activations are rounded to multiples of it; 0: they are not.
    """

    def __init__(self, linear: nn.Linear, step: float = 0.0) -> None:
        super().__init__()
        weight = CodedWeight.of(linear.weight)
        self.register_buffer("codes", weight.codes)
        self.meta = {"scale": weight.scale, "step": step}

    def dequantize(self) -> Tensor:
        return self.codes * self.meta["scale"]

    def forward(self, x: Tensor) -> Tensor:
        if self.meta["step"]:
            x = (x / self.meta["step"]).round().clamp(-127, 127) * self.meta["step"]
        return x @ self.dequantize().t()


class Adapted(nn.Module):
    """A low-rank adapter with the interface of PEFT's."""

    def __init__(self, linear: nn.Linear, bias: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = linear
        self.A = nn.Parameter(torch.randn(4, linear.in_features) / 8)
        self.B = nn.Parameter(torch.randn(linear.out_features, 4) / 8)
        self.bias = nn.Parameter(torch.full((linear.out_features,), bias))
        self.dropout = nn.Dropout(dropout)
        self.scaling = {"default": 1.0}
        self.disable_adapters = False

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def forward(self, x: Tensor, names: list[str] | None = None) -> Tensor:
        out = self.base_layer(x)
        if self.disable_adapters:
            return out
        change = (self.dropout(x) @ self.A.t() @ self.B.t() + self.bias) * self.scaling["default"]
        if names is not None:  # one adapter per sample
            change = change * torch.tensor([float(n == "on") for n in names])[:, None, None, None]
        return out + change


def adapted(**arguments: Any) -> Wrap:
    return lambda linear: Adapted(linear, **arguments).requires_grad_(False)


class Opaque(nn.Module):
    """A map that says nothing about itself."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).clamp(-1, 1)


def with_bias(linear: nn.Linear) -> nn.Linear:
    linear.bias = nn.Parameter(torch.randn(linear.out_features), requires_grad=False)
    return linear


def with_forward(linear: nn.Linear) -> nn.Linear:
    """As compressed-tensors and tensor parallelism do it."""
    forward = linear.forward
    linear.forward = lambda x: forward((x * 4).round() / 4)
    return linear


def elsewhere(linear: nn.Linear) -> nn.Linear:
    """As accelerate keeps offloaded weights."""
    weight, forward = linear.weight, linear.forward
    meta = nn.Parameter(weight.to("meta"), requires_grad=False)

    def load(x: Tensor) -> Tensor:
        linear.weight = weight
        try:
            return forward(x)
        finally:
            linear.weight = meta

    linear.weight, linear.forward = meta, load
    return linear


def pruned(linear: nn.Linear) -> nn.Linear:
    return prune.l1_unstructured(linear, "weight", 0.5)


def sealed(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(SealedWeight.of(linear.weight), requires_grad=False)
    return linear


EXPANDED: dict[str, tuple[Wrap, str]] = {
    "bias": (with_bias, "it has a bias"),
    "forward of the instance": (with_forward, "Linear has a forward of its own"),
    "offloaded": (elsewhere, "Linear has a forward of its own"),
    "pruned": (pruned, "Linear has hooks"),
    "parametrised": (parametrizations.weight_norm, "nothing says that a ParametrizedLinear"),
    "unknown class": (Opaque, "nothing says that a Opaque is a matrix"),
    "adapter with a bias": (adapted(bias=0.5), "it adds something"),
    "rounded activations": (lambda linear: CodedLayer(linear, step=0.25), "it is no matrix"),
    "saturating activations": (lambda linear: CodedLayer(linear, step=1e-2), "it is no matrix"),
    "sealed weight": (sealed, "nobody can look into its tensors"),
    "trained adapter": (Adapted, "it is being trained"),
}

DENSE: dict[str, tuple[Wrap, str]] = {
    "coded weight": (coded, "CodedWeight"),
    "coded layer": (CodedLayer, "CodedLayer"),
    "adapter": (adapted(), "test_transformers_weights Adapted over Linear"),
    "adapter over a coded weight": (
        lambda linear: adapted()(coded(linear)),
        "test_transformers_weights Adapted over CodedWeight",
    ),
}


class TestWays:
    def test_in_place(self, plain: PreTrainedModel, ids: Tensor, products: list[Any]) -> None:
        model = copy.deepcopy(plain)
        assert_reads(model, "in place")
        with watch(model):
            logits(model, ids)
        assert_as_stock(model, ids)
        assert not products

    @pytest.mark.parametrize("kind", DENSE)
    def test_dense_copy(
        self, plain: PreTrainedModel, ids: Tensor, kind: str, products: list[Any]
    ) -> None:
        """Made once per layer, outside of the model."""
        wrap, name = DENSE[kind]
        model = with_kv_b(plain, wrap)
        keys = model.state_dict().keys()
        attributes = [set(vars(proj)) for proj in kv_b(model)]
        assert_reads(model, f"dense copy: {name}")
        with watch(model):
            logits(model, ids)
        assert_as_stock(model, ids)
        assert products == kv_b(model)
        assert model.state_dict().keys() == keys
        assert [set(vars(proj)) for proj in kv_b(model)] == attributes

    @pytest.mark.parametrize("kind", EXPANDED)
    def test_expanded(self, plain: PreTrainedModel, ids: Tensor, kind: str) -> None:
        wrap, reason = EXPANDED[kind]
        model = with_kv_b(plain, wrap)
        assert_reads(model, f"expanded: {reason}")
        expected = assert_as_stock(model, ids)
        if kind not in ("offloaded", "parametrised"):  # the same values in another way
            assert (expected - logits(plain, ids)).abs().max() > 1e-3 * expected.abs().max()

    @pytest.mark.parametrize("family", ["hy_v4", "mistral_large4", "dots3_note"])
    def test_expanded_in_other_families(self, family: str, ids: Tensor) -> None:
        """Sinks, indices, shared keys, layers of different dims."""
        model = with_kv_b(small_model(family).requires_grad_(False), with_bias)
        patch(model)
        assert_as_stock(model, ids)

    @pytest.mark.parametrize("kv_cache_dtype", ["q8_kv", "q4_kv"])
    def test_expanded_packed_pages(
        self, plain: PreTrainedModel, ids: Tensor, kv_cache_dtype: str
    ) -> None:
        """Keys are expanded from the rows that the pages hold."""
        hooked, model = copy.deepcopy(plain), copy.deepcopy(plain)
        for proj in kv_b(hooked):
            proj.register_forward_hook(lambda module, args, out: out)
        for each in (hooked, model):
            patch(each, kv_cache_dtype)
        with force_isa("scalar"):  # whose arithmetic is that of floats
            expected = logits(model, ids)
            actual = logits(hooked, ids)
        assert_near(actual, expected, 2e-2)
        assert not torch.equal(expected, logits(plain, ids))

    def test_inference_tensors(
        self, plain: PreTrainedModel, ids: Tensor, products: list[Any]
    ) -> None:
        """Their version cannot be read; copies need none."""
        with torch.inference_mode():
            model = with_kv_b(plain, CodedLayer)
            for proj in kv_b(model):
                proj.codes = proj.codes.clone()
        assert kv_b(model)[0].codes.is_inference()
        patch(model)
        for _ in range(3):
            with torch.inference_mode():
                model(ids)
        assert products == kv_b(model)
        assert_as_stock(model, ids)

    @pytest.mark.parametrize("wrap", [coded, with_bias])
    def test_autocast(self, plain: PreTrainedModel, ids: Tensor, wrap: Wrap) -> None:
        model = with_kv_b(plain, wrap)
        expected = logits(model, ids)
        patch(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_near(logits(model, ids).float(), expected, 0.1)
        assert_as_stock(model, ids)

    @pytest.mark.parametrize("wrap", [coded, with_bias])
    def test_half_precision(self, plain: PreTrainedModel, ids: Tensor, wrap: Wrap) -> None:
        model = with_kv_b(copy.deepcopy(plain).bfloat16(), wrap).bfloat16()
        expected = logits(model, ids).float()
        patch(model)
        assert_near(logits(model, ids).float(), expected, 0.1)

    @pytest.mark.parametrize("wrap", [CodedLayer, with_bias])
    def test_in_graphs(self, plain: PreTrainedModel, ids: Tensor, wrap: Wrap) -> None:
        """No graph can tell whether a copy still holds: it expands."""
        model = with_kv_b(plain, wrap)
        expected = logits(model, ids)
        patch(model)
        with torch.no_grad():
            model(ids)  # there is a copy now
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        cache = MLACache(model.config, max_cache_len=64)
        with torch.no_grad():
            steps = [compiled(ids[:, :-3], **{CACHE_ARGUMENT: cache}).logits]
            for i in range(ids.shape[1] - 3, ids.shape[1]):
                steps.append(compiled(ids[:, i : i + 1], **{CACHE_ARGUMENT: cache}).logits)
        assert_near(torch.cat(steps, dim=1), expected)

    def test_decoder_step(self, plain: PreTrainedModel, ids: Tensor) -> None:
        """Without a mask of its own, and exported."""
        model = with_kv_b(plain, with_bias)
        expected = logits(model, ids)
        patch(model)
        step = DecoderStep(model, logits_to_keep=0)
        _, *pages = step.example_inputs(batch=2, new_tokens=ids.shape[1])
        with torch.no_grad():
            assert_near(step(ids, *pages), expected)
        inputs = step.example_inputs()
        program = torch.export.export(
            step, inputs, dynamic_shapes=step.dynamic_shapes(), strict=False
        )
        with torch.no_grad():
            assert_near(program.module()(ids, *pages), expected)


class TestContents:
    """A copy holds as long as the bytes that it was made of, and no longer."""

    @pytest.mark.parametrize(
        "write",
        [
            lambda weight, other: weight.codes.data.copy_(other.codes),
            lambda weight, other: weight.codes.numpy().__setitem__(..., other.codes.numpy()),
            lambda weight, other: setattr(weight, "codes", other.codes),
            lambda weight, other: weight.scale.data.mul_(1.5),
            lambda weight, other: weight.codes.data[5, 7].add_(1),
        ],
        ids=["data", "memory", "replaced", "scale", "one code"],
    )
    def test_written(self, plain: PreTrainedModel, ids: Tensor, write: Callable[..., Any]) -> None:
        """None of these raises the version of the tensor that the model holds."""
        model = with_kv_b(plain, coded)
        patch(model)
        before = assert_as_stock(model, ids)
        for proj in kv_b(model):
            write(proj.weight, CodedWeight.of(proj.weight.dequantize().roll(1, 0)))
        after = assert_as_stock(model, ids)
        assert not torch.equal(before, after)

    def test_replaced(self, plain: PreTrainedModel, ids: Tensor) -> None:
        """As ``load_state_dict(assign=True)`` does it."""
        model = with_kv_b(plain, coded)
        patch(model)
        before = assert_as_stock(model, ids)
        for proj in kv_b(model):
            other = CodedWeight.of(proj.weight.dequantize().flip(0))
            proj.weight = nn.Parameter(other, requires_grad=False)
        assert not torch.equal(before, assert_as_stock(model, ids))

    def test_hot_swapped(self, plain: PreTrainedModel, ids: Tensor, products: list[Any]) -> None:
        model = with_kv_b(plain, adapted())
        patch(model)
        for factor in (1.0, -2.0, 0.5):
            for proj in kv_b(model):
                proj.B.data.mul_(factor)
            assert_as_stock(model, ids)
        assert len(products) == 3 * len(kv_b(model))

    def test_attributes(self, plain: PreTrainedModel, ids: Tensor) -> None:
        """Scalings, switches and tensors that are no parameters or buffers."""
        model = with_kv_b(plain, adapted())
        patch(model)
        seen = [assert_as_stock(model, ids)]
        for proj in kv_b(model):
            proj.scaling["default"] = 0.25
        seen.append(assert_as_stock(model, ids))
        for proj in kv_b(model):
            proj.disable_adapters = True
        seen.append(assert_as_stock(model, ids))
        assert not torch.equal(seen[0], seen[1])
        assert_near(seen[2], logits(plain, ids))

        model = with_kv_b(plain, CodedLayer)
        patch(model)
        before = assert_as_stock(model, ids)
        for proj in kv_b(model):
            proj.meta["scale"].data.mul_(-1)
        assert not torch.equal(before, assert_as_stock(model, ids))

    @pytest.mark.parametrize("opaque", [False, True])
    def test_objects_of_any_kind(self, plain: PreTrainedModel, ids: Tensor, opaque: bool) -> None:
        """Slots that are written, and functions replaced by others at the same address."""

        class Rule:
            __slots__ = ("__weakref__", "factor")

            def __init__(self, factor: float) -> None:
                self.factor = factor

        class Function(Rule):
            __slots__ = ()

            def __call__(self, x: Tensor) -> Tensor:
                return x * self.factor

        class Ruled(CodedLayer):
            rule: Any

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * self.rule.factor

        model = with_kv_b(plain, Ruled)
        for proj in kv_b(model):
            proj.rule = Function(1.0) if opaque else Rule(1.0)
        assert_reads(model, "dense copy")
        before = assert_as_stock(model, ids)
        for proj in kv_b(model):
            if not opaque:
                proj.rule.factor = 0.5
                continue
            address = id(proj.rule)
            del proj.rule
            others = [Function(0.5)]  # alive, so that the next one is elsewhere
            while id(others[-1]) != address:
                assert len(others) < 100_000
                others.append(Function(0.5))
            proj.rule = others[-1]
        assert not torch.equal(before, assert_as_stock(model, ids))

    def test_it_stops_being_a_matrix(self, plain: PreTrainedModel, ids: Tensor) -> None:
        model = with_kv_b(plain, adapted())
        assert_reads(model, "dense copy")
        logits(model, ids)
        for proj in kv_b(model):
            proj.bias.data.fill_(0.5)
        assert_as_stock(model, ids)
        assert_reads(model, "expanded: it adds something")

    def test_values_that_never_hold_still(
        self, plain: PreTrainedModel, ids: Tensor, products: list[Any]
    ) -> None:
        """Copies are not made in vain over and over, and made again when it settles."""
        model = with_kv_b(plain, CodedLayer)
        patch(model)

        def disturb(*args: Any) -> None:
            for proj in kv_b(model):
                proj.meta["scale"].data.mul_(1.01)

        handle = model.register_forward_pre_hook(disturb)
        for _ in range(6):
            with torch.no_grad():
                model(ids, use_cache=False)
        assert len(products) == len(kv_b(model))
        handle.remove()
        assert_as_stock(model, ids)
        assert_reads(model, "dense copy")

    def test_a_call_that_changes_it(self, plain: PreTrainedModel, ids: Tensor) -> None:
        class Counting(CodedLayer):
            calls = 0

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                return super().forward(x)

        model = with_kv_b(plain, Counting)
        assert_reads(model, "expanded: a call of it changes it")
        assert_as_stock(model, ids)


class TestHooks:
    """Whoever watches kv_b_proj sees the latents, at each call, and may change what comes out."""

    @pytest.mark.parametrize("wrap", [lambda linear: linear, coded], ids=["plain", "coded"])
    def test_an_observer(self, plain: PreTrainedModel, ids: Tensor, wrap: Wrap) -> None:
        seen: dict[str, list[Tensor]] = {"stock": [], "patched": []}
        for name in seen:
            model = with_kv_b(plain, wrap)
            if name == "patched":
                patch(model)
            kv_b(model)[1].register_forward_pre_hook(
                lambda module, args, name=name: seen[name].append(args[0].clone())
            )
            logits(model, ids)
        assert len(seen["stock"]) == len(seen["patched"]) == 4
        for actual, expected in zip(seen["patched"], seen["stock"], strict=True):
            assert_near(actual, expected)

    @pytest.mark.parametrize("wrap", [lambda linear: linear, coded], ids=["plain", "coded"])
    def test_they_come_and_go(self, plain: PreTrainedModel, ids: Tensor, wrap: Wrap) -> None:
        model = with_kv_b(plain, wrap)
        patch(model)
        expected = assert_as_stock(model, ids)
        gain = [2.0]
        handles = [
            proj.register_forward_hook(lambda module, args, out: out * gain[0])
            for proj in kv_b(model)
        ]
        twice = assert_as_stock(model, ids)
        gain[0] = 3.0
        assert not torch.equal(assert_as_stock(model, ids), twice)
        for handle in handles:
            handle.remove()
        assert torch.equal(assert_as_stock(model, ids), expected)
        with watch(model):
            logits(model, ids)

    def test_hooks_for_all_modules(self, plain: PreTrainedModel, ids: Tensor) -> None:
        model = copy.deepcopy(plain)
        patch(model)
        calls = []
        proj = kv_b(model)[0]
        with (
            nn.modules.module.register_module_forward_hook(
                lambda module, args, out: calls.append(out) if module is proj else None
            ),
            torch.no_grad(),
        ):
            model(ids)
        assert len(calls) == 1

    def test_gradients_are_seen(self, plain: PreTrainedModel, ids: Tensor) -> None:
        model = copy.deepcopy(plain).requires_grad_(True)
        patch(model)
        seen = []
        kv_b(model)[0].register_full_backward_hook(lambda module, i, o: seen.append(o[0].shape))
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert seen == [torch.Size([2, 1, 10, 4 * (32 + 48)])]

    def test_one_adapter_per_sample(self, plain: PreTrainedModel, ids: Tensor) -> None:
        """As PEFT's ``adapter_names``: a hook hands them over for the time of a call."""
        model = with_kv_b(plain, adapted())
        patch(model)
        expected = assert_as_stock(model, ids)
        for proj in kv_b(model):
            proj.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {"names": ["on", "off"]}), with_kwargs=True
            )
        mixed = assert_as_stock(model, ids)
        assert_near(mixed[0], expected[0])
        assert_near(mixed[1], logits(plain, ids)[1])

    def test_the_class_of_linear_layers(
        self, plain: PreTrainedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = copy.deepcopy(plain)
        patch(model)
        forward = nn.Linear.forward
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) * 0.9)
        assert_as_stock(model, ids)


class TestTraining:
    def gradients(self, model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        model(ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def check(self, model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
        expected = self.gradients(model, ids)
        patch(model)
        actual = self.gradients(model, ids)
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_near(actual[name], gradient, 1e-3)
        return actual

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_an_adapter(self, plain: PreTrainedModel, ids: Tensor, dropout: float) -> None:
        model = with_kv_b(plain, lambda linear: Adapted(linear, 0.1, dropout)).train()
        gradients = self.check(model, ids)
        assert any(name.endswith("kv_b_proj.A") for name in gradients)

    def test_frozen_dropout_draws_what_it_draws_in_the_stock_model(
        self, plain: PreTrainedModel, ids: Tensor
    ) -> None:
        model = with_kv_b(plain, adapted(dropout=0.3)).train()
        model.get_input_embeddings().requires_grad_(True)
        self.check(model, ids)

    def test_through_a_coded_weight(self, plain: PreTrainedModel, ids: Tensor) -> None:
        """The gradient of the latents comes from the copy."""
        model = with_kv_b(plain, coded).train()
        model.get_input_embeddings().requires_grad_(True)
        self.check(model, ids)
        with watch(model):
            self.gradients(model, ids)

    @pytest.mark.parametrize("fused", [False, True])
    def test_evaluation_in_between(self, plain: PreTrainedModel, ids: Tensor, fused: bool) -> None:
        """Fused optimizers write weights without raising their version."""
        losses = {}
        for patched in (False, True):
            torch.manual_seed(3)
            model = with_kv_b(plain, Adapted)
            if patched:
                patch(model)
            adapters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(adapters, lr=0.05, fused=fused)
            losses[patched] = []
            for _ in range(4):
                with torch.no_grad():
                    losses[patched].append(model.eval()(ids, labels=ids).loss.item())
                optimizer.zero_grad()
                model.train()(ids, labels=ids).loss.backward()
                optimizer.step()
        assert losses[True] == pytest.approx(losses[False], rel=1e-4)
        assert losses[True][3] < losses[True][0] - 0.1

    def test_what_kv_b_proj_does_backward(self, plain: PreTrainedModel, ids: Tensor) -> None:
        """As a tensor-parallel projection sums the gradient of its input over the ranks."""

        class Summed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.view_as(x)

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                return 2 * gradient

        def parallel(linear: nn.Linear) -> nn.Linear:
            forward = linear.forward
            linear.forward = lambda x: forward(Summed.apply(x))
            return linear

        model = copy.deepcopy(plain).requires_grad_(True).train()
        alone = self.gradients(model, ids)
        for proj in kv_b(model):
            parallel(proj)
        summed = self.check(model, ids)
        name = next(name for name in alone if "0.self_attn.kv_a_proj" in name)
        assert not torch.allclose(alone[name], summed[name])

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("wrap", [lambda linear: linear, Adapted], ids=["plain", "adapter"])
    def test_checkpointing(
        self, plain: PreTrainedModel, ids: Tensor, reentrant: bool, wrap: Wrap
    ) -> None:
        model = with_kv_b(plain, wrap).train()
        model.get_input_embeddings().requires_grad_(True)
        expected = self.gradients(model, ids)
        patch(model, "q8_kv")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        actual = self.gradients(model, ids)
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_near(actual[name], gradient, 1e-3)


@pytest.fixture(autouse=True)
def _no_compiled_graphs() -> Iterator[None]:
    """Graphs of torch.compile do not look for hooks that come later: none is left over."""
    yield
    torch._dynamo.reset()
