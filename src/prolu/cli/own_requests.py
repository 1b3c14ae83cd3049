"""The requests whose settings are all options: `train` for one SAE, `sweep grid` for combinations of settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import OmitArgPrefixes

from prolu.activations.options import Source
from prolu.cli.flags import option_group, or_multiple, several, values_of
from prolu.cli.job import Job
from prolu.cli.options import LatentPageOptions
from prolu.studies.grids import own_recipe
from prolu.studies.groups.engine import Engine
from prolu.studies.recipe import Recipe
from prolu.studies.settings import SweepSettings
from prolu.studies.widths import Multiple
from prolu.training.config import RunConfig

FIRST_IN_RUN = ("nonlinearity", "penalty", "coeff", "target_l0", "d_sae", "n_tokens")
FIRST_IN_SOURCE = ("lm", "hook", "data")
NO_OPTIONS = ("named",)
"""The fields of a run that follow from the others here."""


def _others(owner: type, first: Sequence[str]) -> list[str]:
    return [f.name for f in fields(owner) if f.name not in (*first, *NO_OPTIONS)]


# `prolu train` has some fifty options. The help shows the nine that nearly everybody sets first, whichever dataclass
# they belong to, so the two dataclasses are taken apart here and put together again in `prepare`.
if TYPE_CHECKING:  # a type checker cannot see into classes that are made at run time
    EssentialOptions = Any
    OtherRunOptions = Any
    EssentialGridOptions = Any
    OtherGridOptions = Any
    OtherSourceOptions = Any
else:
    ESSENTIAL = {Source: FIRST_IN_SOURCE, RunConfig: FIRST_IN_RUN}
    EssentialOptions = option_group(
        "EssentialOptions", "What to train, and on which activations.", ESSENTIAL, {RunConfig: or_multiple}
    )
    OtherRunOptions = option_group(
        "OtherRunOptions",
        "Learning rate and its schedule, starting weights, resampling of dead latents, arithmetic.",
        {RunConfig: _others(RunConfig, FIRST_IN_RUN)},
    )
    EssentialGridOptions = option_group(
        "EssentialGridOptions",
        "What to train, and on which activations. The settings of an SAE take one or several values.",
        ESSENTIAL,
        {RunConfig: several},
    )
    OtherGridOptions = option_group(
        "OtherGridOptions",
        "Learning rate and its schedule, starting weights, resampling of dead latents, arithmetic. Nearly all take one "
        "or several values.",
        {RunConfig: _others(RunConfig, (*FIRST_IN_RUN, "init_seed"))},
        {RunConfig: several},
    )
    OtherSourceOptions = option_group(
        "OtherSourceOptions",
        "More about the text and the activations, and the devices to use.",
        {Source: _others(Source, FIRST_IN_SOURCE)},
    )


def check_json(*, json: bool, dry_run: bool) -> None:
    """Raise ValueError if --json is given without --dry-run: only the estimate of a dry run can be printed as JSON."""
    if json and not dry_run:
        raise ValueError("json: only with --dry-run")


TRAIN_DESCRIPTION = """Train one SAE, score it and draw a report. Run the same command again to resume.

Examples:
  prolu train --nonlinearity prolu_ste --coeff 0.007 --d-sae 8x --n-tokens 1e6 --out runs/one
  prolu train --lm EleutherAI/pythia-70m-deduped --hook blocks.3.hook_resid_post --data my_text.parquet \\
      --nonlinearity topk --k 32 --d-sae 4096 --out runs/two

Names that other libraries give to these flags are understood too: --l1-coefficient, --dict-size, and --k, which is
--target-l0."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one SAE, score it and draw a report. Run the same command again to resume."""

    out: Path
    """The folder to write to: a study of this one SAE."""
    essential: OmitArgPrefixes[EssentialOptions] = field(default_factory=EssentialOptions)
    batch_size: int = 4096
    """The number of tokens per training step."""
    dry_run: bool = False
    """Only print the settings and what the training would cost on this machine. Nothing is loaded or written."""
    json: bool = False
    """With --dry-run: print one JSON object, {"hooks": [...], "runs": [...], "estimate": {...}}."""
    run: OmitArgPrefixes[OtherRunOptions] = field(default_factory=OtherRunOptions)
    source: OmitArgPrefixes[OtherSourceOptions] = field(default_factory=OtherSourceOptions)
    settings: OmitArgPrefixes[SweepSettings] = field(default_factory=SweepSettings)
    latents: OmitArgPrefixes[LatentPageOptions] = field(default_factory=LatentPageOptions)

    def prepare(self) -> Job:
        """Check the request, and return the functions that carry it out. Raise ValueError if it is wrong."""
        return _prepared(self, Engine())

    def resolved_recipe(self) -> Recipe:
        """Return the study of the one run, since one SAE is trained by the same loop as a study."""
        from prolu.studies.folder import holds_study

        def weighed(runs: list[RunConfig]) -> list[RunConfig]:
            for run in runs:
                # A run that was begun with such a coefficient has it in its name, and is resumed under that name.
                if run.ignores_coeff and not holds_study(self.out):
                    raise ValueError(
                        f"coeff {run.coeff:g}: {run.nonlinearity} is trained without a penalty, so this has no effect; "
                        "leave --coeff out, or name a --penalty"
                    )
            return runs

        values = {name: [value] for name, value in values_of(RunConfig, self.essential, self.run).items()}
        return _refused_at_once(own_recipe(values, self.batch_size).changed(weighed), values)


GRID = "grid"
"""The name that `prolu sweep` has for a study of one's own."""

GRID_DESCRIPTION = """A grid of your own: all combinations of the values that you give, each trained as one SAE.

Example:
  prolu sweep grid --nonlinearity relu prolu_ste topk --target-l0 16 32 --d-sae 8x --init-seeds 0 1 2

trains 18 SAEs: three families at two L0s with three seeds each, with eight times as many latents as dimensions. A
penalty is combined with every nonlinearity too; by default each has the one that suits it."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid of your own: all combinations of the values that you give, each trained as one SAE."""

    essential: OmitArgPrefixes[EssentialGridOptions] = field(default_factory=EssentialGridOptions)
    init_seeds: tuple[int, ...] = (0,)
    """The seeds of the starting weights: every combination is trained once with each of them. Three or more give error
    bars over seeds."""
    batch_size: int = 4096
    """The number of tokens per training step."""
    out: Path = Path("runs") / GRID
    """The folder of the study."""
    dry_run: bool = False
    """Only print what would be trained and what it would cost on this machine. Nothing is loaded or written."""
    json: bool = False
    """With --dry-run: print one JSON object, {"hooks": [...], "runs": [...], "estimate": {...}}. The runs are those at
    one hook."""
    run: OmitArgPrefixes[OtherGridOptions] = field(default_factory=OtherGridOptions)
    source: OmitArgPrefixes[OtherSourceOptions] = field(default_factory=OtherSourceOptions)
    settings: OmitArgPrefixes[SweepSettings] = field(default_factory=SweepSettings)
    engine: OmitArgPrefixes[Engine] = field(default_factory=Engine)
    latents: OmitArgPrefixes[LatentPageOptions] = field(default_factory=LatentPageOptions)

    def prepare(self) -> Job:
        """Check the request, and return the functions that carry it out. Raise ValueError if it is wrong."""
        return _prepared(self, self.engine)

    def resolved_recipe(self) -> Recipe:
        """Return all combinations of the values as a study."""
        values = {
            name: [value] if takes_one_value(name) else value
            for name, value in values_of(RunConfig, self.essential, self.run).items()
        }
        return _refused_at_once(own_recipe(values | {"init_seed": self.init_seeds}, self.batch_size), values)


def _prepared(request: Train | Grid, engine: Engine) -> Job:
    from prolu.cli.commands import prepare_dry_run, prepare_sweep

    check_json(json=request.json, dry_run=request.dry_run)
    recipe = request.resolved_recipe()
    source = Source(**values_of(Source, request.essential, request.source))
    if request.dry_run:
        return prepare_dry_run(recipe, source, request.settings, as_json=request.json)
    return prepare_sweep(recipe, source, request.out, request.settings, request.latents, engine)


def takes_one_value(name: str) -> bool:
    """Return whether an option of a grid takes one value, for a field that is a list itself or a switch."""
    kind = next(f.type for f in fields(RunConfig) if f.name == name)
    return several(name, kind, None)[0] == kind


def _refused_at_once(recipe: Recipe, values: Mapping[str, Sequence[Any]]) -> Recipe:
    """Return a study, once its runs are made if the width of the activations does not matter to them.

    So wrong settings are refused before a language model is loaded.
    """
    if not any(isinstance(d_sae, Multiple) for d_sae in values["d_sae"]):
        from prolu.studies.request import check_runs

        check_runs(recipe.runs_at(0), recipe.batch_size)
    return recipe
