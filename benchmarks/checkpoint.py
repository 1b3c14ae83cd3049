"""Measure what a checkpoint costs: its size, the time to write and to read it, and how often one is written.

python benchmarks/checkpoint.py --d-in 768 --d-sae 12288 --runs 4
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from prolu import RunConfig, Trainer
from prolu.studies.checkpoints import LARGEST_FRACTION, SHORTEST_SECONDS, RunState, read_checkpoint, write_checkpoint


def main() -> None:
    """Write and read the state of a study several times, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=128)
    parser.add_argument("--d-sae", type=int, default=512)
    parser.add_argument("--runs", type=int, default=18)
    parser.add_argument("--rounds", type=int, default=5)
    request = parser.parse_args()
    trainers = [
        Trainer(RunConfig(d_sae=request.d_sae, n_tokens=512, init_seed=i), request.d_in, 512)
        for i in range(request.runs)
    ]
    states = {t.config.run_id: RunState(t.state.tensors(), t.state.counters()) for t in trainers}
    n_bytes = sum(tensor.nbytes for run in states.values() for tensor in run.tensors.values())
    writing = []
    reading = []
    # Here, since the system's temporary folder may lie in memory.
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for step in range(request.rounds):
            start = time.perf_counter()
            write_checkpoint(Path(folder), step, states)
            written = time.perf_counter()
            read_checkpoint(Path(folder))
            writing.append(written - start)
            reading.append(time.perf_counter() - written)
    seconds = statistics.median(writing)
    interval = max(SHORTEST_SECONDS, seconds / LARGEST_FRACTION)
    print(f"{request.runs} runs of {request.d_in} -> {request.d_sae}: {n_bytes / 1e6:,.0f} MB")
    print(f"write {seconds:.3f} s ({n_bytes / seconds / 1e6:,.0f} MB/s), read {statistics.median(reading):.3f} s")
    print(f"a checkpoint every {interval:,.0f} s takes {seconds / (seconds + interval):.2%} of the time")


if __name__ == "__main__":
    main()
