"""Sphinx: the pages of this folder, and the reference from the package's docstrings.

make docs          # build/docs/index.html; warnings are errors
"""

import re
from typing import Any

import torch_flash_mla

project = "torch_flash_mla"
author = "the torch_flash_mla authors"
release = torch_flash_mla.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = f"torch_flash_mla {release}"
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Results", "params_style")]
myst_heading_anchors = 3
python_maximum_signature_line_length = 88


def adapt(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are written to be read as text; two habits of theirs mean something else here."""
    for i, line in enumerate(lines):
        # "head_dim_v: L." is no list whose items count A, B, C; "[T, H, *]" has no emphasis.
        line = re.sub(r"^( +[\w, ]+: )([A-Z]\.)$", r"\1\\\2", line)
        lines[i] = line.replace("*]", r"\*]")
    if "Returns:" in lines:  # several results with names look like arguments
        start = lines.index("Returns:")
        rest = lines[start + 1 :]
        end = next((i for i, line in enumerate(rest) if re.match(r"\w+:$", line)), len(rest))
        if sum(bool(re.match(r"    \w+: ", line)) for line in rest[:end]) > 1:
            lines[start] = "Results:"


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", adapt, priority=100)  # before napoleon
