"""What people put around the weights of a model, or in their place.

Each entry of :data:`WRAPPED` builds such a model from a plain one. Entries of :data:`CHANGES` do
something to a model that has been called already.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    PreTrainedModel,
)
from transformers_cases import kv_b, small_model

IN_PLACE, DENSE_COPY, EXPANDED = "in place", "dense copy", "expanded"
PROJECTIONS = ["kv_b_proj", "o_proj"]  # what is wrapped: the one that is read, and a common one


def plain_model(family: str = "deepseek_v3") -> PreTrainedModel:
    """Two dense layers, with dims that are multiples of the blocks of quantised weights."""
    return small_model(
        family,
        vocab_size=128,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        initializer_range=0.12,
    )


Build = Callable[[PreTrainedModel, Path], nn.Module]


@dataclass(frozen=True)
class Wrapping:
    """How a model is wrapped, and how its kv_b_proj is then read.

    Attributes:
        build: makes it of a plain model and an empty folder.
        way: what the report of ``patch`` says.
        way_of_call: how calls with ``arguments`` read it, if otherwise.
        needs: packages.
        arguments: of each forward pass.
    """

    build: Build
    way: str
    way_of_call: str
    needs: tuple[str, ...]
    arguments: dict[str, Any]


WRAPPED: dict[str, Wrapping] = {}


def wrapping(
    way: str, *needs: str, way_of_call: str | None = None, **arguments: Any
) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        name = build.__name__.replace("_", " ").strip()
        WRAPPED[name] = Wrapping(build, way, way_of_call or way, needs, arguments)
        return build

    return register


def wrapped_model(name: str, folder: Path) -> nn.Module:
    """The model, in evaluation mode. Skips where a package is missing."""
    for package in WRAPPED[name].needs:
        pytest.importorskip(package)
    return WRAPPED[name].build(plain_model(), folder).eval()


def shake(model: nn.Module, what: str, seed: int = 6) -> None:
    """Adds noise to the parameters that have ``what`` in their name."""
    generator = torch.Generator().manual_seed(seed)
    found = [p for name, p in model.named_parameters() if what in name]
    assert found
    with torch.no_grad():
        for parameter in found:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def with_adapter(model: PreTrainedModel, kind: str = "LoraConfig", **arguments: Any) -> Any:
    """A PEFT model whose adapter does something, with weights that are not being trained."""
    peft = importlib.import_module("peft")
    arguments = {"target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **arguments}
    if kind == "LoraConfig":
        arguments = {"r": 8, "lora_alpha": 16, **arguments}
    adapted = peft.get_peft_model(model, getattr(peft, kind)(**arguments))
    shake(adapted, "lora_" if kind == "LoraConfig" else "ia3_")
    return adapted.requires_grad_(False)


@wrapping(IN_PLACE)
def plain(model: PreTrainedModel, folder: Path) -> nn.Module:
    return model


@wrapping(EXPANDED)
def a_bias(model: PreTrainedModel, folder: Path) -> nn.Module:
    for proj in kv_b(model):
        proj.bias = nn.Parameter(0.3 * torch.randn(proj.out_features))
    return model


@wrapping(DENSE_COPY, "peft")
def lora(model: PreTrainedModel, folder: Path) -> nn.Module:
    return with_adapter(model)


@wrapping(EXPANDED, "peft")
def lora_being_trained(model: PreTrainedModel, folder: Path) -> nn.Module:
    adapted = with_adapter(model)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return adapted


@wrapping(DENSE_COPY, "peft")
def dora(model: PreTrainedModel, folder: Path) -> nn.Module:
    return with_adapter(model, use_dora=True)


@wrapping(DENSE_COPY, "peft")
def rslora(model: PreTrainedModel, folder: Path) -> nn.Module:
    return with_adapter(model, use_rslora=True)


@wrapping(EXPANDED, "peft")
def lora_with_bias(model: PreTrainedModel, folder: Path) -> nn.Module:
    return with_adapter(model, lora_bias=True)


@wrapping(DENSE_COPY, "peft")
def ia3(model: PreTrainedModel, folder: Path) -> nn.Module:
    return with_adapter(model, "IA3Config", feedforward_modules=[])


@wrapping(DENSE_COPY, "peft")
def merged(model: PreTrainedModel, folder: Path) -> nn.Module:
    adapted = with_adapter(model)
    adapted.merge_adapter()
    return adapted


@wrapping(IN_PLACE, "peft")
def merged_and_unloaded(model: PreTrainedModel, folder: Path) -> nn.Module:
    return with_adapter(model).merge_and_unload()


@wrapping(DENSE_COPY, "peft", way_of_call=EXPANDED, adapter_names=["default", "other", "__base__"])
def two_adapters_per_batch(model: PreTrainedModel, folder: Path) -> nn.Module:
    peft = importlib.import_module("peft")
    adapted = with_adapter(model)
    adapted.add_adapter("other", peft.LoraConfig(r=4, target_modules=PROJECTIONS))
    shake(adapted, ".other.", seed=7)
    return adapted.requires_grad_(False)


def torchao_weights(model: PreTrainedModel, config: str) -> nn.Module:
    quantization = importlib.import_module("torchao.quantization")

    def chosen(module: nn.Module, name: str) -> bool:
        return name.split(".")[-1] in PROJECTIONS

    quantization.quantize_(model, getattr(quantization, config)(), chosen)
    return model


@wrapping(DENSE_COPY, "torchao")
def torchao_int8(model: PreTrainedModel, folder: Path) -> nn.Module:
    return torchao_weights(model, "Int8WeightOnlyConfig")


@wrapping(EXPANDED, "torchao")
def torchao_int8_with_activations(model: PreTrainedModel, folder: Path) -> nn.Module:
    return torchao_weights(model, "Int8DynamicActivationInt8WeightConfig")


@wrapping(DENSE_COPY, "torchao")
def torchao_fp8(model: PreTrainedModel, folder: Path) -> nn.Module:
    return torchao_weights(model, "Float8WeightOnlyConfig")


def quanto_weights(model: PreTrainedModel, activations: bool) -> nn.Module:
    quanto = importlib.import_module("optimum.quanto")
    include = [f"*{name}" for name in PROJECTIONS]
    kinds = {"weights": quanto.qint8, "activations": quanto.qint8 if activations else None}
    quanto.quantize(model, include=include, **kinds)
    if activations:
        with torch.no_grad(), quanto.Calibration():
            model(torch.arange(64).view(2, 32), use_cache=False)
    quanto.freeze(model)
    return model.requires_grad_(False)


@wrapping(DENSE_COPY, "optimum.quanto")
def quanto_int8(model: PreTrainedModel, folder: Path) -> nn.Module:
    return quanto_weights(model, activations=False)


@wrapping(EXPANDED, "optimum.quanto")
def quanto_int8_with_activations(model: PreTrainedModel, folder: Path) -> nn.Module:
    return quanto_weights(model, activations=True)


@wrapping(EXPANDED, "bitsandbytes", "accelerate")  # its products of float32 are those of bfloat16
def bitsandbytes_nf4(model: PreTrainedModel, folder: Path) -> nn.Module:
    model.save_pretrained(folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )


def compressed_tensors(model: PreTrainedModel, scheme: str, compress: bool) -> nn.Module:
    quantization = importlib.import_module("compressed_tensors.quantization")
    utils = importlib.import_module("compressed_tensors.quantization.utils")
    config = quantization.QuantizationConfig(
        config_groups={"group_0": quantization.preset_name_to_scheme(scheme, ["Linear"])},
        ignore=["lm_head"],
        quantization_status="initialized",
    )
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        how = getattr(module, "quantization_scheme", None)
        if how is not None:
            rows = module.weight.detach()
            if how.weights.group_size:
                rows = rows.unflatten(-1, (-1, how.weights.group_size))
            low, high = rows.amin(-1), rows.amax(-1)
            scale, _ = utils.calculate_qparams(low, high, how.weights)
            module.weight_scale.data.copy_(scale.view_as(module.weight_scale))
    if compress:
        compressors = importlib.import_module("compressed_tensors.compressors")
        compressors.ModelCompressor(quantization_config=config).compress_model(model)
    return model.requires_grad_(False)


@wrapping(EXPANDED, "compressed_tensors")
def compressed_tensors_w8a8(model: PreTrainedModel, folder: Path) -> nn.Module:
    return compressed_tensors(model, "W8A8", compress=True)


@wrapping(EXPANDED, "compressed_tensors")
def compressed_tensors_fake_quantised(model: PreTrainedModel, folder: Path) -> nn.Module:
    return compressed_tensors(model, "W4A16", compress=False)


@wrapping(IN_PLACE)
def fp8_dequantised(model: PreTrainedModel, folder: Path) -> nn.Module:
    """A checkpoint of blocks of FP8, as DeepSeek's are, loaded in a float dtype."""
    size = 32
    model.save_pretrained(folder)
    weights: dict[str, Tensor] = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("proj.weight")]:
        rows, columns = weights[name].shape
        blocks = weights[name].view(rows // size, size, columns // size, size)
        scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        codes = (blocks / scales[:, None, :, None]).view(rows, columns)
        weights[name] = codes.to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scales
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [size, size],
        "fmt": "e4m3",
    }
    (folder / "config.json").write_text(json.dumps(fields))
    config = FineGrainedFP8Config(dequantize=True, weight_block_size=(size, size))
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )


@wrapping(IN_PLACE, "accelerate")
def offloaded_to_memory(model: PreTrainedModel, folder: Path) -> nn.Module:
    return importlib.import_module("accelerate").cpu_offload(model, torch.device("cpu"))


@wrapping(IN_PLACE, "accelerate")
def offloaded_to_disk(model: PreTrainedModel, folder: Path) -> nn.Module:
    accelerate = importlib.import_module("accelerate")
    return accelerate.disk_offload(model, str(folder), torch.device("cpu"))


@wrapping(EXPANDED, "accelerate")
def offloaded_under_another_hook(model: PreTrainedModel, folder: Path) -> nn.Module:
    hooks = importlib.import_module("accelerate.hooks")

    class Louder(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 1.5 * output

    offloaded = offloaded_to_memory(model, folder)
    for proj in kv_b(offloaded):
        hooks.add_hook_to_module(proj, Louder(), append=True)
    return offloaded


@wrapping(EXPANDED, "accelerate")
def offloaded_with_a_forward(model: PreTrainedModel, folder: Path) -> nn.Module:
    offloaded = offloaded_to_memory(model, folder)
    for proj in kv_b(offloaded):
        proj.forward = lambda x, forward=proj.forward: 1.5 * forward(x)
    return offloaded


def gradients(model: Any) -> dict[str, Tensor]:
    """Of all parameters that have one, for one batch without a cache."""
    model.zero_grad()
    ids = torch.arange(3, 51).view(2, 24)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# Changes of a model that was called before, and what it is built as

Change = Callable[[Any, Path], None]
CHANGES: dict[str, tuple[str, Change]] = {}


def change(of: str) -> Callable[[Change], Change]:
    def register(function: Change) -> Change:
        CHANGES[function.__name__.replace("_", " ")] = of, function
        return function

    return register


@change("lora")
def hot_swapped_adapter(model: Any, folder: Path) -> None:
    hotswap = importlib.import_module("peft.utils.hotswap")
    with_adapter(plain_model(), init_lora_weights="gaussian").save_pretrained(folder)
    hotswap.hotswap_adapter(model, str(folder), adapter_name="default")


@change("lora")
def data_written(model: Any, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        if "kv_b_proj.lora_B" in name:
            parameter.data.mul_(-2)


@change("lora")
def adapter_switched_off(model: Any, folder: Path) -> None:
    model.base_model.disable_adapter_layers()


@change("lora")
def adapter_scaled(model: Any, folder: Path) -> None:
    for module in model.modules():
        if hasattr(module, "lora_B"):
            module.scaling["default"] *= -3


@change("offloaded to memory")
def offloaded_values_written(model: Any, folder: Path) -> None:
    for proj in kv_b(model):
        with torch.no_grad():
            proj._hf_hook.weights_map["weight"].mul_(-2)


@change("plain")
def hook_registered(model: Any, folder: Path) -> None:
    for proj in kv_b(model):
        proj.register_forward_hook(lambda module, args, out: out * 1.1 + 0.05)


@change("plain")
def forward_replaced(model: Any, folder: Path) -> None:
    for proj in kv_b(model):
        proj.forward = lambda x, stock=proj.forward: stock(x).clamp(-0.5, 0.5)


@change("torchao int8")
def quantised_weights_replaced(model: Any, folder: Path) -> None:
    other = plain_model()
    shake(other, "proj.weight")
    model.load_state_dict(torchao_weights(other, "Int8WeightOnlyConfig").state_dict(), assign=True)
