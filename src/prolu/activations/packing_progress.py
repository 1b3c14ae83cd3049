"""What a packer must know to resume: `progress` in the index of a folder of token blocks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class PackingProgress(NamedTuple):
    """What a packer must know to resume, beside the whole blocks on the disk: `progress` in a folder's index."""

    n_documents: int = 0
    """The number of documents packed, on both sides together."""
    n_calls: Sequence[int] = (0, 0)
    """The numbers of batches of documents packed from the training split and from the split for evaluation."""
    tails: Sequence[Sequence[int]] = ((), ())
    """The tokens on the training side and on the held-out side that do not fill a block yet."""
    documents_tail: Sequence[int] | None = ()
    """The document of each token in the held-out tail; None in a folder begun before documents were kept."""
    n_rows_left_out: int = 0
    """The number of rows without text, which were left out; known when all is packed."""
    roles: Sequence[str] = ()
    """The roles of chats seen so far."""
    roles_tails: Sequence[Sequence[int]] | None = None
    """The role of each token in the two tails; None for a text that is no chats."""
    chat_template: str = ""
    """SHA-256 of the template of the chats; empty for a text that is no chats."""

    @property
    def n_tokens_dropped(self) -> int:
        """The number of tokens that do not fill a block, on both sides together."""
        return sum(map(len, self.tails))

    @classmethod
    def read(cls, noted: Mapping[str, Any]) -> "PackingProgress":
        """Return the progress that a folder's index notes; the beginning, if it notes none."""
        if not noted:
            return cls()
        later = ("n_rows_left_out", "roles", "roles_tails", "chat_template")
        found = cls(noted["n_documents"], noted["n_calls"], noted["tails"], noted.get("documents_tail"))
        return found._replace(**{name: noted[name] for name in later if name in noted})

    def noted(self) -> dict[str, Any]:
        """Return the progress in the form in which an index notes it."""
        fields = self._asdict()
        if self.documents_tail is None:
            del fields["documents_tail"]
        if self.roles_tails is None:
            for name in ("roles", "roles_tails", "chat_template"):
                del fields[name]
        return fields
