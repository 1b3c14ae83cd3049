"""Train many sparse autoencoders on one stream of language-model activations, and compare them."""

from typing import TYPE_CHECKING

from prolu.runtime.late_import import names_of
from prolu.runtime.version import package_version

if TYPE_CHECKING:
    from prolu.public_names import *  # noqa: F403
    from prolu.public_names import __all__ as __all__

__version__ = package_version()

__getattr__ = names_of("prolu.public_names")


def __dir__() -> list[str]:
    """Return the public names, without the folders of the package."""
    return sorted(__getattr__("__all__"))
