"""The requests of the command line as dataclasses, from which their flags and help are made."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

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
from prolu.cli.scoring import Scoring
from prolu.interop import ExportFormat, ImportFormat, check_new, export_files, import_sae, write_folder
from prolu.runtime.hub import MAIN
from prolu.studies.groups.engine import Engine
from prolu.studies.recipes import DESCRIPTIONS, RECIPES, recipe_named
from prolu.studies.sweep import with_seeds
from prolu.training.config import RunConfig

DATA_FIELDS = ("text_column", "split", "eval_split")
"""What goes with one dataset and no other."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The whole pipeline on the built-in language model: minutes, offline, nothing downloaded."""

    scale: float = 1.0
    """The fraction of the demo's training tokens to train on; the schedule shrinks with it."""
    out: Path = Path("runs/demo")
    """Folder of the study."""

    def prepare(self) -> Job:
        """Checks the request; gives back the work."""
        return replace(_default_study("demo"), scale=self.scale, out=self.out).prepare()


@dataclass(frozen=True, kw_only=True)
class RunFlags(RunConfig):
    """One run: which SAE, which loss, how long."""

    def __post_init__(self):
        """Checks nothing yet: a wrong value is told in our one sentence, not in tyro's box."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one SAE."""

    run: OmitArgPrefixes[RunFlags] = field(default_factory=RunFlags)
    source: OmitArgPrefixes[Source] = field(default_factory=Source)
    batch_size: int = 4096
    """Tokens per training step."""
    latents: OmitArgPrefixes[LatentPageOptions] = field(default_factory=LatentPageOptions)
    out: Path
    """Folder of the study."""

    def prepare(self) -> Job:
        """Checks the request; gives back the work."""
        run = RunConfig(**asdict(self.run))
        return prepare_sweep(lambda d_in: ([run], self.batch_size), self.source, self.out, self.latents)


@dataclass(frozen=True, kw_only=True)
class Study:
    """One named study, with its own source of activations as the default."""

    recipe: Suppress[str]
    scale: float = 1.0
    """Share of the study's tokens to train on; schedule and resampling shrink with it."""
    batch_size: int
    """Tokens per training step. A smaller one gives more steps from the same tokens."""
    target_l0: tuple[float, ...] = ()
    """L0s to reach, in place of the study's coefficients: each family once at each, as in --target-l0 8 16 32 64."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Of the matmuls' inputs; sums, weights and moments are fp32. All but fp32 are for GPUs."""
    init_seeds: tuple[int, ...] = ()
    """Seeds of the first weights: every run of the study is trained at each; by default those of the study. Three or
    more give error bars."""
    source: OmitArgPrefixes[Source] = field(default_factory=Source)
    engine: OmitArgPrefixes[Engine] = field(default_factory=Engine)
    latents: OmitArgPrefixes[LatentPageOptions] = field(default_factory=LatentPageOptions)
    out: Path
    """Folder of the study."""
    dry_run: bool = False
    """Only say what would be trained, and what it would cost here; nothing is loaded or written."""
    json: bool = False
    """With --dry-run: one JSON object, {"hooks": [...], "runs": [...], "estimate": {...}}; the runs of each hook."""

    def prepare(self) -> Job:
        """Checks the request; gives back the work."""
        if self.json and not self.dry_run:
            raise ValueError("json: only with --dry-run")
        if self.dry_run:
            return prepare_dry_run(self.at_width, self.source, as_json=self.json)
        return prepare_sweep(self.at_width, self.resolved_source(), self.out, self.latents, self.engine)

    def resolved_source(self) -> Source:
        """On the study's own data also its own column and splits, where they were not set."""
        own = RECIPES[self.recipe].source
        plain = Source()
        if self.source.data != own["data"]:
            return self.source
        unset = {name for name in DATA_FIELDS if getattr(self.source, name) == getattr(plain, name)}
        return replace(self.source, **{name: own[name] for name in unset & own.keys()})  # pyright: ignore[reportArgumentType]

    def at_width(self, d_in: int) -> tuple[list[RunConfig], int]:
        """What it trains on activations of that width, and in batches of which size."""
        recipe = recipe_named(self.recipe).scaled(self.scale)
        runs = (recipe.at_targets(self.target_l0) if self.target_l0 else recipe).runs_at(d_in)
        runs = with_seeds(runs, self.init_seeds) if self.init_seeds else runs
        return [replace(run, precision=self.precision) for run in runs], self.batch_size


def _default_study(name: str) -> Study:
    recipe = RECIPES[name]
    kept = {key: value for key, value in recipe.source.items() if key not in DATA_FIELDS}
    source = replace(Source(), **kept | {"hook": (kept["hook"],)})  # pyright: ignore[reportArgumentType]
    return Study(recipe=name, batch_size=recipe.batch_size, source=source, out=Path("runs") / name)


def _study(name: str) -> Any:
    return subcommand(name, default=_default_study(name), description=DESCRIPTIONS[name])


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Train a named study, all its SAEs on one stream of activations. Run again: keeps what has finished."""

    study: OmitArgPrefixes[
        Annotated[Study, _study("demo")]
        | Annotated[Study, _study("comparison")]
        | Annotated[Study, _study("experiment1")]
        | Annotated[Study, _study("experiment2")]
        | Annotated[Study, _study("experiment3")]
    ]

    def prepare(self) -> Job:
        """Checks the request; gives back the work."""
        return self.study.prepare()


@dataclass(frozen=True, kw_only=True)
class Harvest:
    """Write activations at one or several hooks to the disk, once; `--store` trains from them. Run again: goes on."""

    request: OmitArgPrefixes[HarvestSource] = field(default_factory=HarvestSource)
    out: Path
    """Folder of the store."""
    dry_run: bool = False
    """Only say what it would cost here: disk and time; nothing is loaded or written."""
    json: bool = False
    """With --dry-run: one JSON object, {"tokens": ..., "disk": ..., "seconds": ...}."""

    def prepare(self) -> Job:
        """Checks the request; gives back the work."""
        if self.json and not self.dry_run:
            raise ValueError("json: only with --dry-run")
        if self.dry_run:
            return prepare_harvest_dry_run(self.request, as_json=self.json)
        return prepare_harvest(self.request, self.out)


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Score saved SAEs on held-out text: what they were trained for, other text, or, imported, beside a study."""

    runs: Positional[tuple[Path, ...]]
    """Folders of runs: config.json and sae.safetensors."""
    scoring: OmitArgPrefixes[Scoring] = field(default_factory=Scoring)

    def prepare(self) -> Job:
        """Checks the request; gives back the work."""
        return self.scoring.prepare(self.runs)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a saved SAE as another library's folder; what that cannot say is refused."""

    run: Positional[Path]
    """Folder of a run."""
    format: ExportFormat
    """Whose folder."""
    out: Path
    """A new folder for it."""
    inputs_normalised: bool = False
    """Export although the format cannot say how inputs are prepared (centred, scaled per token), and record that they
    must be."""

    def prepare(self) -> Job:
        """Checks the request; gives back the work."""
        files = export_files(self.run, self.format, inputs_normalised=self.inputs_normalised)
        check_new(self.out)
        return lambda: write_folder(self.out, files)


@dataclass(frozen=True, kw_only=True)
class Import:
    """Read another library's SAE as a run of ours, which `prolu eval` and `prolu export` take."""

    folder: Positional[Path]
    """Theirs, on this disk."""
    out: Path
    """A new folder for the run."""
    format: Literal["auto", ImportFormat] = "auto"
    """Whose folder it is; auto: recognised by its files."""

    def prepare(self) -> Job:
        """Checks the request; gives back the work."""
        sae, made = import_sae(self.folder, self.format)
        check_new(self.out)
        return lambda: write_folder(self.out, sae.files(made))


@dataclass(frozen=True, kw_only=True)
class Report:
    """Draw the figures, the page and the pages of latents of a study, or of several together; print verdicts.
    Run again: pages of latents that are there are kept.
    """

    studies: Positional[tuple[Path, ...]]
    """Folders of studies."""
    out: Path | None = None
    """Folder of the report; by default the study's own, or `pooled` beside the first of several."""
    latents: OmitArgPrefixes[LatentPageOptions] = field(default_factory=LatentPageOptions)

    def prepare(self) -> Job:
        """Checks the request; gives back the work."""
        return prepare_report(self.studies, self.out, self.latents)


@dataclass(frozen=True, kw_only=True)
class Push:
    """Send a study, or a run of one, to the Hugging Face hub: a folder an SAE, results, a model card, in one commit."""

    folder: Positional[Path]
    """Of a study, of a run, or of the studies at several hooks."""
    repo: Positional[str]
    """user/repo on the hub; made if it is not there."""
    dry_run: bool = False
    """Only list the files and show the card; nothing is sent or written."""
    private: bool = False
    """A new repository is private; one that is there already must be."""
    revision: str = MAIN
    """Branch to commit to; made if it is not there."""
    license: str = "mit"
    """Licence of what is sent, as the hub names licences."""

    def prepare(self) -> Job:
        """Checks the request; gives back the work."""
        return prepare_push(
            self.folder, self.repo, revision=self.revision, private=self.private, license=self.license,
            dry_run=self.dry_run,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pull:
    """Take a study, or one SAE, from the Hugging Face hub; each SAE is loaded before anything is written."""

    place: Positional[str]
    """user/repo, or user/repo/FOLDER for one SAE."""
    out: Path
    """A new folder for it."""
    revision: str = MAIN
    """Branch, tag or commit."""

    def prepare(self) -> Job:
        """Checks the request; gives back the work."""
        return prepare_pull(self.place, self.out, self.revision)
