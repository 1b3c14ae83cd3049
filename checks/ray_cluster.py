"""Sweeps on a Ray cluster of two workers, whole and killed, against the local engine: `make ray`.

    python checks/ray_cluster.py [--worker-kills 5] [--driver-kills 5] [--seed 0]

Makes `.venv-ray` if it is not there, and runs in it. After each kill the same command is run again. The folder (all but
`log.jsonl` and the report, which are drawn from the rest) must then equal that of the local engine, bit for bit. Ends
with one line; exit code 1 if a check failed.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv-ray"
PACKAGES = ["ray==2.60.0"]
N_WORKERS, N_STEPS = 2, 600


def environment() -> Path:
    """The Python of an environment that has Ray, and sees this project and the packages of this one; made once."""
    python, made = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    if not made.exists() or made.read_text() != " ".join(PACKAGES):
        print(f"making {ENVIRONMENT.name} (a minute)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        place = ["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        theirs = subprocess.run([python, *place], capture_output=True, text=True, check=True).stdout.strip()
        Path(theirs, "ours.pth").write_text(f"{ROOT / 'src'}\n{sysconfig.get_path('purelib')}\n")
        constraints = ["--constraint", ROOT / "constraints.txt"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *constraints, *PACKAGES], check=True)
        made.write_text(" ".join(PACKAGES))
    return python


class Sweeps:
    """One command into many folders, and what each holds at its end."""

    def __init__(self, folder: Path):
        from support import models

        self.folder = folder
        self._lm, self._text = models.write_model(folder / "lm"), models.write_stories(folder / "stories.txt")

    def command(self, out: str, *flags: str) -> list[str]:
        """Six SAEs."""
        source = ["--lm", "lm", "--data", "stories.txt", "--hook", "blocks.1.hook_resid_pre", "--ctx", "32"]
        size = ["--target-l0", "6", "--scale", "0.015", "--batch-size", "64", "--eval-tokens", "320", "--threads", "1"]
        settings = ["--checkpoint-minutes", "0.01", "--latent-pages", "none", "--out", out]
        return [sys.executable, "-m", "prolu", "sweep", "demo", *source, *size, *settings, *flags]

    def start(self, out: str, *flags: str) -> "subprocess.Popen[str]":
        """In a process group of its own."""
        return subprocess.Popen(
            self.command(out, *flags), cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def run(self, out: str, *flags: str) -> tuple[int, str]:
        """To its end: exit code, and what it said."""
        process = self.start(out, *flags)
        said = process.communicate(timeout=900)[1]
        return process.returncode, said

    def trained(self, out: str) -> dict[str, bytes]:
        """All of a study but its clock and its report."""
        from crash import contents

        found = contents(self.folder / out)
        return {name: data for name, data in found.items() if not name.startswith(("report.html", "figures"))}

    def step(self, out: str) -> int:
        """The last that a checkpoint of a group has."""
        found = [int(place.name[5:]) for place in (self.folder / out).glob("groups/*/checkpoints/step-*")]
        return max(found, default=0)


def workers() -> list[int]:
    """Processes that train a group now, as Ray names them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cmdline").read_bytes().startswith(b"ray::group"):
                    found.append(int(entry.name))
            except OSError:
                continue  # it has just ended
    return found


def wait_for(condition: Callable[[], object], seconds: float = 600.0) -> None:
    """Raises TimeoutError if it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)


class Checks:
    """Counts, a line each."""

    def __init__(self):
        self.n, self.passed = 0, 0

    def note(self, name: str, passed: bool, why: str = "") -> None:
        self.n, self.passed = self.n + 1, self.passed + passed
        print(f"{name}: {'as it should be' if passed else 'WRONG'}{why and ' ' + why}", flush=True)


def main() -> int:
    """All checks; returns 0 if they passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker-kills", type=int, default=5)
    parser.add_argument("--driver-kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the last line here")
    request = parser.parse_args()
    if importlib.util.find_spec("ray") is None:
        return subprocess.run([environment(), __file__, *sys.argv[1:]], check=False).returncode
    folder, checks, moments = Path(tempfile.mkdtemp(prefix="prolu-ray-")), Checks(), random.Random(request.seed)
    os.environ |= {"RAY_TMPDIR": str(folder / "ray"), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    sweeps, ray_engine = Sweeps(folder), ("--engine", "ray", "--workers", str(N_WORKERS))

    started = time.monotonic()
    code, said = sweeps.run("local")
    print(f"local engine: {time.monotonic() - started:.1f} s, code {code}", flush=True)
    wanted = sweeps.trained("local")
    checks.note(
        "local engine", code == 0 and len(wanted["results.jsonl"].splitlines()) == 6, said[-2000:] * (code != 0)
    )

    started = time.monotonic()
    process = sweeps.start("whole", *ray_engine)
    wait_for(workers)
    first = time.monotonic()
    wait_for(lambda: not workers())
    training = time.monotonic() - first
    said = process.communicate(timeout=900)[1]
    same = process.returncode == 0 and sweeps.trained("whole") == wanted
    print(f"ray: {time.monotonic() - started:.1f} s, {training:.1f} s of them with workers", flush=True)
    checks.note("ray, two workers", same, said[-3000:] * (not same))
    code, said = sweeps.run("whole", *ray_engine)
    checks.note("the same again", code == 0 and sweeps.trained("whole") == wanted, said[-2000:] * (code != 0))

    killed = {"worker": 0, "driver": 0}
    kinds = ["worker"] * request.worker_kills + ["driver"] * request.driver_kills
    for kind in kinds:
        step, delay = moments.randrange(N_STEPS), moments.uniform(0.0, 1.0)
        while True:
            shutil.rmtree(folder / "killed", ignore_errors=True)
            process = sweeps.start("killed", *ray_engine)
            wait_for(lambda: (workers() and sweeps.step("killed") >= step) or process.poll() is not None)  # noqa: B023
            time.sleep(delay)
            there = [] if process.poll() is not None else workers() if kind == "worker" else [process.pid]
            if there:
                break
            process.communicate()
            step //= 2  # it was over
        os.kill(moments.choice(there), signal.SIGKILL)
        killed[kind] += 1
        left = sorted(str(f.relative_to(folder)) for f in folder.glob("killed/groups/*/checkpoints/step-*"))
        said = process.communicate(timeout=900)[1]
        expected = 0 if kind == "worker" else -signal.SIGKILL
        whole = kind == "driver" or sweeps.trained("killed") == wanted
        code, again = sweeps.run("killed", *ray_engine)
        same = process.returncode == expected and whole and code == 0 and sweeps.trained("killed") == wanted
        resumed = (folder / "killed" / "log.jsonl").read_text().count('"resumed"')
        why = f"(code {process.returncode}, {len(left)} checkpoints there, then {code}; {resumed} groups resumed)"
        checks.note(
            f"{kind} killed {delay:.1f} s after step {step} of {N_STEPS}",
            same,
            why + (said + again)[-3000:] * (not same),
        )

    for number in (signal.SIGINT, signal.SIGTERM):
        out = f"signal{number}"
        process = sweeps.start(out, *ray_engine)
        wait_for(lambda out=out: len(list(folder.glob(f"{out}/groups/*/checkpoints/step-*"))) >= 2)
        send = os.killpg if number == signal.SIGINT else os.kill  # as a terminal does
        send(process.pid, number)
        said = process.communicate(timeout=300)[1]
        kept = len(list(folder.glob(f"{out}/groups/*/checkpoints/step-*")))
        stopped = (
            process.returncode == 130 and "run the same command again to resume" in said and "Traceback" not in said
        )
        code, again = sweeps.run(out, *ray_engine)
        same = stopped and code == 0 and sweeps.trained(out) == wanted
        checks.note(
            f"{signal.Signals(number).name} to the driver", same, (f"{kept} " + said + again)[-3000:] * (not same)
        )

    for flags, words in (
        (
            ("--gpus-per-group", "0.5"),
            r"a group needs 1 CPUs, 0.5 GPU and \d+\.\d GB of memory on one machine",
        ),
        (("--address", "127.0.0.1:9"), "address '127.0.0.1:9': no Ray cluster answers there"),
        (("--address", "auto"), "address 'auto': no Ray cluster answers there"),
    ):
        code, said = sweeps.run("refused", *ray_engine, *flags)
        good = code == 2 and re.search(words, said) is not None and len(said.strip().splitlines()) == 1
        checks.note(
            f"refused: {' '.join(flags)}", good and not (folder / "refused").exists(), said[-2000:] * (not good)
        )
    wait_for(lambda: not workers(), 60)
    shutil.rmtree(folder, ignore_errors=True)
    ends = f"{killed['worker']} workers and {killed['driver']} drivers killed"
    summary = f"checks {checks.n}, passed {checks.passed}; {ends}"
    print(f"ray: {summary}")
    if request.json:
        request.json.parent.mkdir(exist_ok=True)
        request.json.write_text(json.dumps({"summary": summary}) + "\n")
    return int(checks.passed != checks.n)


if __name__ == "__main__":
    sys.exit(main())
