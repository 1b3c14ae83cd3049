"""A terminal of a given width for a command, and what stands on its screen after each thing that the command writes."""

import fcntl
import os
import pty
import re
import struct
import termios
from collections.abc import Iterator, Sequence

ROWS = 24
TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


def written_in_terminal(command: Sequence[str], width: int) -> str:
    """Return all that a command writes to a terminal of this width, standard output and error together."""
    process, terminal = pty.fork()
    if process == 0:
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "CI")}
        os.execvpe(command[0], command, environment | {"TERM": "xterm"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, width, 0, 0))
    written = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the command has ended
            break
        if not part:
            break
        written += part
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0, written.decode()
    return written.decode()


def screens(written: str, width: int) -> Iterator[list[str]]:
    """Yield the lines of the screen each time the cursor moves: enough of a terminal for what rich writes."""
    lines = [""]
    row = column = 0
    for argument, letter, carriage, newline, text in TOKEN.findall(written):
        if text:
            for letter_written in text:
                if column == width:  # the terminal goes on in the next line
                    row, column = row + 1, 0
                    lines += [""] * (row == len(lines))
                lines[row] = lines[row][:column].ljust(column) + letter_written + lines[row][column + 1 :]
                column += 1
        elif carriage:
            column = 0
        elif newline:
            row += 1
            lines += [""] * (row == len(lines))
        elif letter == "A":
            row = max(0, row - int(argument or 1))
        elif letter == "K":
            lines[row] = "" if argument == "2" else lines[row][:column]
        else:
            assert letter in "mhl", f"{argument}{letter}: not known to this terminal"
        if not text:  # text alone may be half a line
            yield [line.rstrip() for line in lines]
