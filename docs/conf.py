"""Sphinx configuration."""

import itertools
import re

import thrifty

project = "thrifty"
author = "The thrifty developers"
release = version = thrifty.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "thrifty"
html_static_path = ["_static"]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
exclude_patterns = ["_build"]
default_role = "code"


def plain_docstring(_app, _what, _name, _object, _options, lines):
    """Docstrings are plain text for people: paragraphs with hanging indents keep their lines, bars are bars."""
    shown = []
    for blank, group in itertools.groupby(lines, key=lambda line: not line.strip()):
        part = list(group)
        indents = {len(line) - len(line.lstrip()) for line in part if line.strip()}
        if not blank and len(indents) > 1 and not part[0].lstrip().startswith((">>>", "-", "*")):
            part = [f"| {line}" for line in part]
        elif not blank and not part[0].lstrip().startswith(">>>"):
            part = [re.sub(r"\|(?=\S)", r"\\|", line) for line in part]
        shown += part
    lines[:] = shown


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", plain_docstring)
