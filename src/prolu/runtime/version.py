"""The version of this package."""

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Return the version of prolu; `0+source` for a source tree on PYTHONPATH that nobody has installed."""
    try:
        return version("prolu")
    except PackageNotFoundError:
        return "0+source"
