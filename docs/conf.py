"""Sphinx's settings for the pages in pt_dance/pt_docs, built on their own as PyTerrier's documentation builds them.

Theme, extensions and options are those of https://pyterrier.readthedocs.io, whose settings stand in docs/conf.py of
PyTerrier's repository, so that a page which is clean here is clean there. Nothing is fetched from the network.
"""

import pt_dance

project = "pt_dance"
copyright = "the pt_dance developers"
author = "The pt_dance developers"
release = pt_dance.__version__
html_title = f"{project} {release}"
html_theme = "furo"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # before the type hints, which are put into what it has made of a docstring
    "sphinx_autodoc_typehints",
    "sphinx.ext.coverage",
    "sphinx.ext.viewcode",
    "sphinx.ext.githubpages",
    "sphinx_tabs.tabs",
    "sphinx_togglebutton",
    "sphinx_design",
    "myst_parser",
]
source_suffix = [".rst", ".md"]
language = "en"
pygments_style = "sphinx"
toc_object_entries_show_parents = "hide"

autoclass_content = "both"
autodoc_default_options = {"member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_typehints = "description"
always_use_bars_union = True
