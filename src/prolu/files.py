"""Files that are either whole or not there."""

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(file: Path, content: str | bytes) -> None:
    """Writes to a temporary name beside `file`, flushes to the disk, renames."""
    data = content.encode() if isinstance(content, str) else content
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Objects of a .jsonl file, one a line; none if there is no such file.

    Raises:
        ValueError: a line is not a JSON object.
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
