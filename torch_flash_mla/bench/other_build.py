"""A step of another build of this package, in a process of its own (``baselines.OtherBuild``).

Run as a program, so that nothing of this build is imported: the file that it is given names the
root of the other one. Prints a duration for every line that comes in.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch


def _module(name: str) -> ModuleType:
    """A file beside this one, whose imports of torch_flash_mla find the other build."""
    spec = importlib.util.spec_from_file_location(
        f"_step_{name}", Path(__file__).with_name(f"{name}.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(inputs: str) -> None:
    given = torch.load(inputs, weights_only=True)
    sys.path[0] = given["root"]
    from torch_flash_mla import __file__ as package
    from torch_flash_mla import ops

    assert Path(package).parent.parent == Path(given["root"]), package
    cases, measure = _module("cases"), _module("measure")
    call = cases.rotating_step(
        ops.mla_attention_kv_b, given["tensors"], given["scalars"], given["mebibytes"]
    )
    effort = measure.Effort(*given["effort"])
    torch.set_num_threads(given["threads"])
    with torch.no_grad():
        for _ in sys.stdin:
            print(measure.median_seconds(call, effort), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
