"""The requests that train named studies, `demo` and `sweep`, as dataclasses from which flags and help are made."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Suppress, subcommand

from prolu.activations.options import Source
from prolu.cli.job import Job
from prolu.cli.options import LatentPageOptions
from prolu.cli.own_requests import GRID, GRID_DESCRIPTION, Grid, check_json
from prolu.sae.choices import Normalisation
from prolu.studies.groups.engine import Engine
from prolu.studies.recipe import Recipe
from prolu.studies.recipes import DESCRIPTIONS, RECIPES, recipe_named
from prolu.studies.settings import SweepSettings
from prolu.studies.widths import DSae
from prolu.training.choices import Precision

DATA_FIELDS = ("text_column", "data_config", "split", "eval_split")
"""The fields of a source that belong to one dataset and have no meaning for another."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train 18 small SAEs on the built-in language model, score them and draw a report.

    It takes minutes, and nothing is downloaded.
    """

    scale: float = 1.0
    """The fraction of the demo's tokens to train on."""
    out: Path = Path("runs/demo")
    """The folder of the study."""

    def prepare(self) -> Job:
        """Check the request, and return the functions that carry it out. Raise ValueError if it is wrong."""
        return replace(_default_study("demo"), scale=self.scale, out=self.out).prepare()


@dataclass(frozen=True, kw_only=True)
class Study:
    """A named study, whose own language model, hook and text are the defaults of the options."""

    recipe: Suppress[str]
    scale: float = 1.0
    """The fraction of the study's tokens to train on. The learning rate's schedule and resampling shrink with it."""
    n_tokens: int | None = None
    """The number of tokens to train every run on, in place of --scale. By default the study's own."""
    d_sae: DSae | None = None
    """The number of latents of every run, or a multiple of the width of the activations, such as 8x. By default the
    study's own multiple."""
    lr: float | None = None
    """The peak learning rate of every run. By default the study's own."""
    normalisation: Normalisation | None = None
    """How the rows of activations are scaled in every run: per_token, or none, as for synthetic rows, in which the
    magnitude of a feature means something. By default the study's own."""
    penalty: tuple[str, ...] = ()
    """Train only the runs of the study that have one of these penalties, such as l1. By default all of its runs."""
    coeff: tuple[float, ...] = ()
    """Coefficients that replace the study's own: each family is trained once at each of them. In a study with target
    L0s, and with --target-l0, one coefficient, from which the L0 controller starts."""
    skip: bool = False
    """Train skip transcoders: a matrix W_skip besides, so that x W_skip is added to the output. This is for transcoders
    only (--hook-out)."""
    target_l0: tuple[float, ...] = ()
    """Target L0s that replace the study's coefficients: each family is trained once at each of them, as in --target-l0
    8 16 32 64."""
    init_seeds: tuple[int, ...] = ()
    """Seeds of the starting weights: every run of the study is trained once with each of them. Three or more give error
    bars over seeds. By default the study's own seeds."""
    batch_size: int
    """The number of tokens per training step. A smaller batch makes more steps of the same tokens."""
    precision: Precision = "fp32"
    """The number format of the inputs of matrix products; sums, weights and moments are always fp32. tf32 is meant for
    GPUs; bf16 is also faster on CPUs that multiply such numbers themselves (AMX)."""
    out: Path
    """The folder of the study."""
    dry_run: bool = False
    """Only print what would be trained and what it would cost on this machine. Nothing is loaded or written."""
    json: bool = False
    """With --dry-run: print one JSON object, {"hooks": [...], "runs": [...], "estimate": {...}}. The runs are those at
    one hook."""
    source: OmitArgPrefixes[Source] = field(default_factory=Source)
    settings: OmitArgPrefixes[SweepSettings] = field(default_factory=SweepSettings)
    engine: OmitArgPrefixes[Engine] = field(default_factory=Engine)
    latents: OmitArgPrefixes[LatentPageOptions] = field(default_factory=LatentPageOptions)

    def prepare(self) -> Job:
        """Check the request, and return the functions that carry it out. Raise ValueError if it is wrong."""
        from prolu.cli.commands import prepare_dry_run, prepare_sweep

        check_json(json=self.json, dry_run=self.dry_run)
        if self.dry_run:
            return prepare_dry_run(self.resolved_recipe(), self.source, self.settings, as_json=self.json)
        return prepare_sweep(
            self.resolved_recipe(), self.resolved_source(), self.out, self.settings, self.latents, self.engine
        )

    def resolved_source(self) -> Source:
        """Return the source of activations; on the study's own data, with the study's own column and splits."""
        own = RECIPES[self.recipe].source
        plain = Source()
        if self.source.data != own["data"]:
            return self.source
        unset = {name for name in DATA_FIELDS if getattr(self.source, name) == getattr(plain, name)}
        return replace(self.source, **{name: own[name] for name in unset & own.keys()})  # pyright: ignore[reportArgumentType]

    def resolved_recipe(self) -> Recipe:
        """Return the study as the options change it."""
        recipe = recipe_named(self.recipe).scaled(self.scale)._replace(batch_size=self.batch_size)
        if self.n_tokens is not None:
            if self.scale != 1:
                raise ValueError(f"n_tokens {self.n_tokens} and scale {self.scale:g}: give one of the two")
            recipe = recipe.of_length(self.n_tokens)
        if self.d_sae is not None:
            recipe = recipe.of_width(self.d_sae)
        changes = {"lr": self.lr, "normalisation": self.normalisation}
        given = {name: value for name, value in changes.items() if value is not None}
        recipe = recipe.changed(lambda runs: [replace(run, **given, skip=self.skip) for run in runs])
        if self.penalty:
            recipe = recipe.with_penalties(self.penalty)
        # Targets and coefficients are applied before seeds, because they keep one run of each family, and so one seed.
        if self.target_l0:
            recipe = recipe.at_targets(self.target_l0)
        if self.coeff:
            recipe = recipe.at_coeffs(self.coeff)
        if self.init_seeds:
            from prolu.studies.grids import with_seeds

            recipe = recipe.changed(lambda runs: with_seeds(runs, self.init_seeds))
        return recipe.changed(lambda runs: [replace(run, precision=self.precision) for run in runs])


def _default_study(name: str) -> Study:
    recipe = RECIPES[name]
    # The fields that belong to the study's own data are filled in by `resolved_source`, and only if its data is used:
    # as defaults of flags they would be applied to the text of --data as well.
    own = {key: value for key, value in recipe.source.items() if key not in DATA_FIELDS}
    settings = SweepSettings()
    if "eval_tokens" in own:
        settings = replace(settings, eval_tokens=own.pop("eval_tokens"))  # pyright: ignore[reportArgumentType]
    source = replace(Source(), **own | {"hook": (own["hook"],)})  # pyright: ignore[reportArgumentType]
    out = Path("runs") / name
    return Study(recipe=name, batch_size=recipe.batch_size, source=source, settings=settings, out=out)


def _study(name: str) -> Any:
    return subcommand(name, default=_default_study(name), description=DESCRIPTIONS[name])


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Train a study, named or a grid of your own: all its SAEs on one stream of activations. Run the same command again
    to resume.
    """

    # Spelled out, and not made from RECIPES, because a type checker must see the union.
    study: OmitArgPrefixes[
        Annotated[Study, _study("demo")]
        | Annotated[Study, _study("comparison")]
        | Annotated[Study, _study("comparison2026")]
        | Annotated[Study, _study("causes")]
        | Annotated[Study, _study("synthetic")]
        | Annotated[Study, _study("experiment1")]
        | Annotated[Study, _study("experiment2")]
        | Annotated[Study, _study("experiment3")]
        | Annotated[Grid, subcommand(GRID, description=GRID_DESCRIPTION)]
    ]
    """The studies. `prolu sweep STUDY --help` lists the options of one."""

    def prepare(self) -> Job:
        """Check the request, and return the functions that carry it out. Raise ValueError if it is wrong."""
        return self.study.prepare()
