"""The Python standard library's own source, read from the running interpreter, one document a module."""

import hashlib
import sysconfig
from pathlib import Path

LEFT_OUT_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "encodings",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
"""Tests, idlelib, installed packages, and folders that are mostly generated tables."""

LEFT_OUT_FILES = {"stringprep.py", "html/entities.py"}
"""Generated tables outside those folders."""


def stdlib_documents() -> list[tuple[str, str]]:
    """Modules of the standard library as (path below its root, source), in order of path.

    Which modules there are depends on the interpreter's version, so no number computed from this
    corpus is the same everywhere.

    Raises:
        ValueError: the interpreter carries no readable source (a frozen or zipped library).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        generated = path.as_posix() in LEFT_OUT_FILES or path.name.startswith("_sysconfigdata")
        if generated or LEFT_OUT_FOLDERS.intersection(path.parts[:-1]):
            continue
        source = file.read_text(encoding="utf-8", errors="replace")
        if source.strip():
            documents.append((path.as_posix(), source))
    if not documents:
        raise ValueError(f"data 'builtin': no Python source under {root}; pass --data a file or a dataset")
    return documents


def digest(documents: list[tuple[str, str]]) -> str:
    """SHA-256 over paths and sources, in order: names one version of the corpus."""
    total = hashlib.sha256()
    for path, source in documents:
        total.update(path.encode() + b"\0" + source.encode() + b"\0")
    return total.hexdigest()
