"""Train the tiny DeepSeek-V3-architecture model on the standard library's sources.

    python examples/tiny_model/train.py --minutes 70

The run lasts as long as ``--minutes`` says: the learning rate follows the share of wall clock
that has passed, so a busy machine costs quality but not time.  ``--resume`` continues from the
last checkpoint.  The training forward pass is written out below (it is what
``DeepseekV3ForCausalLM`` computes, compared with it before the run starts); held-out loss and the
saved weights go through the transformers model itself.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path

import data
import numpy as np
import tokenizer
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig

HERE = Path(__file__).parent
CONTEXT = 1024
LOG_FIELDS = ("minutes", "step", "tokens", "learning_rate", "train_nats", "held_out_nats")


def make_config() -> DeepseekV3Config:
    """DeepSeek-V3's attention dimensions per head, everything else small, no experts."""
    layers = 4
    return DeepseekV3Config(
        vocab_size=tokenizer.VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        first_k_dense_replace=layers,
        num_mtp_layers=0,
        max_position_embeddings=2 * CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.EOT_ID,
        eos_token_id=tokenizer.EOT_ID,
        tie_word_embeddings=False,
    )


def initialise(model: DeepseekV3ForCausalLM) -> None:
    """Small random weights; what is added to the residual stream and the logits start at zero."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            nn.init.ones_(parameter)
        elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            nn.init.zeros_(parameter)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.5)
        else:
            nn.init.normal_(parameter, std=0.6 * parameter.shape[1] ** -0.5)


def rope_tables(config: DeepseekV3Config, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, each ``[length, qk_rope_head_dim / 2]``."""
    dim = config.qk_rope_head_dim
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2).float() / dim)
    angles = torch.arange(length).float()[:, None] * frequency
    return angles.cos(), angles.sin()


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """RMS norm in float32."""
    x = x.float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return x * scale * norm.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary angles to the interleaved pairs of ``x`` ``[..., length, dim]``."""
    pairs = x.float().unflatten(-1, (-1, 2))
    first, second = pairs[..., 0], pairs[..., 1]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def attention(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Causal multi-head latent attention over whole sequences ``[batch, length, hidden]``."""
    batch, length, _ = x.shape
    nope, rope, value = layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.v_head_dim
    q = layer.q_proj(x).view(batch, length, -1, nope + rope).transpose(1, 2)
    latent, k_rope = layer.kv_a_proj_with_mqa(x).split([layer.kv_lora_rank, rope], -1)
    kv = layer.kv_b_proj(rms_norm(latent, layer.kv_a_layernorm).to(latent.dtype))
    k_nope, v = kv.view(batch, length, -1, nope + value).transpose(1, 2).split([nope, value], -1)
    q = torch.cat([q[..., :nope], rotate(q[..., nope:], cos, sin)], -1)
    k_rope = rotate(k_rope[:, None], cos, sin).expand(-1, layer.num_heads, -1, -1)
    k = torch.cat([k_nope, k_rope], -1)
    # With equal head dimensions torch takes its blocked attention kernel, which is far faster.
    v = F.pad(v, (0, nope + rope - value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., :value]
    return layer.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


def layer_forward(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One decoder layer."""
    h = rms_norm(x, layer.input_layernorm)
    x = x + attention(layer.self_attn, h, cos, sin)
    h = rms_norm(x, layer.post_attention_layernorm)
    mlp = layer.mlp
    return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))


def loss_of(model: DeepseekV3ForCausalLM, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Mean next-token loss in nats of ``ids`` ``[batch, length + 1]``."""
    x = model.model.embed_tokens(ids[:, :-1])
    for layer in model.model.layers:
        x = layer_forward(layer, x, cos, sin)
    logits = model.lm_head(rms_norm(x, model.model.norm))
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: DeepseekV3ForCausalLM, tokens: np.ndarray, windows: int) -> float:
    """Nats per token of the transformers model over evenly spaced held-out windows."""
    starts = np.linspace(0, len(tokens) - CONTEXT - 1, windows).astype(int)
    total = 0.0
    for start in starts:
        ids = torch.from_numpy(tokens[start : start + CONTEXT + 1])[None]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        total += F.cross_entropy(logits[0].float(), ids[0, 1:]).item()
    return total / windows


class Batches:
    """Endless random windows over ``tokens``: every epoch covers the text once, shuffled."""

    def __init__(self, tokens: np.ndarray, seed: int) -> None:
        self.tokens = tokens
        self.random = np.random.default_rng(seed)
        self.waiting: list[int] = []
        self.length = 0

    def take(self, batch: int, length: int) -> Tensor:
        """The next ``[batch, length + 1]`` token ids."""
        if length != self.length:
            self.waiting, self.length = [], length
        rows = []
        while len(rows) < batch:
            if not self.waiting:
                offset = int(self.random.integers(length))
                starts = np.arange(offset, len(self.tokens) - length - 1, length)
                self.waiting = self.random.permutation(starts).tolist()
            start = self.waiting.pop()
            rows.append(self.tokens[start : start + length + 1])
        return torch.from_numpy(np.stack(rows))


def make_optimizers(model: DeepseekV3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between layers, AdamW for embeddings, head and norms."""
    matrices, groups = [], {"embed_tokens": [], "lm_head": [], "norm": []}
    for name, parameter in model.named_parameters():
        kind = next((kind for kind in groups if kind in name), None)
        (groups[kind] if kind else matrices).append(parameter)
    rates = {"embed_tokens": 1e-2, "lm_head": 4e-3, "norm": 4e-3}
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.03),
        torch.optim.AdamW(
            [{"params": groups[kind], "lr": rates[kind]} for kind in groups],
            betas=(0.9, 0.95),
            weight_decay=0.0,
        ),
    ]


def learning_rate(progress: float, step: int, warm_up: int = 40) -> float:
    """Share of the peak rate: a short warm-up, a plateau, then linearly to zero."""
    return min(1.0, (step + 1) / warm_up, max(0.0, 1.0 - progress) / 0.7)


def context_length(progress: float) -> int:
    """Short windows first, which are cheaper; double the evaluated context at the end."""
    return CONTEXT // 2 if progress < 0.4 else CONTEXT if progress < 0.88 else 2 * CONTEXT


def save(model: DeepseekV3ForCausalLM, folder: Path) -> None:
    """Write ``model`` as a bfloat16 transformers checkpoint with its tokenizer."""
    copy = DeepseekV3ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.bfloat16)
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.EOT_ID, eos_token_id=tokenizer.EOT_ID
    )
    copy.save_pretrained(folder)
    tokenizer.build(folder)


def parse_arguments() -> argparse.Namespace:
    """Command line of the training run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=70.0, help="wall clock of the run")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=HERE / ".cache", help="checkpoint folder")
    parser.add_argument("--output", type=Path, default=HERE, help="where the weights go")
    parser.add_argument("--pid-file", type=Path)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Train, log, checkpoint and save."""
    options = parse_arguments()
    if options.pid_file:
        options.pid_file.write_text(f"{os.getpid()}\n")
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    tokens, held_out = data.training_tokens(), data.held_out_tokens()
    batches = Batches(tokens, options.seed)
    config = make_config()
    model = DeepseekV3ForCausalLM(config)
    initialise(model)
    optimizers = make_optimizers(model)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size} parameters, {len(tokens)} training and {len(held_out)} held-out tokens")

    cos, sin = rope_tables(config, 2 * CONTEXT)
    probe = torch.from_numpy(held_out[: CONTEXT + 1])[None]
    for layer in model.model.layers:  # with the zeros in place both would agree trivially
        nn.init.normal_(layer.self_attn.o_proj.weight, std=0.02)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    with torch.no_grad():
        ours = loss_of(model, probe, cos[:CONTEXT], sin[:CONTEXT]).item()
        theirs = F.cross_entropy(model(probe[:, :-1]).logits[0], probe[0, 1:]).item()
    if abs(ours - theirs) > 1e-3:
        raise RuntimeError(f"training forward gives {ours}, transformers {theirs}")
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    nn.init.zeros_(model.lm_head.weight)

    step, seen, spent = 0, 0, 0.0
    checkpoint, log_path = options.work / "checkpoint.pt", options.work / "train_log.csv"
    if options.resume:
        state = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        batches.random.bit_generator.state = state["random"]
        step, seen, spent = state["step"], state["seen"], state["spent"]
    else:
        with log_path.open("w", newline="") as file:
            csv.writer(file).writerow(LOG_FIELDS)

    begin = time.monotonic() - spent
    duration = options.minutes * 60
    next_log, next_save, losses, done = spent, spent + 240, [], False
    while not done:
        progress = (time.monotonic() - begin) / duration
        done = progress >= 1.0
        rate = learning_rate(progress, step)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group, top in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = top * rate
        length = context_length(progress)
        ids = batches.take(options.batch_tokens // length, length)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, ids, cos[:length], sin[:length])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step, seen = step + 1, seen + options.batch_tokens
        spent = time.monotonic() - begin
        if spent >= next_log or done:
            held = held_out_loss(model, held_out, 100 if done else 8)
            row = (spent / 60, step, seen, rate, float(np.mean(losses)), held)
            with log_path.open("a", newline="") as file:
                csv.writer(file).writerow([f"{value:.6g}" for value in row])
            shown = [f"{key}={value:.5g}" for key, value in zip(LOG_FIELDS, row, strict=True)]
            print(*shown, flush=True)
            next_log, losses = spent + 120, []
        if spent >= next_save:
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "random": batches.random.bit_generator.state,
                "step": step,
                "seen": seen,
                "spent": spent,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            next_save = spent + 240

    save(model, options.output)
    (options.output / "train_log.csv").write_bytes(log_path.read_bytes())
    nats = held * len(held_out) / tokenizer.byte_length(held_out.tolist())
    print(f"held out: {held:.4f} nats per token, {nats:.4f} nats per byte")


if __name__ == "__main__":
    main()
