import json
import math
import os
import signal
import subprocess
import sys
import threading

import pytest

from prolu.runtime.files import (
    FolderBusyError,
    first_line,
    json_text,
    locked,
    read_json_lines,
    read_json_object,
    retry_while_busy,
    through_json,
    write_json_lines,
)

HOLD = """
import sys, time
from pathlib import Path
from prolu.runtime.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_lock_keeps_another_process_out_until_it_dies(tmp_path, holder):
    with pytest.raises(FolderBusyError, match="another process is working there"), locked(tmp_path):
        pass
    with locked(tmp_path, ".report"):  # a lock of another name
        pass
    with pytest.raises(FolderBusyError):
        retry_while_busy(lambda: locked(tmp_path).__enter__(), 0.3)
    os.kill(holder.pid, signal.SIGKILL)
    with locked(tmp_path, patience=10):
        pass


def test_a_lock_that_waits_gets_its_turn(tmp_path):
    released = threading.Timer(0.5, lambda: first.__exit__(None, None, None))
    first = locked(tmp_path)
    first.__enter__()
    released.start()
    with locked(tmp_path, patience=10):
        assert not released.is_alive() or released.finished.is_set()
    with locked(tmp_path):
        pass


def test_a_lock_is_released_by_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


def test_through_json():
    assert through_json({"a": (1, 2), 3: None}) == {"a": [1, 2], "3": None}


def test_json_lines_are_read_as_they_were_written(tmp_path):
    rows = [{"a": 1, "b": None}, {"a": 0.1, "words": "naïve\nline"}]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == 2
    assert read_json_lines(tmp_path / "rows.jsonl") == rows
    assert read_json_lines(tmp_path / "no.jsonl") == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no study here \\(no study.json\\)"),
        (b"", "study.json: not JSON"),
        (b"{", "study.json: not JSON"),
        (b"\xff", "study.json: not JSON"),
        (b"[" * 100_000, "study.json: not JSON"),
        (b"[1]", "study.json: not a JSON object"),
        (b"null", "study.json: not a JSON object"),
    ],
)
def test_a_json_object_or_one_sentence(tmp_path, content, words):
    file = tmp_path / "study.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as refused:
        read_json_object(file, "study")
    assert "\n" not in str(refused.value)
    file.write_text('{"a": [1]}')
    assert read_json_object(file, "study") == {"a": [1]}


def test_a_folder_in_place_of_a_json_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_json_object(tmp_path, "study")


@pytest.mark.parametrize(
    ("problem", "line"),
    [(ValueError("one\ntwo"), "one"), (KeyError(), "KeyError"), (OSError("\n  three "), "three")],
)
def test_first_line(problem, line):
    assert first_line(problem) == line


def test_json_has_null_for_what_is_not_finite(tmp_path):
    value = {"a": [1.5, math.nan, (math.inf, 2)], "b": {"c": -math.inf}, "d": "NaN", "e": True}
    expected = {"a": [1.5, None, [None, 2]], "b": {"c": None}, "d": "NaN", "e": True}
    assert json.loads(json_text(value, indent=1)) == expected == through_json(value)
    old = tmp_path / "old.json"
    old.write_text(json.dumps(value))  # as early versions wrote it
    assert read_json_object(old, "study") == expected
    old.write_text(json.dumps(value) + "\n")
    assert read_json_lines(old) == [expected]
