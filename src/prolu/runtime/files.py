"""Files that are either whole or absent, folders that one process locks, and JSON that is read with care.

A file gets its name only after its content is on the disk, so neither a kill nor a power failure leaves half a file
under that name. `docs/reference/reliability.md` says what the rest of the package builds on this.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

T = TypeVar("T")

before_operation: list[Callable[[str, Path], None]] = []
"""Functions called before every write, fsync, rename and unlink with its name and path. Tests kill or fail there."""

SECONDS_BETWEEN_TRIES = 0.2
"""The time between two attempts to get a lock that another process holds, in seconds."""


def nearest_existing(path: Path) -> Path:
    """Return the path, or the closest of its parents that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def check_can_be_folder(out: Path) -> None:
    """Raise ValueError if no folder can be made there: a parent is a file, or a folder that must not be written."""
    if not (nearest := nearest_existing(out)).is_dir():
        raise ValueError(f"out {str(out)!r}: {nearest} is a file")
    if not out.exists() and not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"out {str(out)!r}: cannot be written (no permission to write into {nearest})")


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a file so that its name always stands for the whole old content or the whole new one."""
    # Beside the file, since a rename is atomic within one file system only.
    partial = file.with_name(f".{file.name}.partial")
    # In a folder from elsewhere, a link of this name could make this write change a file outside the folder.
    partial.unlink(missing_ok=True)
    try:
        write_flushed(partial, content)
        _announce("rename", file)
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)  # for example after a full disk, where the space is needed
        raise
    _flush_folder(file.parent)


def write_flushed(file: Path, content: str | bytes) -> None:
    """Write a file and flush it to the disk."""
    data = content.encode() if isinstance(content, str) else content
    with file.open("wb") as out:
        _announce("write", file)
        out.write(data)
        out.flush()
        _announce("fsync", file)
        os.fsync(out.fileno())


def write_at(file: Path, at: int, content: bytes) -> None:
    """Write into a file from byte `at` on, cut off whatever lay behind that byte, and flush it to the disk."""
    with file.open("r+b" if file.exists() else "wb") as out:
        _announce("write", file)
        # What a killed process had appended after the last recorded length must not remain after the new content.
        out.truncate(at)
        out.seek(at)
        out.write(content)
        out.flush()
        _announce("fsync", file)
        os.fsync(out.fileno())


def rename_folder(partial: Path, final: Path) -> None:
    """Give a finished folder its final name."""
    _flush_folder(partial)
    _announce("rename", final)
    partial.replace(final)
    _flush_folder(final.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder with all its content, if it exists."""
    _announce("unlink", path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    # The names of files are content of the folder. Without this, a renamed file may lose its new name in a power
    # failure.
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


LOCK_FILE = ".lock"
"""The file by which a process keeps others out of a folder."""


@contextmanager
def locked(folder: Path, file: str = LOCK_FILE, *, patience: float = 0.0) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs.

    The operating system releases the lock when the process ends, even if it is killed: nothing is left to clean up.

    Args:
        folder: An existing folder.
        file: The name of the lock file in it. Locks of different names exclude each other only by name.
        patience: How long to wait for another process that holds the lock, in seconds; by default not at all.

    Raises:
        FolderBusyError: Another process still holds the lock.
    """
    # flock on Unix. The lock belongs to the process: a block may be left in another thread than it was entered in.
    lock = FileLock(folder / file, thread_local=False)
    try:
        held = lock.acquire(timeout=patience, poll_interval=SECONDS_BETWEEN_TRIES)
    except Timeout:
        raise FolderBusyError(
            f"folder {str(folder)!r}: another process is working there; wait for it or stop it"
        ) from None
    with held:
        yield


def retry_while_busy(work: Callable[[], T], seconds: float) -> T:
    """Return what `work` returns; try again for `seconds` while another process locks a folder that it needs.

    This is for work that takes its locks in functions that it calls; `locked` itself can wait too.

    Raises:
        FolderBusyError: The folder is still locked after that time.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return work()
        except FolderBusyError:
            if time.monotonic() > end:
                raise
        time.sleep(SECONDS_BETWEEN_TRIES)


def json_text(value: Any, **options: Any) -> str:
    """Return a value as JSON; a number that is not finite becomes null, since JSON has no NaN and no infinity.

    `options` are those of `json.dumps`.
    """
    return json.dumps(_with_null(value), allow_nan=False, **options)


def _with_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _with_null(part) for name, part in value.items()}
    return [_with_null(part) for part in value] if isinstance(value, list | tuple) else value


def _from_json(text: str) -> Any:
    """Return what a JSON text holds; NaN and infinities, which early versions wrote, are read as null."""
    return json.loads(text, parse_constant=lambda _: None)


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the text of a .jsonl file: one JSON object per line."""
    return "".join(json_text(row) + "\n" for row in rows)


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
    # Bytes that are not UTF-8 are replaced, so that the complaint can say in which line they are.
    return rows_of_json(file.read_text(encoding="utf-8", errors="replace"), str(file))


def rows_of_json(text: str, where: str) -> list[dict[str, Any]]:
    """Return the objects in a text that has one JSON object per line.

    Args:
        text: The text.
        where: What the text is, for the message.

    Raises:
        ValueError: A line is not a JSON object.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = _from_json(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: line {number} is not a JSON object")
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
        found = _from_json(file.read_text(encoding="utf-8"))
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
    return json.loads(json_text(value))


def first_line(problem: BaseException) -> str:
    """Return the first line of an exception's text, or the name of its type if it has no text."""
    return (str(problem).strip() or type(problem).__name__).split("\n")[0]
