"""Turn the name of a page in code font, for example `docs/format.md`, into a link to that page on the site.

Docstrings and the lab notebook name pages in this way. The notebook is history and is not edited when a page moves, so
a page is found by its file name, in whatever folder it lies now.
"""

import re

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

PAGE = re.compile(r"docs/(?:\w+/)*([\w-]+)\.md")


class LinkPageNames(SphinxPostTransform):
    """The replacement of page names by links; a page that does not exist is a warning, and so an error."""

    default_priority = 5  # before references are resolved

    def run(self, **kwargs: object) -> None:
        """Replace the page names of one document."""
        pages = {docname.rpartition("/")[2]: docname for docname in self.env.found_docs}
        for literal in list(self.document.findall(nodes.literal)):
            name = PAGE.fullmatch(literal.astext())
            if name is None:
                continue
            link = addnodes.pending_xref(
                "",
                refdomain="std",
                reftype="doc",
                reftarget="/" + pages.get(name[1], name[1]),
                refexplicit=False,
                refwarn=True,
                refdoc=self.env.docname,
            )
            link += nodes.inline("", name[1], classes=["doc"])
            literal.replace_self(link)


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the transform to Sphinx."""
    app.add_post_transform(LinkPageNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
