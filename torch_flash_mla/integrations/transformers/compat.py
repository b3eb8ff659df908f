"""What differs between the releases of transformers that are supported, found by feature."""

from __future__ import annotations

import inspect

from transformers import GenerationMixin, cache_utils

# Models and generate() call the cache past_key_values up to 5.23 and cache since.
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)

# Cache layers that store nothing: those of layers without attention, or with the keys of another
# one. Up to 5.22 there are none; such layers have one of linear attention, always empty.
STORES_NOTHING: tuple[type, ...] = tuple(
    vars(cache_utils)[name] for name in ("DummyLayer",) if hasattr(cache_utils, name)
)

# Up to 5.17 layers with an indexer cache expanded keys, and call their kind of cache otherwise.
SPARSE_LAYERS_CACHE_LATENTS = "indexed_attention" in cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
