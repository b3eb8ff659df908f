"""Greedy tokens by an engine of several processes, as JSON on the last line.

    python parallel_program.py PROMPTS.json [NAME=VALUE ...]

The values are JSON, and arguments of ``LLM``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main(prompts: str, *options: str) -> None:
    """Prints a list of token ids for each prompt."""
    arguments = {name: json.loads(value) for name, value in (o.split("=", 1) for o in options)}
    llm = LLM(max_model_len=2048, enforce_eager=True, seed=0, **arguments)
    inputs = [{"prompt_token_ids": prompt} for prompt in json.loads(Path(prompts).read_text())]
    parameters = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    outputs = llm.generate(inputs, parameters, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]), flush=True)


if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    main(*sys.argv[1:])
