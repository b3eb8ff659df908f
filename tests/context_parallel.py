"""What one process or the ranks of a group compute over caches that hold one context.

    python -m torch.distributed.run --standalone --nproc-per-node=2 tests/context_parallel.py FOLDER

Every rank runs every case with ``process_group`` and saves its results in FOLDER/RANK.pt. The tests
(``test_context_parallel.py``) run the same cases in their own process, over ordinary caches.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.distributed import DistributedConfig
from transformers_cases import TINY_MODEL, small_model, tiny_model
from transformers_cases import families as taken_families
from transformers_compare import CACHE_ARGUMENT, assistant_of, prompt

from torch_flash_mla.integrations.transformers import MLACache, patch

# Of 2, 4 and 1 ranks, as they come: pages that are filled, begun, and empty.
LENGTHS = (3, 8, 9, 40, 64, 65)
_FAMILIES = ("deepseek_v3", "longcat_flash", "kimi_linear", "dots3_note", "hy_v4", "glm5_next")
FAMILIES = tuple(family for family in _FAMILIES if family in taken_families())
LONG = 3000
PACKED = ("q8_kv", "q4_kv")

MakeCache = Callable[..., MLACache]
Results = dict[str, Tensor]


@torch.no_grad()
def run(model: PreTrainedModel, ids: Tensor, cache: Any, **arguments: Any) -> Tensor:
    """Logits; the cache goes on."""
    return model(ids, **{CACHE_ARGUMENT: cache}, **arguments).logits


def held_out(tokens: int) -> Tensor:
    return torch.tensor([list((TINY_MODEL / "heldout.txt").read_bytes()[:tokens])])


def long_context(make: MakeCache, dtype: torch.dtype, kv_cache_dtype: str) -> Results:
    """The tiny model on 3000 tokens: a prompt in one piece, another piece, single tokens."""
    model = tiny_model().to(dtype)
    patch(model)
    ids, cache = held_out(LONG + 60), make(model, kv_cache_dtype=kv_cache_dtype)
    logits = [run(model, ids[:, :LONG], cache, logits_to_keep=64)]
    logits.append(run(model, ids[:, LONG : LONG + 50], cache))
    logits += [run(model, ids[:, i : i + 1], cache) for i in range(LONG + 50, LONG + 60)]
    assert cache.get_seq_length() == LONG + 60
    tokens = model.generate(ids, **{CACHE_ARGUMENT: cache}, max_new_tokens=32, do_sample=False)
    return {"logits": torch.cat(logits, 1).float(), "tokens": tokens}


def pieces(make: MakeCache) -> Results:
    """Prompts and single tokens around the edges of pages."""
    model = small_model("deepseek_v3")
    patch(model)
    results = {}
    for length in LENGTHS:
        ids = prompt((length + 12, length + 12))["input_ids"]
        cache = make(model, block_size=8)
        logits = [run(model, ids[:, :length], cache), run(model, ids[:, length:-9], cache)]
        logits += [run(model, ids[:, i : i + 1], cache) for i in range(length + 3, length + 12)]
        results[str(length)] = torch.cat(logits, 1)
    return results


def families(make: MakeCache) -> Results:
    """Padded prompts through layers of every kind: sparse, sliding, linear, with sinks."""
    results = {}
    for family in FAMILIES:
        model = small_model(family)
        patch(model)
        out = model.generate(
            **prompt((21, 13)),
            **{CACHE_ARGUMENT: make(model, block_size=4)},
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        results[family] = torch.stack(out.logits)
        results[f"{family}, tokens"] = out.sequences
    return results


def generation(make: MakeCache) -> Results:
    """Beams, samples of one prompt, guesses that are taken back."""
    model = small_model("deepseek_v3")
    patch(model)
    results = {}
    ways: dict[str, dict[str, Any]] = {
        "beams": {"num_beams": 3, "do_sample": False},
        "samples": {"num_return_sequences": 4, "do_sample": True},
        "assisted": {"assistant_model": assistant_of(model), "do_sample": False},
    }
    for name, arguments in ways.items():
        set_seed(3)
        results[name] = model.generate(
            **prompt((21,)),
            **{CACHE_ARGUMENT: make(model, block_size=4)},
            max_new_tokens=24,
            pad_token_id=0,
            **arguments,
        )
    return results


def changes(make: MakeCache) -> Results:
    """Crop, fork, reorder, select, reset, deepcopy."""
    model = small_model("deepseek_v3")
    patch(model)
    ids, cache = prompt((70,))["input_ids"], make(model, block_size=4)
    run(model, ids, cache)
    cache.crop(-33)
    results = {"crop": run(model, ids[:, :11], cache)}
    cache.fork(3)
    results["fork"] = run(model, ids[:, :15].view(3, 5), cache)
    cache.reorder_cache(torch.tensor([2, 2, 0, 1]))
    results["reorder"] = run(model, ids[:, 20:40].view(4, 5), cache)
    other = copy.deepcopy(cache)
    cache.crop(-10)
    cache.batch_select_indices(torch.tensor([3, 1]))
    results["select"] = run(model, ids[:, :2].view(2, 1), cache)
    results["deepcopy"] = run(model, ids[:, :4].view(4, 1), other)
    cache.crop(-1000)
    results["emptied"] = run(model, ids[:, :40].view(2, 20), cache)
    cache.reset()
    results["reset"] = run(model, ids, cache)
    return results


def files(make: MakeCache, folder: Path) -> Results:
    """Saved, and continued by a cache from the file."""
    model = small_model("deepseek_v3")
    patch(model)
    results = {}
    for kv_cache_dtype in ("auto", "q8_kv"):
        ids = prompt((45, 45))["input_ids"]
        cache = make(model, kv_cache_dtype=kv_cache_dtype, block_size=4)
        run(model, ids, cache)
        path = folder / f"{kv_cache_dtype}.{make.rank}.safetensors"
        cache.save(path, model)
        loaded = MLACache.load(path, model, process_group=make.group)
        assert loaded.get_seq_length() == 45
        results[kv_cache_dtype] = run(model, ids[:, :9], loaded)
        assert torch.equal(results[kv_cache_dtype], run(model, ids[:, :9], cache))
    return results


def refusals(make: Maker, folder: Path) -> dict[str, str]:
    """What the ranks are told when they do not do the same, or ask for what no rank has."""
    model = small_model("deepseek_v3")
    patch(model)
    rank, messages = make.rank, {}
    ids = prompt((20,))["input_ids"]

    def refused(name: str, error: type[Exception], call: Callable[[], Any]) -> None:
        try:
            call()
        except error as raised:
            messages[name] = str(raised)
        else:
            raise AssertionError(f"{name}: not refused")

    cache = make(model, block_size=4)
    first = run(model, ids, cache)
    other = ids.clone()
    other[0, -1] += rank
    refused("tokens", ValueError, lambda: run(model, other, cache))
    refused("number", ValueError, lambda: run(model, ids[:, rank:], cache))
    assert cache.get_seq_length() == 20
    cache.crop(-20)
    assert torch.equal(run(model, ids, cache), first)  # a refused step has left nothing behind

    refused("page", ValueError, lambda: run(model, ids, make(model, block_size=4 + rank)))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].self_attn.kv_b_proj.weight *= 1 + rank
    refused("weights", ValueError, lambda: run(changed, ids, make(changed)))
    refused(
        "attention weights",
        NotImplementedError,
        lambda: run(model, ids, make(model), output_attentions=True),
    )
    logits = model(ids, **{CACHE_ARGUMENT: make(model, block_size=4)}).logits
    assert (logits - first).abs().max() < 1e-4 * first.abs().max()
    refused("gradients", NotImplementedError, logits.sum().backward)
    folder_of_model = folder / "model"
    if rank == 0:
        small_model("deepseek_v2").save_pretrained(folder_of_model)
    dist.barrier()
    split = AutoModelForCausalLM.from_pretrained(
        folder_of_model, distributed_config=DistributedConfig(tp_plan="auto")
    )
    patch(split)
    refused("tp_plan", NotImplementedError, lambda: run(split, ids, make(split)))
    refused("fixed", ValueError, lambda: make(model, max_cache_len=64))
    refused("no group", TypeError, lambda: MLACache(model.config, process_group="gloo"))
    small = dist.new_group([0])
    if rank > 0:
        refused("no member", ValueError, lambda: MLACache(model.config, process_group=small))

    plain = MLACache(model.config)
    run(model, ids, plain)
    for name, saved in ((f"share.{rank}", cache), (f"whole.{rank}", plain)):
        saved.save(folder / name, model)
    dist.barrier()
    load = partial(MLACache.load, model=model)
    neighbour = (rank + 1) % dist.get_world_size()
    group = {"process_group": make.group}
    refused("neighbour", ValueError, lambda: load(folder / f"share.{neighbour}", **group))
    refused("share", ValueError, lambda: load(folder / f"share.{rank}"))
    refused("whole", ValueError, lambda: load(folder / f"whole.{rank}", **group))
    return messages


class Maker:
    """Makes caches of a group; None: ordinary ones."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)

    def __call__(self, model: PreTrainedModel, **arguments: Any) -> MLACache:
        return MLACache(model.config, process_group=self.group, **arguments)


CASES: dict[str, Callable[[Maker], Results]] = {
    "pieces": pieces,
    "families": families,
    "generation": generation,
    "changes": changes,
    "long, float32": partial(long_context, dtype=torch.float32, kv_cache_dtype="auto"),
    "long, bfloat16": partial(long_context, dtype=torch.bfloat16, kv_cache_dtype="auto"),
    **{
        f"long, {name}": partial(long_context, dtype=torch.float32, kv_cache_dtype=name)
        for name in PACKED
    },
}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    make = Maker(dist.group.WORLD)
    results = {name: case(make) for name, case in CASES.items()}
    results["files"] = files(make, folder)
    results["refused"] = refusals(make, folder)
    torch.save(results, folder / f"{make.rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
