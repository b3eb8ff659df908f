"""vLLM's CPU worker, so that seeded requests outlive prompts that are computed in pieces.

After each piece of a prompt but the last, vLLM samples a token and throws it away, then turns the
generator of a request that has a seed four steps back. Generators of CPUs cannot turn back, and the
error ends the engine. Chunked prefill is on here, so a long prompt with a seed would be enough. The
model runner of this worker samples rows that are thrown away without their generators, which
therefore need no turning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from vllm.v1.outputs import SamplerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker


class FlashMLAModelRunner(CPUModelRunner):
    """``CPUModelRunner`` that draws from a request's generator only for tokens that stay."""

    def _sample(self, *args: Any, **kwargs: Any) -> SamplerOutput:
        with self._unfinished_prompts_unseeded():
            return super()._sample(*args, **kwargs)

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        with self._unfinished_prompts_unseeded():
            return super()._bookkeeping_sync(*args, **kwargs)

    @contextmanager
    def _unfinished_prompts_unseeded(self) -> Iterator[None]:
        generators = self.input_batch.generators
        discarded = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])
        hidden = {int(row): generators.pop(row) for row in discarded if row in generators}
        try:
            yield
        finally:
            generators.update(hidden)


class FlashMLAWorker(CPUWorker):
    """``CPUWorker`` with that model runner."""

    def init_device(self) -> None:
        """Makes the model runner."""
        super().init_device()
        if type(self.model_runner) is CPUModelRunner:
            self.model_runner.__class__ = FlashMLAModelRunner
