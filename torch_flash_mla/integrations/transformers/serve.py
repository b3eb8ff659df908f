"""``transformers serve``, with every model that it loads patched.

::

    python -m torch_flash_mla.integrations.transformers.serve MODEL --kv-cache-dtype q8_kv

takes the arguments of ``transformers serve`` too, and needs what that needs:
``pip install 'transformers[serving]'``. Requests are answered one after the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from torch_flash_mla.formats import PACKED_FORMATS
from torch_flash_mla.integrations.transformers.attention import patch_state
from torch_flash_mla.integrations.transformers.patch import patch


def patch_served_models(kv_cache_dtype: str = "auto") -> None:
    """Lets the servers that transformers makes from here on patch the models they load.

    Models without MLA are served as they are. What happened to each layer is printed when a model
    is loaded.

    Raises:
        ImportError: a package that ``transformers serve`` needs is missing.
    """
    from transformers.cli.serving.model_manager import ModelManager

    load = ModelManager.load_model_and_processor

    def load_and_patch(self: Any, *args: Any, **kwargs: Any) -> Any:
        model, processor = load(self, *args, **kwargs)
        if all(patch_state(module) is None for module in model.modules()):
            print(patch(model, kv_cache_dtype, strict=False), flush=True)
        return model, processor

    ModelManager.load_model_and_processor = load_and_patch  # type: ignore[method-assign]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_flash_mla.integrations.transformers.serve",
        description="transformers serve, with models patched; all of its arguments work too",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--kv-cache-dtype", default="auto", choices=["auto", *PACKED_FORMATS], help="of the caches"
    )
    known, others = parser.parse_known_args(arguments)
    if "--continuous-batching" in others:
        parser.error(
            "--continuous-batching: its caches hold expanded keys; vLLM with torch_flash_mla "
            "batches requests (docs/serving_vllm.md)"
        )
    patch_served_models(known.kv_cache_dtype)
    from transformers.cli.transformers import app

    app(["serve", *others])


if __name__ == "__main__":
    main()
