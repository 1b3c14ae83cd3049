"""`docs/format.md`, as pages name each other for readers of the source, is a link to that page on the site."""

import re

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

PAGE = re.compile(r"docs/([\w/-]+)\.md")


class LinkPageNames(SphinxPostTransform):
    """Replaces the name by the page's title; a page that is not there is a warning, so an error."""

    default_priority = 5  # before references are resolved

    def run(self, **kwargs: object) -> None:
        """Of one page."""
        for literal in list(self.document.findall(nodes.literal)):
            if (name := PAGE.fullmatch(literal.astext())) is None:
                continue
            target = f"/{name[1]}"
            link = addnodes.pending_xref(
                "", refdomain="std", reftype="doc", reftarget=target, refexplicit=False, refwarn=True,
                refdoc=self.env.docname,
            )  # fmt: skip
            link += nodes.inline("", name[1], classes=["doc"])
            literal.replace_self(link)


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds it."""
    app.add_post_transform(LinkPageNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
