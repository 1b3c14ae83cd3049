"""Whether a request fits what its folder holds: the very same study, or a shorter one that it extends."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from prolu.activations.token_blocks import LATER_FACTS
from prolu.runtime.files import through_json
from prolu.sae.saved_sae import CONFIG_FILE
from prolu.studies.checkpoints import CHECKPOINTS_FOLDER
from prolu.studies.folder import FINAL_FOLDER, PATH_FIELDS, holds_study, read_study
from prolu.training.config import LATER_FIELDS, RunConfig

LENGTH_FIELDS = {f.name for f in fields(RunConfig) if f.name.endswith(("_fraction", "_fractions"))} | {"n_tokens"}
"""Fields of a run that may change when it is extended, as long as every step that it has made stays what it was."""


def check_folder(out: Path, study: Mapping[str, Any], batch_size: int) -> None:
    """Raise ValueError unless `out` can be created, or holds this very study, or a shorter one that it extends."""
    if not holds_study(out):
        return
    held = read_study(out)
    asked = through_json(study)
    if len(held["runs"]) != len(asked["runs"]):
        raise ValueError(
            f"out {str(out)!r} holds another study: {len(held['runs'])} runs there, {len(asked['runs'])} here; a study "
            "keeps the runs that it was begun with, so train the others into a folder of their own (prolu report shows "
            "several studies together)"
        )
    for number, (old, new) in enumerate(zip(held["runs"], asked["runs"], strict=True)):
        if not _differ_in_length(old, new):
            continue
        refusal = extension_refusal(out, RunConfig.recorded(old), RunConfig.recorded(new), batch_size)
        if refusal is not None:
            name = next(name for name in sorted(LENGTH_FIELDS) if old.get(name) != new.get(name))
            raise _another_study(
                out, f"runs.{number}.{name}", old.get(name), new.get(name), f"the run cannot be extended: {refusal}"
            )
        asked["runs"][number] = old
    flat_held = _flat(held)
    flat_asked = _flat(asked)
    # Crossovers follow from the runs and the machine, so they come last: the message should name the cause.
    for name in sorted(flat_held.keys() | flat_asked.keys(), key=lambda name: (name.startswith("crossovers"), name)):
        # A fact that an earlier version did not record is not compared; the digest of the tokens shows whether they
        # differ.
        unknown = name.removeprefix("stream.") in LATER_FACTS and name not in flat_held
        if flat_held.get(name) != flat_asked.get(name) and not unknown and not _may_differ(name):
            advice = "choose another folder"
            if name == "stream.data_digest" and "stream.held_out_pool" not in flat_held:
                advice += ", or load_blocks(..., held_out_pool=0) if an earlier version began this study"
            raise _another_study(out, name, flat_held.get(name), flat_asked.get(name), advice)


def runs_as_begun(runs: Sequence[RunConfig], out: Path) -> list[RunConfig]:
    """Return the runs as the study in `out` was begun with them, where its version lacked a field that they have.

    Such a study is resumed by the rule of its version. A run that asks for something else than the default of the field
    is left as it is, and `check_folder` refuses it.
    """
    held = read_study(out)["runs"] if holds_study(out) else []
    if len(held) != len(runs):
        return list(runs)  # a new study, or another one
    return [
        replace(run, **_lacking(run, values)) if run.has_target_l0 and isinstance(values, dict) else run
        for run, values in zip(runs, held, strict=True)
    ]


def _lacking(run: RunConfig, held: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a held run lacks and that have their defaults in `run`, with the values of its version."""
    defaults = {field.name: field.default for field in fields(RunConfig)}
    lacking = LATER_FIELDS.keys() - held.keys() - run.unused_by_controller
    return {name: LATER_FIELDS[name] for name in lacking if getattr(run, name) == defaults[name]}


def _differ_in_length(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)} - {"init_from"}
    return bool(changed) and changed <= LENGTH_FIELDS


def _may_differ(name: str) -> bool:
    """Return whether a field may differ.

    Versions may differ, and so may paths, because the same data may be in another place. The digest of the held-out
    tokens and the amounts of text are not compared, because studies of version 0.1.0 lack them and they follow from the
    other fields.
    """
    return (
        name.startswith(("versions", "amounts"))
        or name == "held_out_digest"
        # The field is a path or a list of paths. A field whose name only begins alike, such as `stream.data_digest`,
        # must be the same.
        or any(name == path or name.startswith(f"{path}.") for path in (f"stream.{field}" for field in PATH_FIELDS))
        or name.endswith(".init_from")
    )


def _another_study(out: Path, name: str, there: Any, here: Any, reason: str) -> ValueError:
    return ValueError(f"out {str(out)!r} holds another study: {name} is {there!r} there, {here!r} here; {reason}")


def extension_refusal(  # noqa: PLR0911
    out: Path, old: RunConfig, new: RunConfig, batch_size: int
) -> str | None:
    """Return why a run cannot be extended to more tokens, or None if it can.

    It can be if the result is equal to the bit to a run that had the larger number of tokens from the start. So every
    step that was made must have had the same learning rate, coefficient and resampling in that run.
    """
    if new.n_tokens < old.n_tokens:
        return "it would be shorter"
    if new.run_id != old.run_id:
        return "the run's name holds a setting that would change"
    made = old.n_steps(batch_size)
    before = old.schedule(batch_size)
    after = new.schedule(batch_size)
    for step in range(made):
        if before.factor(step) != after.factor(step):
            return (
                f"its learning rate at step {step} was {before.factor(step) * old.lr:.4g} and would have been "
                f"{after.factor(step) * new.lr:.4g}; only a run whose rate had not begun to fall, and whose warm-up "
                "stays as many steps, can be extended"
            )
    same_controller = old.l0_controller(batch_size) == new.l0_controller(batch_size)
    if not same_controller or _warmup_steps(old, batch_size) != _warmup_steps(new, batch_size):
        return "the coefficient of its penalty would have been different in the steps that were made"
    if _resampling_within(old, made, batch_size) != _resampling_within(new, made, batch_size):
        return "it would have been resampled, or its firings counted, at other steps"
    if new.probe_steps(batch_size)[0] < made:
        return f"it would be too short to test convergence; extend it to {made * batch_size * 5 // 4} tokens or more"
    run_folder = out / old.run_id
    keeps_state = any((run_folder / FINAL_FOLDER / CHECKPOINTS_FOLDER).glob("*"))
    if (run_folder / CONFIG_FILE).exists() and not keeps_state:
        return "it was finished without keeping its state (keep_state)"
    return None


def _warmup_steps(run: RunConfig, batch_size: int) -> int:
    return round(run.coeff_warmup_fraction * run.n_steps(batch_size))


def _resampling_within(run: RunConfig, n_steps: int, batch_size: int) -> tuple[list[int], list[int]]:
    """Return the steps among the first `n_steps` at which a run is resampled, and at which it begins to count."""
    resampling = run.resampling(batch_size)
    resampled = [step for step in resampling.steps if step < n_steps]
    counting = [step for step in range(n_steps) if resampling.restarts_count(step)]
    return resampled, counting


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return nested dicts and lists as one dict of dotted names, `runs.3.coeff` for example."""
    if not isinstance(value, dict | list):
        return {name: value}
    flat = {}
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        flat |= _flat(part, f"{name}.{key}".strip("."))
    return flat
