"""The requests that train nothing, from `harvest` to `pull`, as dataclasses from which flags and help are made."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional

from prolu.activations.options import HarvestSource
from prolu.cli.job import Job
from prolu.cli.options import LatentPageOptions, Scoring
from prolu.interop.format_names import ExportFormat, ImportFormat
from prolu.runtime.checks import one_of
from prolu.runtime.hub import MAIN


@dataclass(frozen=True, kw_only=True)
class Harvest:
    """Write activations to a store on the disk, from which `prolu train` and `prolu sweep` can train with --store.

    Several hooks share one pass of the language model. Run the same command again to resume.
    """

    request: OmitArgPrefixes[HarvestSource] = field(default_factory=HarvestSource)
    out: Path
    """The folder of the store."""
    dry_run: bool = False
    """Only print the disk space and the time that it would take, from the model's config and a short measurement of
    this machine. Nothing is written."""
    verify: bool = False
    """Read the whole store in --out again and compare every file with its digest. Nothing is harvested."""
    json: bool = False
    """With --dry-run: print one JSON object, {"tokens": ..., "disk": ..., "seconds": ...}, with the disk space in
    bytes."""

    def prepare(self) -> Job:
        """Check the request, and return the functions that carry it out. Raise ValueError if it is wrong."""
        from prolu.cli.commands import prepare_harvest, prepare_harvest_dry_run, prepare_verification

        if self.json and not self.dry_run:
            raise ValueError("json: only with --dry-run")
        if self.verify:
            return prepare_verification(self.out)
        if self.dry_run:
            return prepare_harvest_dry_run(self.request, as_json=self.json)
        return prepare_harvest(self.request, self.out)


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Score saved SAEs on held-out text: that of their own training, another text, or that of a study (--like)."""

    runs: Positional[tuple[Path, ...]]
    """Folders of saved SAEs, each with config.json and sae.safetensors."""
    scoring: OmitArgPrefixes[Scoring] = field(default_factory=Scoring)

    def prepare(self) -> Job:
        """Check the request, and return the functions that carry it out. Raise ValueError if it is wrong."""
        from prolu.cli.scoring import prepare_scoring

        return prepare_scoring(self.scoring, self.runs)


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Show which latents of a saved SAE are active on a text, and how strongly.

    Prints a line per token with its strongest latents; with --out, writes a page in which the text is shaded by the
    latent that you choose.
    """

    run: Positional[Path]
    """The folder of a saved SAE, with config.json and sae.safetensors."""
    text: tuple[str, ...] = ()
    """The text, or several, each in quotation marks."""
    file: tuple[Path, ...] = ()
    """Files with a text each, in UTF-8."""
    top: int = 5
    """The number of strongest latents to show of each token."""
    latents: tuple[int, ...] = ()
    """The numbers of the latents to show; by default all."""
    ctx: int | None = None
    """The number of tokens that the language model sees at once, BOS included; by default as in the training."""
    lm: str = ""
    """The language model, if it has moved or the SAE's config does not name it."""
    hook: str = ""
    """The hook at which activations are read, if the SAE's config does not name it."""
    out: Path | None = None
    """Write a page to this HTML file instead. It opens without a server, and links each latent to its own page where
    the run has pages of latents."""
    json: bool = False
    """Print a line per token, a JSON object with its strongest latents, instead of a table."""

    def prepare(self) -> Job:
        """Check the request, and return the functions that carry it out. Raise ValueError if it is wrong."""
        from prolu.cli.latents import prepare_latents

        return prepare_latents(self)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Measure what the latents of finished studies tell about a token, and add the figures to their results.

    Probes are logistic regressions on 1, 5 and all latents, for labels that Python's own tokenizer gives: inside a
    string, inside a comment, part of a number, deeply indented. Their text is the held-out Python source of the study.
    Absorption of first letters is measured where the language model's tokenizer has enough words, and probes recognise
    their letters in its activations. What cannot be measured is left out, with the reason.

    Run the same command again to resume. `prolu report STUDY --metrics probe_mean_5` compares families by them.
    """

    studies: Positional[tuple[Path, ...]]
    """The folders of the studies."""
    lm: str = ""
    """The language model, if it has moved since."""
    data: str = ""
    """Another text than that of the study, whose held-out tenth is used: a file, a folder, a dataset on the Hugging
    Face hub, or `builtin` (Python's standard library)."""
    text_column: str = ""
    """The column of that text; by default text."""
    n_characters: int = 2_000_000
    """The number of characters of Python source to probe on, or all if there are fewer."""

    def prepare(self) -> Job:
        """Check the request, and return the functions that carry it out. Raise ValueError if it is wrong."""
        from prolu.cli.probing import prepare_probing

        return prepare_probing(
            self.studies,
            lm=self.lm,
            data=self.data,
            text_column=self.text_column,
            n_characters=self.n_characters,
        )


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a saved SAE in the format of another library. An SAE that the format cannot represent is refused."""

    run: Positional[Path]
    """The folder of a run."""
    format: ExportFormat
    """The library whose format to write."""
    out: Path
    """A new folder for the exported SAE."""
    inputs_normalised: bool = False
    """Export even though the format cannot record that activations must be centred or scaled per token before the SAE
    sees them. A note in the folder says that whoever uses the SAE must do so."""

    def prepare(self) -> Job:
        """Check the request, and return the functions that carry it out. Raise ValueError if it is wrong."""
        from prolu.interop.exchange import check_new, export_files, write_folder

        files = export_files(self.run, self.format, inputs_normalised=self.inputs_normalised)
        check_new(self.out)
        return [lambda: write_folder(self.out, files)]


@dataclass(frozen=True, kw_only=True)
class Import:
    """Convert an SAE of another library into a folder that `prolu eval` and `prolu export` accept.

    The folder also records the SAE's language model and hook, where the other library says them.
    """

    folder: Positional[str]
    """The folder in which the other library saved the SAE, on this machine or on the Hugging Face hub, as in
    hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71; or its name in the registry of SAELens, which
    must be installed then, as in saelens:gpt2-small-res-jb/blocks.8.hook_resid_pre."""
    out: Path
    """A new folder for the converted SAE."""
    format: Literal["auto", ImportFormat] = "auto"
    """The library that saved the SAE; auto recognises it by the names of its files."""
    revision: str = "main"
    """The branch, tag or commit of a folder on the hub."""

    def prepare(self) -> Job:
        """Check the request, and return the functions that carry it out. Raise ValueError if it is wrong."""
        from prolu.interop.exchange import check_new, import_sae, write_folder
        from prolu.interop.saelens_registry import IN_REGISTRY, import_registered

        check_new(self.out)
        if self.folder.startswith(IN_REGISTRY):
            one_of("format", self.format, ["auto", "saelens"])
            if self.revision != MAIN:
                raise ValueError(f"revision {self.revision!r}: SAELens loads the last one of an SAE of its registry")
            sae, made = import_registered(self.folder)
        else:
            sae, made = import_sae(self.folder, self.format, revision=self.revision)
        return [lambda: write_folder(self.out, sae.files(made))]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Draw the report of a study, or one report of several studies together: a page with figures and comparisons.

    Each study's missing pages of latents are written too, for which its language model and text are opened where its
    config.json says that they are; pages that exist are kept.
    """

    studies: Positional[tuple[Path, ...]]
    """The folders of the studies."""
    out: Path | None = None
    """The folder to write the report to. By default the study's own folder, or for several studies a folder `pooled`
    beside the first of them."""
    verdicts: bool = False
    """Print every comparison with its interval, the families in numbers, and the evidence for each claim. Without it,
    intervals are printed if there are any."""
    agreement: bool = False
    """Compute in any case how far SAEs that differ in their seed only agree. Without it, it is computed where that
    takes a minute at most, as for 190 pairs of SAEs with 1,024 latents."""
    metrics: tuple[str, ...] = ()
    """Compare families by these metrics too, for example kl fvu dead_fraction; results.jsonl has their names. There are
    verdicts in each, and a table of families by metrics with the probability that each is the best."""
    latents: OmitArgPrefixes[LatentPageOptions] = field(default_factory=LatentPageOptions)

    def prepare(self) -> Job:
        """Check the request, and return the functions that carry it out. Raise ValueError if it is wrong."""
        from prolu.cli.drawing import prepare_report

        return prepare_report(
            self.studies,
            self.out,
            self.latents,
            all_verdicts=self.verdicts,
            agreement=self.agreement,
            metrics=self.metrics,
        )


@dataclass(frozen=True, kw_only=True)
class Push:
    """Send a study or one run to the Hugging Face hub: SAEs, results and a model card, in a single commit."""

    folder: Positional[Path]
    """The folder of a study, of one run, or of the studies of a sweep at several hooks."""
    repo: Positional[str]
    """The repository on the hub, USER/REPO. It is created if it does not exist."""
    dry_run: bool = False
    """Only print the names and sizes of the files and the model card. Nothing is sent or written."""
    private: bool = False
    """Create the repository as a private one. One that exists already must be private, or nothing is sent."""
    revision: str = MAIN
    """The branch to commit to. It is created if it does not exist."""
    license: str = "mit"
    """The licence of the files, as the hub names licences, for example mit or apache-2.0."""

    def prepare(self) -> Job:
        """Check the request, and return the functions that carry it out. Raise ValueError if it is wrong."""
        from prolu.cli.commands import prepare_push

        return prepare_push(
            self.folder,
            self.repo,
            revision=self.revision,
            private=self.private,
            license=self.license,
            dry_run=self.dry_run,
        )


@dataclass(frozen=True, kw_only=True)
class Pull:
    """Download a study or one SAE that `prolu push` has sent to the Hugging Face hub.

    Before anything is written, the weights of every SAE are checked: no code, the right shapes, finite numbers.
    """

    place: Positional[str]
    """USER/REPO for a whole study, or USER/REPO/FOLDER for one SAE."""
    out: Path
    """A new folder for the downloaded files."""
    revision: str = MAIN
    """The branch, tag or commit to download."""

    def prepare(self) -> Job:
        """Check the request, and return the functions that carry it out. Raise ValueError if it is wrong."""
        from prolu.cli.commands import prepare_pull

        return prepare_pull(self.place, self.out, self.revision)
