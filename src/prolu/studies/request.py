"""A study's folder: whether a request fits what it holds, and what may grow."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prolu.activations.stream import ActivationStream
from prolu.sae.autoencoder import CONFIG_FILE
from prolu.studies.checkpoints import CHECKPOINTS_FOLDER
from prolu.studies.folder import (
    FINAL_FOLDER,
    GROUPS_FOLDER,
    MOVABLE,
    STUDY_FILE,
    _unwritable,
    holds_study,
    make_folder,
    read_study,
    versions,
    write_study,
)
from prolu.training.config import RunConfig
from prolu.training.starting_weights import starting_weights
from prolu.training.steps import crossover_density
from prolu.training.trainer import check_mesh

LENGTH_FIELDS = {f.name for f in fields(RunConfig) if f.name.endswith(("_fraction", "_fractions"))} | {"n_tokens"}
"""What may change when a run is extended, if every step that it has made stays what it was."""


class StudyRequest(NamedTuple):
    """What to train, on what, and where."""

    runs: list[RunConfig]
    stream: ActivationStream
    out: Path
    eval_tokens: int
    """Held-out tokens to score on."""


def describe_study(request: StudyRequest) -> dict[str, Any]:
    """All that decides a study's numbers, and the versions that computed them."""
    runs, stream = request.runs, request.stream
    return {
        "stream": stream.describe(),
        "eval_tokens": request.eval_tokens,
        "n_threads": stream.mesh.n_threads or torch.get_num_threads(),
        "crossovers": {str(d): crossover_density("cpu", stream.d_in, d) for d in sorted({r.d_sae for r in runs})},
        "runs": [asdict(run) for run in runs],
        "versions": versions(),
    }


def prepare_folders(requests: Sequence[StudyRequest], *, in_groups: bool = False) -> None:
    """Checks requests and, only if all are good, creates each study's folder with its config.

    Raises:
        ValueError: as `run_sweep`.
    """
    check_requests(requests, in_groups=in_groups)
    for request in requests:
        make_folder(request.out)
        try:
            if not (request.out / STUDY_FILE).exists():
                write_study(request.out, describe_study(request))
        except OSError as problem:
            raise _unwritable(request.out, problem) from None


def check_requests(requests: Sequence[StudyRequest], *, in_groups: bool = False) -> None:
    """Raises ValueError unless each can be trained into its folder, by one process or in groups."""
    for request in requests:
        check_runs(request.runs, request.stream.batch_size)
        for run in request.runs:
            check_mesh(run, request.stream.batch_size, request.stream.mesh)
            if run.init_from is not None:
                starting_weights(run, request.stream.d_in)
        if request.eval_tokens < 1:
            raise ValueError(f"eval_tokens {request.eval_tokens}: must be at least 1")
        check_folder(request.out, describe_study(request), request.stream.batch_size)
        if not in_groups and (request.out / GROUPS_FOLDER).exists():
            raise ValueError(
                f"out {str(request.out)!r}: its runs are trained in groups; go on as it was begun, with --engine ray "
                "or --group"
            )


def check_runs(runs: Sequence[RunConfig], batch_size: int) -> None:
    """Raises ValueError if there is nothing to train, two runs are alike, or one is shorter than a batch."""
    if not runs:
        raise ValueError("no runs: pass at least one RunConfig")
    seen: set[str] = set()
    starts: dict[RunConfig, int] = {}
    for run in runs:
        run.n_steps(batch_size)
        if run.run_id in seen:
            raise ValueError(f"run {run.run_id}: listed twice, or two runs differ only in what is not in a run's name")
        seen.add(run.run_id)
        if run.init_from is not None and not run.resample_fractions:  # then no draw of the run depends on its seed
            other = starts.setdefault(replace(run, init_seed=0), run.init_seed)
            if other != run.init_seed:
                raise ValueError(
                    f"init_seed {other} and {run.init_seed}: with init_from and without resampling they give the same "
                    "run to the bit; start from one SAE per seed, or train one seed"
                )


def check_folder(out: Path, study: dict[str, Any], batch_size: int) -> None:
    """Raises ValueError unless `out` can be created, or holds this very study, or a shorter one that it extends."""
    if not holds_study(out):
        return
    held, asked = read_study(out), json.loads(json.dumps(study))
    flat_held, flat_asked = _flat(held), _flat(asked)
    for name in sorted(flat_held.keys() | flat_asked.keys()):
        if name.startswith("versions") or name in [f"stream.{part}" for part in MOVABLE] or name.endswith(".init_from"):
            continue
        if flat_held.get(name) == flat_asked.get(name):
            continue
        reason = "choose another folder"
        if name.startswith("runs.") and name.split(".")[2] in LENGTH_FIELDS and len(held["runs"]) == len(asked["runs"]):
            i = int(name.split(".")[1])
            refusal = extension_refusal(out, _as_config(held["runs"][i]), _as_config(asked["runs"][i]), batch_size)
            if refusal is None:
                continue
            reason = f"the run cannot be extended: {refusal}"
        raise ValueError(
            f"out {str(out)!r} holds another study: {name} is {flat_held.get(name)!r} there, "
            f"{flat_asked.get(name)!r} here; {reason}"
        )


def extension_refusal(  # noqa: PLR0911
    out: Path, old: RunConfig, new: RunConfig, batch_size: int
) -> str | None:
    """Why a run cannot go on from what it was to more tokens; None if it can, to the bits of the longer run."""
    if new.n_tokens < old.n_tokens:
        return "it would be shorter"
    made = old.n_steps(batch_size)
    before, after = old.schedule(batch_size), new.schedule(batch_size)
    for step in range(made):
        if before.factor(step) != after.factor(step):
            return (
                f"its learning rate at step {step} was {before.factor(step) * old.lr:.4g} and would have been "
                f"{after.factor(step) * new.lr:.4g}; only a run whose rate had not begun to fall, and whose warm-up "
                "stays as many steps, can go on"
            )
    warm = [round(run.coeff_warmup_fraction * run.n_steps(batch_size)) for run in (old, new)]
    then, now = old.resampling(batch_size), new.resampling(batch_size)
    made_steps = [tuple(s for s in r.steps if s < made) for r in (then, now)]
    counted = [[n for n in range(made) if r.restarts_count(n)] for r in (then, now)]
    if old.steering(batch_size) != new.steering(batch_size) or warm[0] != warm[1]:
        return "its penalty's coefficient would have been another"
    if made_steps[0] != made_steps[1] or counted[0] != counted[1]:
        return "it would have been resampled, or its firings counted, at other steps"
    if new.probe_steps(batch_size)[0] < made:
        return f"its convergence could not be told; go on to {made * batch_size * 5 // 4} tokens or more"
    if (
        not any((out / old.run_id / FINAL_FOLDER / CHECKPOINTS_FOLDER).glob("*"))
        and (out / old.run_id / CONFIG_FILE).exists()
    ):
        return "it was finished without keeping its state (keep_state)"
    return None


def _as_config(values: Mapping[str, Any]) -> RunConfig:
    """A run's settings as JSON gave them back."""
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return RunConfig(**settings)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict of dotted names, `runs.3.coeff` for example."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, part in items for k, v in _flat(part, f"{name}.{key}".strip(".")).items()}
