"""Multi-head latent attention of this package inside models of transformers.

::

    from torch_flash_mla.integrations.transformers import patch

    report = patch(model, kv_cache_dtype="q8_kv")  # print(report) shows what happened to each layer
    model.generate(**inputs)                        # pages of 8-bit latents, no expanded keys

``patch`` changes two attributes of each MLA layer (``expand_kv`` and ``config``; of a layer whose
one key head is its value only the latter) and how ``generate()`` makes its cache. Weights,
state_dict, masks and every other layer stay as they are; ``unpatch`` takes it back::

    patch.py  ->  attention.py (one call of the op per layer)  ->  torch.ops.flashmla
                  cache.py (pages), weights.py (kv_b_proj)
                  shared_keys.py (layers whose one key head is their value)

Setting ``TORCH_FLASH_MLA_DISABLE=1`` turns ``patch`` into a report that changes nothing.
"""

import transformers
from packaging.version import Version

_OLDEST = Version("5.15")  # the first release whose MLA layers cache the latent

if Version(Version(transformers.__version__).base_version) < _OLDEST:
    raise ImportError(
        f"torch_flash_mla.integrations.transformers needs transformers >= {_OLDEST}, found "
        f"{transformers.__version__}: earlier releases cache expanded keys, not the latent"
    )

from torch_flash_mla.integrations.transformers.cache import MLACache  # noqa: E402
from torch_flash_mla.integrations.transformers.decoder_step import DecoderStep  # noqa: E402
from torch_flash_mla.integrations.transformers.patch import (  # noqa: E402
    LayerReport,
    PatchReport,
    patch,
    patched,
    unpatch,
)

__all__ = ["DecoderStep", "LayerReport", "MLACache", "PatchReport", "patch", "patched", "unpatch"]
