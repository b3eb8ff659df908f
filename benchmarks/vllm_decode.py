"""vLLM on this CPU: its own MLA backends beside this package's, in decoding.

Three tables:

1. attention of one decoding step, the kernels alone: absorbed queries over 4096 cached tokens, dims
   of DeepSeek-V2-Lite (16 heads) and V3 (128), batches of 1 and 16;
2. tokens per second of an engine over a random model shaped like DeepSeek-V2-Lite with fewer
   layers, 16 sequences of 2048 tokens each, prompts and decoding;
3. tokens that a GiB of cache holds, as each of those engines reports it.

In an environment that has vLLM (``make test-vllm`` makes one), on a quiet machine:

    python benchmarks/vllm_decode.py
    python benchmarks/vllm_decode.py --experts 8 --prompt 256   # smaller: 1.1 GB of weights
    python benchmarks/vllm_decode.py --only kernels             # the first table
    python benchmarks/vllm_decode.py --only engines --variants CPU_MLA q8_kv

OMP_NUM_THREADS is the number of threads. The variants of the first table take turns, and the least
disturbed turn of each counts; the engines run one after the other, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from torch import Tensor

import torch_flash_mla
from torch_flash_mla import ops
from torch_flash_mla.bench import measure
from torch_flash_mla.formats import PACKED_FORMATS, row_bytes

LATENT, ROPE = 512, 64
SHAPES = {"V2-Lite": 16, "V3": 128}  # heads
FORMATS = ("auto", *PACKED_FORMATS)
BLOCK = 128
STOCK_BLOCK = 16  # the only size of CPU_MLA
SCALE = 192**-0.5


def amx_is_here() -> bool:
    """Whether vLLM would run its AMX_MLA backend on this machine."""
    return bool(torch.cpu._is_amx_tile_supported())


# ------------------------------------------------------------------ 1: attention of a decoding step


def paged_cache(name: str, latent: Tensor, rope: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, S, *] in a cache of one format, pages shuffled, and its block table."""
    batch, keys = latent.shape[:2]
    blocks = batch * -(-keys // block)
    width, dtype = LATENT + ROPE, latent.dtype
    if name != "auto":
        width, dtype = row_bytes(name, LATENT, ROPE), torch.uint8
    cache = torch.zeros(blocks, block, width, dtype=dtype)
    table = torch.randperm(blocks, dtype=torch.int32).view(batch, -1)
    positions = torch.arange(keys)
    slots = table[:, positions // block].long() * block + positions % block
    ops.concat_and_cache_mla(latent, rope, cache, slots.flatten(), name)
    return cache, table


def kernels(heads: int, batch: int, keys: int) -> dict[str, Callable[[], Tensor]]:
    """Functions that compute the attention of one step, by the name of the variant."""
    from vllm import _custom_ops as stock
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.mla.amx_mla import _compute_num_kv_splits, _expand_block_table

    current_platform.import_kernels()
    latent = torch.randn(batch, keys, LATENT, dtype=torch.bfloat16)
    rope = torch.randn(batch, keys, ROPE, dtype=torch.bfloat16)
    q = torch.randn(batch, heads, LATENT + ROPE, dtype=torch.bfloat16)
    lengths = torch.full((batch,), keys, dtype=torch.int32)
    variants: dict[str, Callable[[], Tensor]] = {}

    cache16, table16 = paged_cache("auto", latent, rope, STOCK_BLOCK)

    def cpu_mla() -> Tensor:
        out = torch.zeros(batch, heads, LATENT, dtype=q.dtype)
        stock.mla_decode_kvcache_cpu(out, q, cache16, SCALE, table16, lengths)
        return out

    variants["vLLM CPU_MLA"] = cpu_mla
    if amx_is_here():
        flat, table = paged_cache("auto", latent, rope, BLOCK)
        flat = flat.view(-1, 1, LATENT + ROPE)
        tokens, entries = _expand_block_table(table, BLOCK), torch.arange(batch)
        splits = _compute_num_kv_splits(keys, torch.get_num_threads())

        def amx_mla() -> Tensor:
            out = torch.zeros(batch, heads, LATENT, dtype=q.dtype)
            partial = torch.zeros(batch, heads, splits, LATENT + 1)
            stock.cpu_mla_decode(
                q, flat, flat[..., :LATENT], out, None, None, None, partial, tokens, entries,
                lengths.long(), SCALE, 0.0, False, 0, None, None,
            )  # fmt: skip
            return out

        variants["vLLM AMX_MLA"] = amx_mla

    def ours(name: str) -> Callable[[], Tensor]:
        cache, table = paged_cache(name, latent, rope, BLOCK)
        return lambda: ops.mla_attention(
            q[:, None], cache, table, lengths, LATENT, SCALE, causal=True, kv_cache_dtype=name
        )[0][:, 0]

    return variants | {f"here, {name}": ours(name) for name in FORMATS}


def time_kernels(keys: int, effort: measure.Effort) -> None:
    """Prints the first table."""
    title = f"attention of one decoding step, {keys} keys, bfloat16 queries, "
    print(f"\n{title}level {ops.cpu_isa()}, {torch.get_num_threads()} threads")
    print(f"{'':24}{'':16}{'ms':>9}{'GFLOP/s':>10}{'speed':>8}{'error':>9}")
    for model, heads in SHAPES.items():
        for batch in (1, 16):
            torch.manual_seed(0)
            variants = kernels(heads, batch, keys)
            expected = variants["here, auto"]().float()
            times = measure.race(variants, effort)
            work = 2 * batch * heads * keys * (2 * LATENT + ROPE)
            for name, run in variants.items():
                seconds, speed = times[name], times["vLLM CPU_MLA"] / times[name]
                error = ((run().float() - expected).norm() / expected.norm()).item()
                label = f"{model}, batch {batch}" if name == "vLLM CPU_MLA" else ""
                print(
                    f"{label:24}{name:16}{1e3 * seconds:9.3f}{work / seconds / 1e9:10.1f}"
                    f"{speed:7.2f}x{100 * error:8.2f}%",
                    flush=True,
                )


# ------------------------------------------------------------------------------------- 2: an engine


def v2_lite_config(layers: int, experts: int) -> dict[str, Any]:
    """config.json of DeepSeek-V2-Lite with fewer layers, and as many experts as asked for."""
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "torch_dtype": "bfloat16",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": LATENT,
        "qk_rope_head_dim": ROPE,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "moe_intermediate_size": 1408,
        "n_routed_experts": experts,
        "n_shared_experts": 2,
        "num_experts_per_tok": min(6, experts),
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "vocab_size": 102400,
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
        "tie_word_embeddings": False,
    }


def engines() -> dict[str, dict[str, Any]]:
    """Arguments of ``LLM`` that tell the variants apart, by name."""
    variants: dict[str, dict[str, Any]] = {"vLLM CPU_MLA": {"attention_backend": "CPU_MLA"}}
    if amx_is_here():
        variants["vLLM AMX_MLA"] = {"attention_backend": "AMX_MLA"}
    for name in FORMATS:
        setting = {"torch_flash_mla": {"kv_cache_dtype": name}}
        variants[f"here, {name}"] = {"additional_config": setting}
    return variants


def run_engine(model: str, options: dict[str, Any], batch: int, prompt: int, steps: int) -> None:
    """Prints what one engine measures, as JSON: the body of a process."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="bfloat16",
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=prompt + steps + 16,
        max_num_seqs=batch,
        **options,
    )
    engine = llm.llm_engine
    torch.manual_seed(0)
    greedy = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True, detokenize=False)
    for number in range(batch):
        tokens = torch.randint(1000, 100_000, (prompt,)).tolist()
        engine.add_request(str(number), {"prompt_token_ids": tokens}, greedy)
    started = time.perf_counter()
    begun: set[str] = set()
    prompts, decoding = 0.0, []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - start
        if len(begun) == batch and len(outputs) == batch:
            decoding.append(seconds)
        begun |= {output.request_id for output in outputs if output.outputs[0].token_ids}
        if len(begun) == batch and not prompts:
            prompts = time.perf_counter() - started
    cache = engine.vllm_config.cache_config
    result = {
        "prompt": batch * prompt / prompts,
        "decode": batch / statistics.median(decoding),
        "tokens": cache.num_gpu_blocks * cache.block_size,
    }
    print(json.dumps(result), flush=True)


def in_a_process(*arguments: str) -> dict[str, float]:
    """Runs this program with ``arguments``; its last line of JSON."""
    process = subprocess.run(
        [sys.executable, __file__, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if process.returncode != 0:
        raise SystemExit(process.stdout[-4000:])
    return json.loads(next(line for line in process.stdout.splitlines() if line.startswith("{")))


@contextmanager
def model_folder(layers: int, experts: int) -> Iterator[str]:
    """A folder with a config and no weights, which vLLM draws at random."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(v2_lite_config(layers, experts)))
        yield folder


def time_engines(arguments: argparse.Namespace) -> None:
    """Prints the second and the third table."""
    shape = f"{arguments.layers} layers, {arguments.experts} experts"
    print(
        f"\nengine, random weights in the shape of V2-Lite ({shape}), {arguments.batch} sequences"
    )
    print(f"of {arguments.prompt} tokens, tokens per second; cache of 1 GiB over these layers")
    print(f"{'':18}{'prompts':>10}{'decoding':>10}{'speed':>8}{'cache tokens':>14}{'room':>7}")
    base: dict[str, float] = {}
    with model_folder(arguments.layers, arguments.experts) as folder:
        for name, options in engines().items():
            if name.split()[-1] not in arguments.variants:
                continue
            numbers = [str(n) for n in (arguments.batch, arguments.prompt, arguments.steps)]
            found = in_a_process("--engine", folder, json.dumps(options), *numbers)
            base = base or found
            print(
                f"{name:18}{found['prompt']:10.1f}{found['decode']:10.1f}"
                f"{found['decode'] / base['decode']:7.2f}x{found['tokens']:14,}"
                f"{found['tokens'] / base['tokens']:6.2f}x",
                flush=True,
            )


def main() -> None:
    """Prints the tables."""
    if sys.argv[1:2] == ["--engine"]:
        model, options, *numbers = sys.argv[2:]
        run_engine(model, json.loads(options), *map(int, numbers))
        return
    variants = [name.split()[-1] for name in engines()]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("kernels", "engines"), help="one of the two parts")
    parser.add_argument("--keys", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant")
    parser.add_argument("--seconds", type=float, default=0.2, help="of a turn")
    parser.add_argument("--batch", type=int, default=16, help="sequences of an engine")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of each")
    parser.add_argument("--steps", type=int, default=48, help="tokens that each decodes")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument(
        "--variants",
        nargs="*",
        default=variants,
        choices=variants,
        help="engines; speeds are relative to the first of the list above",
    )
    arguments = parser.parse_args()
    print(f"torch_flash_mla {torch_flash_mla.__version__}, torch {torch.__version__}", flush=True)
    if arguments.only != "engines":
        time_kernels(arguments.keys, measure.Effort(arguments.rounds, arguments.seconds))
    if arguments.only != "kernels":
        time_engines(arguments)


if __name__ == "__main__":
    main()
