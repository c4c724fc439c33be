"""How Sphinx builds the documentation: ``tox -e docs``."""

from pathlib import Path

import yaml

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

# sphinxcontrib-openapi shows the paths without their servers, and fails on the servers
# of a path: the page shows a copy with whole paths.
_folder = Path(__file__).parent
_document = yaml.safe_load((_folder / "openapi.yaml").read_text())
_servers = _document.pop("servers")
_document["paths"] = {
    item.pop("servers", _servers)[0]["url"] + path: item
    for path, item in _document["paths"].items()
}
_copy = _folder / "_build" / "openapi.yaml"
_copy.parent.mkdir(exist_ok=True)
_copy.write_text(yaml.safe_dump(_document, sort_keys=False))
