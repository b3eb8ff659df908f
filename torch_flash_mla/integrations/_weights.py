"""The former name of ``integrations/transformers/weights.py``: the same module."""

import sys

from torch_flash_mla.integrations.transformers import weights

sys.modules[__name__] = weights
