"""The former name of ``integrations/transformers/cache.py``: the same module."""

import sys

from torch_flash_mla.integrations.transformers import cache

sys.modules[__name__] = cache
