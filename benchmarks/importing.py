"""Measure what `import prolu` adds to `import torch`, and how long `prolu --help` takes.

Commands take turns, each in 7 new processes, and medians are printed: by the clock, and of the processor's time, which
other work on the machine changes less.
"""

import resource
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


def measure(arguments: list[str]) -> tuple[float, float]:
    """Return how many seconds one new process takes by the clock, and of the processor."""
    start = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, used


def main() -> None:
    """Print a line for each command."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in WORK}
    for measured in [False] + [True] * ROUNDS:  # the first fills the disk cache
        for name, arguments in WORK.items():
            times = measure(arguments)
            if measured:
                taken[name].append(times)
    middle = {name: [statistics.median(column) for column in zip(*times, strict=True)] for name, times in taken.items()}
    print(f"{'':22}{'clock':>8}{'beside torch':>14}{'processor':>12}{'beside torch':>14}")
    for name, (clock, used) in middle.items():
        torch_clock, torch_used = middle["import torch"]
        more = clock - torch_clock
        more_used = used - torch_used
        print(f"{name:22}{clock:6.2f} s{more:+12.2f} s{used:10.2f} s{more_used:+12.2f} s")


if __name__ == "__main__":
    main()
