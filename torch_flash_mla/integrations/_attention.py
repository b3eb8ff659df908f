"""The former name of ``integrations/transformers/attention.py``: the same module."""

import sys

from torch_flash_mla.integrations.transformers import attention

sys.modules[__name__] = attention
