"""The requests of the command line as dataclasses, from which their flags and help are made."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, Suppress, subcommand

from prolu.activations.source import HarvestSource, Source
from prolu.cli.commands import (
    Job,
    LatentPageOptions,
    prepare_dry_run,
    prepare_harvest,
    prepare_harvest_dry_run,
    prepare_pull,
    prepare_push,
    prepare_report,
    prepare_sweep,
)
from prolu.cli.options import option_group, values_of
from prolu.cli.scoring import Scoring
from prolu.interop import ExportFormat, ImportFormat, check_new, export_files, import_sae, write_folder
from prolu.runtime.hub import MAIN
from prolu.studies.groups.engine import Engine
from prolu.studies.recipes import DESCRIPTIONS, RECIPES, Recipe, recipe_named
from prolu.studies.settings import SweepSettings
from prolu.studies.sweep import with_seeds
from prolu.training.config import Precision, RunConfig

DATA_FIELDS = ("text_column", "split", "eval_split")
"""Options of a source that belong to one dataset and to no other."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the whole pipeline on the built-in language model. It takes minutes, and nothing is downloaded."""

    scale: float = 1.0
    """Fraction of the demo's tokens to train on."""
    out: Path = Path("runs/demo")
    """Folder of the study."""

    def prepare(self) -> Job:
        """Check the request, and return the work."""
        return replace(_default_study("demo"), scale=self.scale, out=self.out).prepare()


FIRST_IN_RUN = ("nonlinearity", "penalty", "coeff", "target_l0", "d_sae", "n_tokens")
FIRST_IN_SOURCE = ("lm", "hook", "data")


def _others(owner: type, first: Sequence[str]) -> list[str]:
    return [f.name for f in fields(owner) if f.name not in first]


if TYPE_CHECKING:  # a checker of types cannot see into classes that are made
    EssentialOptions = Any
    OtherRunOptions = Any
    OtherSourceOptions = Any
else:
    EssentialOptions = option_group(
        "EssentialOptions",
        "What to train, and on which activations.",
        {Source: FIRST_IN_SOURCE, RunConfig: FIRST_IN_RUN},
    )
    OtherRunOptions = option_group(
        "OtherRunOptions",
        "Schedule, starting weights, resampling, arithmetic.",
        {RunConfig: _others(RunConfig, FIRST_IN_RUN)},
    )
    OtherSourceOptions = option_group(
        "OtherSourceOptions", "Text, activations and devices.", {Source: _others(Source, FIRST_IN_SOURCE)}
    )


TRAIN_DESCRIPTION = """Train one SAE.

Examples:
  prolu train --nonlinearity prolu_ste --coeff 0.007 --d-sae 1024 --n-tokens 1e6 --out runs/one
  prolu train --data my_text.parquet --nonlinearity topk --k 32 --penalty none --out runs/two

Flags that other libraries name differently are understood too, such as --l1-coefficient, --k and --dict-size."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one SAE."""

    out: Path
    """Folder of the study."""
    essential: OmitArgPrefixes[EssentialOptions] = field(default_factory=EssentialOptions)
    batch_size: int = 4096
    """Tokens per training step."""
    run: OmitArgPrefixes[OtherRunOptions] = field(default_factory=OtherRunOptions)
    source: OmitArgPrefixes[OtherSourceOptions] = field(default_factory=OtherSourceOptions)
    settings: OmitArgPrefixes[SweepSettings] = field(default_factory=SweepSettings)
    latents: OmitArgPrefixes[LatentPageOptions] = field(default_factory=LatentPageOptions)

    def prepare(self) -> Job:
        """Check the request, and return the work."""
        run = RunConfig(**values_of(RunConfig, self.essential, self.run))
        source = Source(**values_of(Source, self.essential, self.source))
        recipe = Recipe(lambda _: [run], self.batch_size, run.n_tokens, source={})
        return prepare_sweep(recipe, source, self.out, self.settings, self.latents, Engine())


@dataclass(frozen=True, kw_only=True)
class Study:
    """One named study, with its own source of activations as the default."""

    recipe: Suppress[str]
    scale: float = 1.0
    """Fraction of the study's tokens to train on. Schedule and resampling shrink with it."""
    target_l0: tuple[float, ...] = ()
    """Target L0s to use instead of the study's coefficients: each family is trained once at each, as in
    --target-l0 8 16 32 64."""
    init_seeds: tuple[int, ...] = ()
    """Seeds of the starting weights: every run of the study is trained once with each. By default those of the study.
    Three or more give error bars."""
    batch_size: int
    """Tokens per training step. A smaller batch makes more steps from the same tokens."""
    precision: Precision = "fp32"
    """Number format of the inputs of matrix products; sums, weights and moments are fp32. tf32 and bf16 are for
    GPUs."""
    out: Path
    """Folder of the study."""
    dry_run: bool = False
    """Only print what would be trained, and what it would cost on this machine; nothing is loaded or written."""
    json: bool = False
    """With --dry-run: print one JSON object, {"hooks": [...], "runs": [...], "estimate": {...}}, with the runs of one
    hook."""
    source: OmitArgPrefixes[Source] = field(default_factory=Source)
    settings: OmitArgPrefixes[SweepSettings] = field(default_factory=SweepSettings)
    engine: OmitArgPrefixes[Engine] = field(default_factory=Engine)
    latents: OmitArgPrefixes[LatentPageOptions] = field(default_factory=LatentPageOptions)

    def prepare(self) -> Job:
        """Check the request, and return the work."""
        if self.json and not self.dry_run:
            raise ValueError("json: only with --dry-run")
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
        if self.target_l0:
            recipe = recipe.at_targets(self.target_l0)
        if self.init_seeds:
            recipe = recipe.changed(lambda runs: with_seeds(runs, self.init_seeds))
        return recipe.changed(lambda runs: [replace(run, precision=self.precision) for run in runs])


def _default_study(name: str) -> Study:
    recipe = RECIPES[name]
    # The fields that belong to the study's own data are filled in later, and only if its data is used.
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
    """Train a named study: all its SAEs on one stream of activations. Run it again to resume."""

    study: OmitArgPrefixes[
        Annotated[Study, _study("demo")]
        | Annotated[Study, _study("comparison")]
        | Annotated[Study, _study("experiment1")]
        | Annotated[Study, _study("experiment2")]
        | Annotated[Study, _study("experiment3")]
    ]

    def prepare(self) -> Job:
        """Check the request, and return the work."""
        return self.study.prepare()


@dataclass(frozen=True, kw_only=True)
class Harvest:
    """Write activations at one or several hooks to the disk, to train from with --store. Run it again to resume."""

    request: OmitArgPrefixes[HarvestSource] = field(default_factory=HarvestSource)
    out: Path
    """Folder of the store."""
    dry_run: bool = False
    """Only print the disk space and the time that it would take; nothing is loaded or written."""
    json: bool = False
    """With --dry-run: print one JSON object, {"tokens": ..., "disk": ..., "seconds": ...}."""

    def prepare(self) -> Job:
        """Check the request, and return the work."""
        if self.json and not self.dry_run:
            raise ValueError("json: only with --dry-run")
        if self.dry_run:
            return prepare_harvest_dry_run(self.request, as_json=self.json)
        return prepare_harvest(self.request, self.out)


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Score saved SAEs on held-out text: their own, another text, or the text of a study (--like)."""

    runs: Positional[tuple[Path, ...]]
    """Folders of saved SAEs, each with config.json and sae.safetensors."""
    scoring: OmitArgPrefixes[Scoring] = field(default_factory=Scoring)

    def prepare(self) -> Job:
        """Check the request, and return the work."""
        return self.scoring.prepare(self.runs)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a saved SAE in the format of another library. An SAE that the format cannot represent is refused."""

    run: Positional[Path]
    """Folder of a run."""
    format: ExportFormat
    """The library whose format is written."""
    out: Path
    """A new folder for the result."""
    inputs_normalised: bool = False
    """Export even though the format cannot tell how inputs are prepared (centred, scaled per token); a note in the
    folder records that they must be."""

    def prepare(self) -> Job:
        """Check the request, and return the work."""
        files = export_files(self.run, self.format, inputs_normalised=self.inputs_normalised)
        check_new(self.out)
        return [lambda: write_folder(self.out, files)]


@dataclass(frozen=True, kw_only=True)
class Import:
    """Convert an SAE of another library into a folder that `prolu eval` and `prolu export` accept."""

    folder: Positional[Path]
    """Folder of the other library's SAE on this machine."""
    out: Path
    """A new folder for the converted SAE."""
    format: Literal["auto", ImportFormat] = "auto"
    """The library that wrote the folder; auto recognises it by its files."""

    def prepare(self) -> Job:
        """Check the request, and return the work."""
        sae, made = import_sae(self.folder, self.format)
        check_new(self.out)
        return [lambda: write_folder(self.out, sae.files(made))]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Draw the report of a study, or of several together: figures, page, pages of latents, verdicts.

    Pages of latents that are there already are kept.
    """

    studies: Positional[tuple[Path, ...]]
    """Folders of studies."""
    out: Path | None = None
    """Folder of the report. By default the study's own folder, or `pooled` beside the first of several studies."""
    latents: OmitArgPrefixes[LatentPageOptions] = field(default_factory=LatentPageOptions)

    def prepare(self) -> Job:
        """Check the request, and return the work."""
        return prepare_report(self.studies, self.out, self.latents)


@dataclass(frozen=True, kw_only=True)
class Push:
    """Send a study or one run to the Hugging Face hub: SAEs, results and a model card, in a single commit."""

    folder: Positional[Path]
    """Folder of a study, of a run, or of studies at several hooks."""
    repo: Positional[str]
    """Repository on the hub, USER/REPO. It is created if it does not exist."""
    dry_run: bool = False
    """Only list the files and show the model card; nothing is sent or written."""
    private: bool = False
    """Create the repository as private; a repository that exists already must be private."""
    revision: str = MAIN
    """Branch to commit to. It is created if it does not exist."""
    license: str = "mit"
    """Licence of the files, by the hub's name for it."""

    def prepare(self) -> Job:
        """Check the request, and return the work."""
        return prepare_push(
            self.folder, self.repo, revision=self.revision, private=self.private, license=self.license,
            dry_run=self.dry_run,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pull:
    """Download a study or one SAE from the Hugging Face hub. Every SAE is checked before anything is written."""

    place: Positional[str]
    """USER/REPO for a study, or USER/REPO/FOLDER for one SAE."""
    out: Path
    """A new folder for the result."""
    revision: str = MAIN
    """Branch, tag or commit."""

    def prepare(self) -> Job:
        """Check the request, and return the work."""
        return prepare_pull(self.place, self.out, self.revision)
