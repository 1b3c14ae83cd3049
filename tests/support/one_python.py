"""One more Python that runs `prolu` commands and examples one after the other, so that PyTorch is imported once.

It is a process of its own because the functions of the package that is imported by pytest check their arguments.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path

SECONDS_PER_REQUEST = 1200


class OnePython:
    """The process, seen from the tests."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()

    def command(self, folder: Path, *args: str) -> None:
        """Run `prolu ARGS` in a folder; fail unless its exit code is 0."""
        self._do(folder, f"prolu {' '.join(args)}", {"args": args})

    def code(self, folder: Path, text: str) -> None:
        """Run a program in a folder; fail if it raises."""
        self._do(folder, text, {"code": text})

    def _do(self, folder, name, request):
        print(json.dumps({"folder": str(folder)} | request), file=self._process.stdin, flush=True)
        watchdog = threading.Timer(SECONDS_PER_REQUEST, self._process.kill)
        watchdog.start()
        answer = self._process.stdout.readline()
        watchdog.cancel()
        assert answer, f"{name}: the process has died"
        code, said = json.loads(answer)
        assert code == 0, f"{name}: {said[-2000:]}"


def exit_code(request: dict) -> int:
    try:
        if "args" in request:
            from prolu.cli import main

            return main(request["args"])
        exec(compile(request["code"], "<example>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is not said through sys.stdout is no answer
    for line in sys.stdin:
        request = json.loads(line)
        os.chdir(request["folder"])
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = exit_code(request)
        print(json.dumps([code, said.getvalue()]), file=answers, flush=True)


if __name__ == "__main__":
    main()
