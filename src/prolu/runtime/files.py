"""Files that are either whole or not there, and folders that one process owns."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

before_operation: list[Callable[[str, Path], None]] = []
"""Called before every write, fsync, rename and unlink with its name and path. For tests that kill or fail there."""

SECONDS_BETWEEN_TRIES = 0.2


def nearest_existing(path: Path) -> Path:
    """The path, or the closest of its parents that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def check_can_be_folder(out: Path) -> None:
    """Raises ValueError if a file is in the way of a folder."""
    if not (nearest := nearest_existing(out)).is_dir():
        raise ValueError(f"out {str(out)!r}: {nearest} is a file")


def write_atomically(file: Path, content: str | bytes) -> None:
    """Writes to a temporary name beside `file`, flushes to the disk, renames."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        write_flushed(partial, content)
        _announce("rename", file)
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    _flush_folder(file.parent)


def write_flushed(file: Path, content: str | bytes) -> None:
    """Writes a file and flushes it to the disk."""
    data = content.encode() if isinstance(content, str) else content
    with file.open("wb") as out:
        _announce("write", file)
        out.write(data)
        out.flush()
        _announce("fsync", file)
        os.fsync(out.fileno())


def write_at(file: Path, at: int, content: bytes) -> None:
    """Writes at byte `at`, cuts off whatever lay behind, and flushes to the disk."""
    with file.open("r+b" if file.exists() else "wb") as out:
        _announce("write", file)
        out.truncate(at)
        out.seek(at)
        out.write(content)
        out.flush()
        _announce("fsync", file)
        os.fsync(out.fileno())


def rename_folder(partial: Path, final: Path) -> None:
    """Gives a finished folder its name."""
    _flush_folder(partial)
    _announce("rename", final)
    partial.replace(final)
    _flush_folder(final.parent)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    _announce("unlink", path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _announce(operation: str, path: Path) -> None:
    for observe in before_operation:
        observe(operation, path)


class FolderBusyError(ValueError):
    """Another process is working in a folder."""


@contextmanager
def owned(folder: Path, file: str = ".lock") -> Iterator[None]:
    """Keeps other processes out of a folder for a while; the system lets go when its owner dies, however it dies.

    Raises:
        FolderBusyError: another process has it.
    """
    with (folder / file).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FolderBusyError(
                f"out {str(folder)!r}: another process is working there; wait for it or stop it"
            ) from None
        yield


def patiently(work: Callable[[], T], seconds: float) -> T:
    """What `work` gives, tried again for so long while another process is working in a folder that it needs.

    Raises:
        FolderBusyError: it still is.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return work()
        except FolderBusyError:
            if time.monotonic() > end:
                raise
        time.sleep(SECONDS_BETWEEN_TRIES)


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the text of a .jsonl file: one JSON object per line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_json_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a .jsonl file, one JSON object per line, whole or not at all."""
    write_atomically(file, json_lines(rows))


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file in order, one per line; none if there is no such file.

    Raises:
        ValueError: A line is not a JSON object.
    """
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{file}: line {number} is not a JSON object")
        rows.append(row)
    return rows


def read_json_object(file: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        file: The file.
        what: What a folder with this file is or holds, for the message about a missing file: "study", "token blocks".

    Raises:
        ValueError: The file is missing or unreadable, is not JSON, or holds something else than an object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file.parent}: no {what} here (no {file.name})") from None
    except OSError as problem:
        raise ValueError(f"{file}: cannot be read ({problem.strerror})") from None
    except (ValueError, RecursionError):  # a file of 100,000 opening brackets exhausts the parser's stack
        raise ValueError(f"{file}: not JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: not a JSON object")
    return found


def through_json(value: Any) -> Any:
    """Return a value as it reads once it has been written to a JSON file, so that the two can be compared.

    Tuples become lists, and keys become text.
    """
    return json.loads(json.dumps(value))


def first_line(problem: BaseException) -> str:
    """Return the first line of an exception's text, or the name of its type if it has no text."""
    return (str(problem).strip() or type(problem).__name__).split("\n")[0]
