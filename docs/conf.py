"""Sphinx' configuration: `make docs` builds the site, and every warning is an error."""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the API is imported for its docstrings

project = "fdk_jax"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "fdk_jax"
html_static_path: list[str] = []
myst_heading_anchors = 3
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}


def _from_markdown(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings write code as Markdown does: `code`s, indented blocks, and a * outside of both."""
    text = re.sub(r"\n\n(?=    \S)", "\n\n::\n\n", "\n".join(lines))
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``\\ ", text)
    parts = re.split(r"(``[^`]*``)", text)  # every other part is code
    parts[::2] = [re.sub(r"(?<!\\)\*", r"\\*", part) for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _from_markdown, priority=600)  # after napoleon
