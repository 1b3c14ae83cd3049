"""Prove the GPU's training steps on a GPU: first that they are right, then how fast they are.

    python benchmarks/gpu.py --minutes 10 --json gpu.json

The stages come in the order of their worth. Each writes its figures to the file as it gets them; a stage whose time is
up, or that fails, is noted there with the reason, and the next one begins.

- check: every family, precision and step against the CPU, with captured graphs.
- speed: milliseconds per step of every family at four shapes, against the least that the card allows.
- peers: the steps of other libraries, through their own trainers, as far as they are installed.
- stacks: many small SAEs in one step, against one after the other.
- sparse: the sparse step in Triton against the dense step.
- stream: the harvest against the bare language model, and how long steps wait for data from a store.
- sweep: a study from text to weights, killed and resumed.
- profile: where the time of the slowest of our steps goes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prolu.sae.nonlinearities import nonlinearity_named
from prolu.sae.penalties import penalty_named
from prolu.sae.saved_sae import SAEConfig
from prolu.sae.scaling import normalise
from prolu.sae.weights import Weights
from prolu.training.config import RunConfig
from prolu.training.moments import Moments
from prolu.training.starting_weights import initial_weights
from prolu.training.steps import Objective, Steps, Update
from prolu.training.steps.cuda import CudaStep
from prolu.training.steps.stacked import member
from prolu.training.trainer import Trainer
from prolu.training.trainer_stack import TrainerStack
from step import sparse_problem

FAMILIES = {
    "relu": "l1",
    "prolu_relu": "sqrt_l1",
    "prolu_ste": "sqrt_l1",
    "gated": "l1",
    "jumprelu": "l0",
    "topk(64)": "none",
    "batchtopk(64)": "none",
}
"""The penalty of each family."""

COEFF = 1e-3

LIMITS = {"fp64": 1e-11, "fp32": 2e-5, "tf32": 1e-2, "bf16": 2e-3}
"""The largest difference from the CPU's result, relative to a tensor's norm. In bf16 the CPU rounds the same inputs, so
that only the order of sums differs; there is no such reference for tf32, which is compared with fp64."""

SHAPES = [(768, 12_288), (2304, 65_536), (2304, 16_384), (768, 24_576)]
BLOCKS = [(2048, 4, 16), (4096, 4, 8), (8192, 8, 4), (8192, 4, 8), (16_384, 8, 4), (16_384, 16, 4)]
"""Sizes of block, warps and blocks per program, with which a selection is timed."""
STACKS = [(64, 1024, (1, 6, 18, 108)), (512, 4096, (1, 6, 18))]


class Results:
    """The figures so far, written to the file with every new one."""

    def __init__(self, file: Path | None, minutes: float):
        self._file = file
        self._started = time.monotonic()
        self._end = self._started + 60 * minutes
        self.figures: dict[str, Any] = {}

    def seconds_left(self) -> float:
        """Return the seconds until the whole script should end."""
        return self._end - time.monotonic()

    def add(self, stage: str, name: str, value: Any) -> None:
        """Record a figure, print it and write the file."""
        self.figures.setdefault(stage, {})[name] = value
        print(f"[{time.monotonic() - self._started:6.1f} s] {stage}: {name}: {value}", flush=True)
        if self._file is not None:
            self._file.write_text(json.dumps(self.figures, indent=1) + "\n")


class TimeUpError(Exception):
    """The time of a stage is up."""


class Stage:
    """One stage: where it records, and how long it may take."""

    def __init__(self, name: str, results: Results, seconds: float, device: str, options: argparse.Namespace):
        self.name = name
        self.device = device
        self.options = options
        self.small = device == "cpu"
        self._results = results
        self._end = time.monotonic() + min(seconds, results.seconds_left())

    def add(self, name: str, value: Any) -> None:
        """Record a figure."""
        self._results.add(self.name, name, value)

    def seconds_left(self) -> float:
        """Return the seconds that this stage still has."""
        return self._end - time.monotonic()

    def go_on(self) -> None:
        """Raise TimeUpError if the time is up."""
        if self.seconds_left() <= 0:
            raise TimeUpError

    def attempt(self, name: str, measure: Callable[[], Any]) -> None:
        """Record what a measurement returns, or why it failed."""
        self.go_on()
        try:
            self.add(name, measure())
        except Exception as problem:
            traceback.print_exc()
            self.add(name, f"failed: {type(problem).__name__}: {str(problem)[:500]}")

    def ms(self, once: Callable[[], object]) -> float:
        """Return the median milliseconds of a call."""
        return milliseconds(once, self.device)


def milliseconds(once: Callable[[], object], device: str, rounds: int = 20) -> float:
    """Return the median milliseconds of a call, on the GPU's own clock."""
    if device == "cpu":
        once()
        start = time.perf_counter()
        once()
        return 1e3 * (time.perf_counter() - start)
    for _ in range(5):  # to compile, to capture, and to bring the GPU to its full clock rate
        once()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        once()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 4)


def problem_for(name: str, d_in: int, d_sae: int, batch: int, n_saes: int, dead: bool = True) -> tuple:
    """Return a stack of SAEs of a family with few active latents, a batch, and the loss, all in fp64 on the CPU."""
    weights, x = sparse_problem(d_in, d_sae, batch, d_sae / 20)
    nonlinearity = nonlinearity_named(name).in_training
    saes = []
    for i in range(n_saes):
        start = initial_weights(SAEConfig(d_in=d_in, d_sae=d_sae, nonlinearity=name), i, torch.float64)
        start.encoder.copy_(weights.encoder.roll(i, 0))
        start.decoder.copy_(weights.decoder.roll(i, 0))
        for bias in ("b_enc", "b_gate"):
            if bias in start.own:
                start.own[bias].copy_(weights.own["b_enc"])
        saes.append(start)
    own = {p: torch.stack([w.own[p] for w in saes]) for p in saes[0].own}
    encoder, decoder, b_dec = (torch.stack([getattr(w, n) for w in saes]) for n in ("encoder", "decoder", "b_dec"))
    term = nonlinearity.auxiliary
    if term is not None and term.of_dead:
        among = (torch.arange(d_sae) % 5 == 0).expand(n_saes, -1)
        term = replace(term, among=among) if dead else None
    coeffs = COEFF * torch.arange(1, n_saes + 1, dtype=torch.float64)
    objective = Objective(nonlinearity, penalty_named(FAMILIES[name]), coeffs, term)
    return Weights(encoder, decoder, b_dec, own), x.double(), objective


def moved(objective: Objective, device: str) -> Objective:
    """Return the objective with its tensors on a device."""
    term = objective.auxiliary
    if term is not None and term.among is not None:
        term = replace(term, among=term.among.to(device))
    return replace(objective, coeff=objective.coeff.to(device), auxiliary=term)


def five_updates(step: CudaStep, weights: Weights, x: torch.Tensor, objective: Objective) -> Weights:
    """Return the weights after five updates. From the third on a GPU's step replays a captured graph.

    Where prefixes are drawn, each update has others.
    """
    weights = weights.map(torch.clone)
    moments = Moments.zeros_like(weights)
    for n in range(5):
        if objective.prefixes_are_drawn:
            objective = replace(objective, prefixes=(1 + n, 100 - n, 500 + 31 * n))
        step.update_stack_(weights, moments, x, objective, [Update(n, lr=1e-4)] * len(weights.encoder))
    return weights


def worst_difference(ours: Weights, theirs: Weights) -> float:
    """Return the largest difference over all tensors, each relative to its norm."""
    pairs = zip(ours.tensors(), theirs.tensors(), strict=True)
    return max(((a.cpu().double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item() for a, b in pairs)


def check(stage: Stage) -> None:
    """Compare gradients and the weights after five updates with the CPU's; a stack also with each SAE alone."""
    plan = [(name, precision, 1) for precision in ("bf16", "fp32") for name in FAMILIES]
    plan += [(name, "bf16", 3) for name in ("prolu_ste", "gated", "batchtopk(64)")]
    plan += [("prolu_ste", "tf32", 1), ("topk(64)", "fp64", 1), ("gated", "fp64", 3)]
    for name, precision, n_saes in plan:
        if name.partition("(")[0] not in stage.options.families:
            continue
        stage.attempt(
            f"{name}, {precision}, stack of {n_saes}",
            lambda n=name, p=precision, k=n_saes: differences(stage.device, n, p, k),
        )
    for drawn in (False, True):
        stage.attempt(
            f"prolu_ste, bf16, prefixes {'drawn' if drawn else 'given'}",
            lambda d=drawn: differences(stage.device, "prolu_ste", "bf16", 1, prefixes=(1, 100, 500), drawn=d),
        )


def differences(
    device: str, name: str, precision: str, n_saes: int, *, prefixes: tuple[int, ...] = (), drawn: bool = False
) -> dict[str, Any]:
    """Return how far gradients and weights are from the CPU's, and whether that is within the limit."""
    weights, x, objective = problem_for(name, 63, 1000, 130, n_saes)
    objective = replace(objective, prefixes=prefixes, prefixes_are_drawn=drawn)
    # In bf16 the CPU rounds what goes into a matmul in the same way; else it computes in fp64.
    there = torch.float32 if precision == "bf16" else torch.float64
    here = torch.float64 if precision == "fp64" else torch.float32
    like = member(weights, 0)
    w, acts = weights.map(lambda t: t.to(there)), x.to(there)
    reference = CudaStep(
        like.map(lambda t: t.to(there)), len(x), "bf16" if precision == "bf16" else "fp32", n_saes=n_saes
    )
    gradients, stats = reference.gradients_of_stack(w, acts, objective)
    end = five_updates(reference, w, acts, objective)
    w, acts, objective = weights.map(lambda t: t.to(device, here)), x.to(device, here), moved(objective, device)
    step = CudaStep(
        like.map(lambda t: t.to(device, here)), len(x), "fp32" if precision == "fp64" else precision, n_saes=n_saes
    )
    ours, our_stats = step.gradients_of_stack(w, acts, objective)
    found: dict[str, Any] = {
        "gradients": worst_difference(ours, gradients),
        "updates": worst_difference(five_updates(step, w, acts, objective), end),
        "fired": int((our_stats.fired.cpu() - stats.fired).abs().sum()),
        "mse": float(((our_stats.mse.cpu() - stats.mse) / stats.mse).abs().max()),
    }
    return found | {"right": max(found["gradients"], found["updates"]) < LIMITS[precision]}


def speed(stage: Stage) -> None:
    """Time a step of every family at every shape, beside the floor: five bf16 matmuls and the bytes of Adam."""
    batch = 64 if stage.small else 4096
    for d_in, d_sae in [(32, 256)] if stage.small else SHAPES[: stage.options.shapes]:
        where = f"{d_in} -> {d_sae}"
        stage.attempt(f"{where}, floor", lambda d=d_in, s=d_sae: floor(stage, d, s, batch))
        plan = [(name, "bf16") for name in FAMILIES]
        if d_sae < 20_000:
            plan += [("relu", "tf32"), ("relu", "fp32")]
        for name, precision in plan:
            if name.partition("(")[0] not in stage.options.families:
                continue
            stage.attempt(
                f"{where}, {name}, {precision}",
                lambda n=name, p=precision, d=d_in, s=d_sae: step_time(stage, n, p, d, s, batch),
            )
        prefixes = tuple(d_sae * part // 16 for part in (1, 2, 4, 8, 12))
        for drawn in (False, True):
            nested = {"prefixes": prefixes, "prefixes_are_drawn": drawn}
            stage.attempt(
                f"{where}, relu, bf16, five prefixes {'drawn' if drawn else 'given'}",
                lambda n=nested, d=d_in, s=d_sae: step_time(stage, "relu", "bf16", d, s, batch, **n),
            )


def selection(stage: Stage) -> None:
    """Time the selections alone, with blocks of several sizes, beside torch.topk."""
    from prolu.training.steps import selection_triton as ours

    batch, k = 4096, 64
    for d_sae in (12_288, 65_536):
        m = torch.randn(1, batch, d_sae, device=stage.device)
        threshold = torch.full((1, d_sae), 2.0, device=stage.device)
        flat = (m - 2.0).flatten()
        stage.attempt(f"{d_sae}, torch.topk, rows", lambda m=m: stage.ms(lambda: torch.topk(m, k, sorted=False)))
        stage.attempt(f"{d_sae}, torch.topk, batch", lambda f=flat: stage.ms(lambda: f.topk(k * batch, sorted=False)))
        wanted = flat.topk(k * batch).values[-1]
        for block, warps, blocks in (
            (2048, 4, 16),
            (4096, 4, 8),
            (8192, 8, 4),
            (8192, 4, 8),
            (16_384, 8, 4),
            (16_384, 16, 4),
        ):
            ours.BLOCK, ours.WARPS, ours.BLOCKS_PER_PROGRAM = block, warps, blocks
            name = f"{d_sae}, block {block}, {warps} warps, {blocks} blocks"
            stage.attempt(f"{name}, rows", lambda m=m, t=threshold: stage.ms(lambda: ours.bound_of_rows(m, t, k)))
            of_batch = (m, threshold, k * batch)
            stage.attempt(f"{name}, batch", lambda a=of_batch: stage.ms(lambda: ours.bound_of_batch(*a)))
            stage.attempt(f"{name}, right", lambda a=of_batch, w=wanted: bool(ours.bound_of_batch(*a).flatten() == w))


def sparse(stage: Stage) -> None:
    """Check and time the sparse step in Triton."""
    from gpu_sparse import figures

    for shape in [(32, 256)] if stage.small else SHAPES[: stage.options.shapes]:
        stage.attempt(f"{shape[0]} -> {shape[1]}", lambda s=shape: figures(stage.device, [s], [32, 64, 128]))


def stream(stage: Stage) -> None:
    """Compare the harvest with the bare model, and steps on batches from a store with steps that wait for no data."""
    import gpu_stream

    with tempfile.TemporaryDirectory(dir=".") as folder:
        found = gpu_stream.Problem(Path(folder), stage.device, small=stage.small)
        for dtype in ("bf16", "fp32"):
            stage.attempt(f"harvest, {dtype}", lambda d=dtype: found.harvest_over_bare(d))
        stage.attempt("from a store", found.waiting)


def peers(stage: Stage) -> None:
    """Time the steps of other libraries, each library in a process of its own."""
    for d_in, d_sae in [(32, 256)] if stage.small else SHAPES[: min(2, stage.options.shapes)]:
        for library in ("saelens", "dictionary_learning", "sparsify"):
            stage.go_on()
            shape = ["--d-in", str(d_in), "--d-sae", str(d_sae), "--batch", "64" if stage.small else "4096"]
            command = [sys.executable, "benchmarks/gpu_peers.py", library, *shape, "--device", stage.device]
            done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            try:
                said, problems = done.communicate(timeout=max(1, min(60, stage.seconds_left())))
            except subprocess.TimeoutExpired:
                done.kill()
                said, problems = done.communicate()
            lines = [line for line in said.splitlines() if line.startswith("[")]
            for name, found in map(json.loads, lines):
                stage.add(f"{d_in} -> {d_sae}, {name}", found)
            if done.returncode:
                stage.add(f"{d_in} -> {d_sae}, {library}, ended with", f"{done.returncode}: {problems[-300:]}")


def floor(stage: Stage, d_in: int, d_sae: int, batch: int) -> dict[str, float]:
    """Return the milliseconds of the five matmuls in bf16, and of the bytes of Adam at the card's own bandwidth."""
    x, f = (torch.randn(batch, d, device=stage.device).bfloat16() for d in (d_in, d_sae))
    w = torch.randn(d_sae, d_in, device=stage.device).bfloat16()
    kinds = {"x W": lambda: x @ w.T, "f W": lambda: f @ w, "f^T x": lambda: f.T @ x}
    times = {name: stage.ms(once) for name, once in kinds.items()}
    matmuls = 2 * times["x W"] + times["f W"] + 2 * times["f^T x"]
    there = torch.empty(2 * d_sae * d_in, device=stage.device)
    here = torch.randn_like(there)
    # A copy moves 8 bytes per parameter, Adam 28: it reads parameter, gradient and moments, and writes all but one.
    adam = stage.ms(lambda: there.copy_(here)) * 28 / 8
    return times | {"matmuls": matmuls, "adam": adam, "floor": matmuls + adam}


def one_step(device: str, name: str, precision: str, d_in: int, d_sae: int, batch: int, **nested: Any) -> Callable:
    """Return a function that makes one update of an SAE without dead latents; `nested` is what Objective takes."""
    shape = SAEConfig(d_in=d_in, d_sae=d_sae, nonlinearity=name)
    like = initial_weights(shape, 0, torch.float32).map(lambda t: t.to(device))
    weights = like.map(lambda t: t.unsqueeze(0).clone())
    moments = Moments.zeros_like(weights)
    nonlinearity = nonlinearity_named(name).in_training
    term = nonlinearity.auxiliary
    term = None if term is not None and term.of_dead else term
    coeffs = torch.full((1,), COEFF, dtype=torch.float64, device=device)
    objective = Objective(nonlinearity, penalty_named(FAMILIES[name]), coeffs, term, **nested)
    step = CudaStep(like, batch, precision)
    x = torch.randn(batch, d_in, device=device)
    return lambda: step.update_stack_(weights, moments, x, objective, [Update(5, lr=1e-7)])


def step_time(
    stage: Stage, name: str, precision: str, d_in: int, d_sae: int, batch: int, **nested: Any
) -> dict[str, float]:
    """Return the milliseconds of a step, its tokens per second, and the most memory that it took."""
    if not stage.small:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ms = stage.ms(one_step(stage.device, name, precision, d_in, d_sae, batch, **nested))
    memory = 0 if stage.small else torch.cuda.max_memory_allocated()
    return {"ms": ms, "tokens_per_second": round(1e3 * batch / ms), "gigabytes": round(memory / 1e9, 3)}


def stacks(stage: Stage) -> None:
    """Time stacks of SAEs, and the same SAEs one after the other."""
    batch = 64 if stage.small else 4096
    for d_in, d_sae, sizes in [(16, 96, (1, 3))] if stage.small else STACKS:
        for name in ("prolu_ste", "topk(64)", "batchtopk(64)"):
            for n_saes in sizes:
                stage.attempt(
                    f"{n_saes} x {d_in} -> {d_sae}, {name}, bf16",
                    lambda n=n_saes, d=d_in, s=d_sae, f=name: stack_time(stage, f, d, s, n, batch),
                )


def stack_time(stage: Stage, name: str, d_in: int, d_sae: int, n_saes: int, batch: int) -> dict[str, float]:
    """Return the milliseconds of a step of a stack of trainers, and of the same trainers one after the other."""
    config = RunConfig(
        nonlinearity=name, penalty=FAMILIES[name], coeff=COEFF, d_sae=d_sae, n_tokens=10**9, precision="bf16",
        step="dense",
    )  # fmt: skip

    def trainers(n: int) -> list[Trainer]:
        steps = Steps(Trainer(config, d_in, batch, device=stage.device).state.weights, batch, "bf16")
        return [Trainer(replace(config, init_seed=i), d_in, batch, steps=steps, device=stage.device) for i in range(n)]

    x = normalise(torch.randn(batch, d_in, device=stage.device))[0]
    stack = TrainerStack(trainers(n_saes))
    together = wall_ms(stage, [lambda: stack.step(x)])
    del stack
    # Eighteen show what one takes; 108 graphs would take minutes to capture.
    n_alone = min(n_saes, 18)
    alone = wall_ms(stage, [lambda t=trainer: t.step(x) for trainer in trainers(n_alone)])
    alone *= n_saes / n_alone
    return {"stack_ms": together, "one_after_the_other_ms": alone, "ratio": round(alone / together, 2)}


def wall_ms(stage: Stage, steps: list[Callable], rounds: int = 20) -> float:
    """Return the milliseconds in which all steps are made once, as a training loop would wait for them."""
    for _ in range(3):
        for once in steps:
            once()
    if not stage.small:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        for once in steps:
            once()
    if not stage.small:
        torch.cuda.synchronize()
    return round(1e3 * (time.perf_counter() - start) / rounds, 4)


def sweep(stage: Stage) -> None:
    """Train a small study from text, and the same study with a kill in the middle; the results must be the same."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("prolu_ste", "batchtopk"):
            stage.attempt(name, lambda n=name: killed_and_resumed(stage, n, Path(folder)))


def killed_and_resumed(stage: Stage, name: str, folder: Path) -> dict[str, Any]:
    """Return how long a study takes, and whether one that was killed and resumed has the same results."""
    n_tokens = "40960" if stage.small else "1e6"
    program = (
        "import sys, prolu; out, device, n_tokens, name = sys.argv[1:]; "
        "lm = prolu.LanguageModel('builtin', hook='blocks.2.hook_resid_pre', device=device); "
        "blocks = prolu.load_blocks('builtin', lm.tokenizer, ctx=128); "
        "stream = prolu.ActivationStream(lm, blocks, batch_size=1024, seed=0, device=device); "
        "runs = [prolu.RunConfig(nonlinearity=name, target_l0=16.0, d_sae=512, n_tokens=int(float(n_tokens)), lr=4e-3, "
        "precision='bf16', step='dense', init_seed=s) for s in range(3)]; "
        "prolu.run_sweep(runs, stream, out, eval_tokens=8192, checkpoint_seconds=2.0, progress=False)"
    )

    def command(out: str) -> list[str]:
        return [sys.executable, "-c", program, str(folder / out), stage.device, n_tokens, name]

    start = time.monotonic()
    subprocess.run(command(f"{name}-whole"), check=True, timeout=max(10, stage.seconds_left()))
    seconds = time.monotonic() - start
    kills = 0
    while True:
        process = subprocess.Popen(command(f"{name}-killed"))
        try:
            process.wait(timeout=seconds * 0.6 if not kills else max(10, stage.seconds_left()))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    whole, killed = (
        [json.loads(line) for line in (folder / f"{name}-{which}" / "results.jsonl").read_text().splitlines()]
        for which in ("whole", "killed")
    )
    return {
        "seconds": round(seconds, 1),
        "kills": kills,
        "identical": whole == killed,
        "l0": [round(line["l0"], 2) for line in whole],
        "ce_increase": [round(line["degradation"], 4) for line in whole],
    }


def profile(stage: Stage) -> None:
    """Print where the time of a step goes."""
    d_in, d_sae, batch = (32, 256, 64) if stage.small else (768, 12_288, 4096)
    for name in ("prolu_ste", "batchtopk(64)", "topk(64)"):
        stage.attempt(name, lambda n=name: kernels(stage, n, d_in, d_sae, batch))


def kernels(stage: Stage, name: str, d_in: int, d_sae: int, batch: int) -> dict[str, float]:
    """Return the microseconds per step of the longest kernels."""
    once = one_step(stage.device, name, "bf16", d_in, d_sae, batch)
    for _ in range(5):
        once()
    with torch.profiler.profile() as found:
        for _ in range(10):
            once()
        if not stage.small:
            torch.cuda.synchronize()
    times = {e.key[:80]: e.self_device_time_total / 10 for e in found.key_averages() if e.self_device_time_total}
    return {k: round(times[k], 1) for k in sorted(times, key=times.get, reverse=True)[:14]}  # pyright: ignore


STAGES = {
    "check": 120, "speed": 200, "peers": 150, "stacks": 90, "selection": 30, "sparse": 90, "stream": 90,
    "sweep": 120, "profile": 40,
}  # fmt: skip
"""The stages with the most seconds that each may take."""


def main() -> None:
    """Run the stages, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu tries the script at tiny sizes")
    parser.add_argument("--minutes", type=float, default=10, help="the time for everything")
    parser.add_argument("--stages", default=",".join(STAGES), help="only these, in this order, separated by commas")
    parser.add_argument("--families", default=",".join(name.partition("(")[0] for name in FAMILIES), help="only these")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only so many shapes")
    parser.add_argument("--json", type=Path, help="the file to write, as the figures come")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("this machine has no GPU that torch can use", file=sys.stderr)
        sys.exit(2)
    options.families = options.families.split(",")
    results = Results(options.json, options.minutes)
    card = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    results.add("machine", "card", card)
    results.add("machine", "torch", torch.__version__)
    for name in options.stages.split(","):
        stage = Stage(name, results, STAGES[name], options.device, options)
        try:
            stage.go_on()
            globals()[name](stage)
        except TimeUpError:
            stage.add("skipped", "the time is up")
        except Exception as problem:
            traceback.print_exc()
            stage.add("failed", f"{type(problem).__name__}: {problem}")
    wrong = [
        name for name, row in results.figures.get("check", {}).items() if not (isinstance(row, dict) and row["right"])
    ]
    print(table(results.figures))
    sys.exit(1 if wrong else 0)


def table(figures: dict[str, Any]) -> str:
    """Return the milliseconds of all steps, with their ratio to the floor."""
    lines = [f"{figures['machine']['card']}, torch {figures['machine']['torch']}"]
    lowest = None
    for name, row in figures.get("speed", {}).items():
        if isinstance(row, dict) and "floor" in row:
            lowest = row["floor"]
            lines.append(f"{name:40} {lowest:9.3f} ms")
        elif isinstance(row, dict) and "ms" in row and lowest:
            lines.append(f"{name:40} {row['ms']:9.3f} ms {row['ms'] / lowest:7.2f} x floor")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
