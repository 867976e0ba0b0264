"""Sphinx configuration."""

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
