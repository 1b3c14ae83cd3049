"""Packages whose names are imported when the first is used, so that `prolu --help` need not wait for PyTorch."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def names_of(module: str) -> Callable[[str], Any]:
    """Return a function that serves a package as its `__getattr__`, which Python asks for names that it does not find.

    It gives the package the names in `__all__` of a module, and `__all__` itself.

    Args:
        module: The module, as in "prolu.sae.autoencoder". It is imported when the first name is asked for.
    """
    package = module.rpartition(".")[0]

    def get(name: str) -> Any:
        # Python and its tools look for names such as `__wrapped__` or `__path__`, for which nothing needs to be
        # imported.
        if name == "__all__" or not name.startswith("__"):
            source = import_module(module)
            if name == "__all__" or name in source.__all__:
                return getattr(source, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
