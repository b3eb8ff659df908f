"""Many prompts at once by vLLM's offline engine, over this package's operators.

    python examples/vllm_offline.py
    python examples/vllm_offline.py --model PATH_OR_NAME --kv-cache-dtype q4_kv --processes 2

In an environment that has vLLM (docs/serving_vllm.md). Nothing of torch_flash_mla is imported here:
vLLM finds it by itself. The prompts begin with the same text, which is computed once.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB of cache

from vllm import LLM, SamplingParams

HERE = Path(__file__).parent
SHARED = (HERE / "shared_prompt.py").read_text()[:1000]
QUESTIONS = ("\n\ndef main(", "\n\nclass Cache:\n    def ", "\n\nimport ", "\n\n# The ")


def main() -> None:
    """Prints each answer, and what the shared beginning saved."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(HERE / "tiny_model"))
    parser.add_argument("--kv-cache-dtype", default="q8_kv", help="auto or a packed format")
    parser.add_argument("--processes", type=int, default=1, help="tensor parallel ranks")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, default=48)
    arguments = parser.parse_args()

    llm = LLM(
        arguments.model,
        max_model_len=arguments.max_model_len,
        enforce_eager=True,  # starts in seconds; leave it out where a server runs for long
        tensor_parallel_size=arguments.processes,
        additional_config={"torch_flash_mla": {"kv_cache_dtype": arguments.kv_cache_dtype}},
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens)
    llm.generate(SHARED, SamplingParams(max_tokens=1), use_tqdm=False)  # fills the cache
    start = time.perf_counter()
    outputs = llm.generate([SHARED + text for text in QUESTIONS], greedy, use_tqdm=False)
    seconds = time.perf_counter() - start
    for question, output in zip(QUESTIONS, outputs, strict=True):
        length, cached = len(output.prompt_token_ids), output.num_cached_tokens
        print(f"--- {length} tokens, {cached} of them from the cache")
        print(question.strip("\n") + output.outputs[0].text)
    written = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(f"--- {written} tokens for {len(outputs)} prompts in {seconds:.1f} s")
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    main()
