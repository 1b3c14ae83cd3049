"""What `import prolu` adds to `import torch`, and what `prolu --help` takes: interleaved, medians of 7 processes."""

import statistics
import subprocess
import sys
import time

ROUNDS = 7
WORK = {
    "import torch": ["-c", "import torch"],
    "import torch, prolu": ["-c", "import torch, prolu"],
    "prolu --version": ["-m", "prolu", "--version"],
    "prolu --help": ["-m", "prolu", "--help"],
    "prolu train --help": ["-m", "prolu", "train", "--help"],
}


def main() -> None:
    """Prints a line for each."""
    seconds: dict[str, list[float]] = {name: [] for name in WORK}
    for measured in [False] + [True] * ROUNDS:  # the first fills the disk cache
        for name, arguments in WORK.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            if measured:
                seconds[name].append(time.perf_counter() - start)
    alone = statistics.median(seconds["import torch"])
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(
            f"{name:22} {middle:6.2f} s  {middle - alone:+6.2f} s beside torch  ({min(times):.2f} to {max(times):.2f})"
        )


if __name__ == "__main__":
    main()
