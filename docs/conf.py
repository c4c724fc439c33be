"""How Sphinx builds the documentation: ``tox -e docs``."""

from synapse_roomkeys import __version__

project = "synapse_roomkeys"
author = "the synapse_roomkeys maintainers"
release = version = __version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxcontrib.openapi",
    "sphinx_mdinclude",
]
exclude_patterns = ["_build"]
html_theme = "furo"
# A name in single backticks is one of Python's; those outside the package stay text.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
