"""How kernels are compiled by numba, and kept on the disk for later processes where that is possible.

Keeping them only saves the seconds that compiling takes. So a folder that cannot be written (a container with a
read-only file system, a shared installation), a full disk or a damaged file is no reason to fail: the kernels are
compiled again, and one sentence says why.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core import caching
from numba.misc.appdirs import AppDirs

from prolu.runtime.files import first_line

logger = logging.getLogger(__name__)

WHAT_TO_DO = (
    "every process compiles them again, which takes about ten seconds, unless NUMBA_CACHE_DIR names a folder of your "
    "own that can be written"
)

_said: set[str] = set()
"""The kinds of faults that this process has warned of."""


def jit(**options: Any) -> Callable[[Callable], Callable]:
    """Return a decorator that turns a Python function into a kernel, compiled by numba when it is first called.

    The compiled kernel is kept on the disk for later processes, if there is a place for it. While it runs, other Python
    threads can run too (it releases the GIL). `options` are those of `numba.njit`. Kernels are `no_type_check`, because
    the type checker of the tests must not wrap what numba compiles.
    """

    def compiled(function: Callable) -> Callable:
        kernel = njit(nogil=True, error_model="numpy", **options)(function)
        # `cache=True` is not used, because any fault of the cache would then raise an error at import, compilation or
        # call.
        try:
            kernel._cache = _OptionalCache(function)  # pyright: ignore[reportAttributeAccessIssue]
        except Exception as problem:  # numba raises RuntimeError if no folder takes a file, and others for odd paths
            # A folder that other users can write, such as /tmp, is never taken, because what lies in a cache is run as
            # code.
            logger.debug("no cache for kernels: %s", problem)
            _say_once("place", f"numba finds no folder to keep its compiled kernels in; {WHAT_TO_DO}")
        return kernel

    return compiled


class _OwnFolder(caching.UserWideCacheLocator):
    """The cache in the user's home."""

    @classmethod
    def from_function(cls, py_func: Callable, py_file: str) -> Any:
        # For a user without a home, numba would take the folder `~` in the current one, which may be somebody else's.
        if not os.path.isabs(AppDirs(appname="numba", appauthor=False).user_cache_dir):
            return None
        return super().from_function(py_func, py_file)


class _Places(caching.CompileResultCacheImpl):
    """Where compiled kernels may be kept: where the user says, beside the package, or in the user's home."""

    _locator_classes = (caching.UserProvidedCacheLocator, caching.InTreeCacheLocator, _OwnFolder)


class _OptionalCache(caching.FunctionCache):
    """numba's cache of one kernel. An error of the cache never becomes one of the kernel."""

    _impl_class = _Places

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the kept kernel for some types of arguments; None if there is none that can be used."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as problem:  # a damaged file may raise any error
            found = f"numba's cache in {self.cache_path} cannot be read ({_reason(problem)})"
            try:
                self.flush()  # so that the next process does not find the damage again
                _say_once("read", f"{found}; its kernels are compiled anew")
            except OSError:
                self.disable()
                _say_once("read", f"{found}; {WHAT_TO_DO}")
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a kernel that was just compiled, if that is possible."""
        try:
            super().save_overload(sig, data)
        except Exception as problem:  # a disk that is full by now, a folder that is gone
            found = f"numba cannot keep its compiled kernels in {self.cache_path} ({_reason(problem)})"
            _say_once("write", f"{found}; {WHAT_TO_DO}")
            self.disable()


def _reason(problem: Exception) -> str:
    text = getattr(problem, "strerror", None) or first_line(problem)
    return f"{type(problem).__name__}: {text}"


def _say_once(fault: str, sentence: str) -> None:
    """Warn of a fault of one kind once per process, although every kernel meets it."""
    if fault not in _said:
        _said.add(fault)
        logger.warning(sentence)
