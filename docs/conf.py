"""The documentation site. `make docs` builds it into build/docs, with warnings as errors and nothing fetched."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project, author, release = "prolu", "The prolu maintainers", version_of("prolu")
project_copyright = "The prolu maintainers, MIT licence"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
    "page_names",
    "docstrings",
    "landmarks",
]
exclude_patterns = ["extensions"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # docstrings say `names`
autoclass_content = "both"  # the class, and how it is made
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False  # torch.nn.Module's would stand under every module without one
python_maximum_signature_line_length = 110
highlight_language = "none"  # a block without a language is a file tree or a drawing

html_theme = "furo"
html_title = f"prolu {release}"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["prolu.css"]
html_show_sphinx = False
html_copy_source = False
