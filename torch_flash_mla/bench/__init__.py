"""Measures the operators against what the machine can do. Run ``python -m torch_flash_mla.bench``.

Modules: ``measure`` (timing against noise), ``roof`` (instructions and memory), ``cases`` (tensors
and their flop and bytes), ``baselines`` (PyTorch's own attention, external commands), ``suites``
(the sub-commands), ``report`` (tables, JSON, plots), ``__main__`` (the command line).
"""
