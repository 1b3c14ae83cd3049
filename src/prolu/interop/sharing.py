"""Pushing a study to the Hugging Face hub, and pulling one from there.

`push` and `pull` do everything. The steps that they consist of are functions too, because the command line takes them
one by one: it refuses a wrong request before it begins the work, and --dry-run stops after `pack`.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from prolu.evaluation.comparison.frontiers import Record
from prolu.evaluation.comparison.metric_catalog import main_metric
from prolu.evaluation.document_sums import DOCUMENTS_FILE, read_documents_of
from prolu.evaluation.latents import LATENTS_FILE
from prolu.interop.formats.checked_reading import read_safetensors
from prolu.interop.model_card import card_of
from prolu.runtime.files import (
    check_can_be_folder,
    json_lines,
    json_text,
    read_json_object,
    remove,
    rename_folder,
    write_flushed,
)
from prolu.runtime.hub import MAIN, Head, HubError, Place, Sent, fetch, look, place_of, send
from prolu.runtime.names import plain_name
from prolu.sae.autoencoder import SAE
from prolu.sae.saved_sae import CONFIG_FILE, WEIGHTS_FILE
from prolu.studies.folder import STUDY_FILE, read_study
from prolu.studies.records import CURVES_FILE, RESULTS_FILE, read_curve
from prolu.studies.results import Results, records_of

CARD_FILE = "README.md"
FIGURE_FILE = "frontier.png"

SAE_FILES = (CONFIG_FILE, WEIGHTS_FILE, CURVES_FILE, DOCUMENTS_FILE, LATENTS_FILE)
"""The files of a run's folder that are sent. They are listed by name, so that checkpoints, optimiser states, logs and
whatever else lies there never leave the machine."""

PULLED = {*SAE_FILES, STUDY_FILE, RESULTS_FILE, CARD_FILE, FIGURE_FILE}
"""The names of the files that are taken from a repository, whatever else is in it."""


class Parcel(NamedTuple):
    """The files that a push sends, and the repository that it sends them to."""

    place: Place
    """The repository."""
    files: dict[str, bytes | Path]
    """The content of each file, or the file on this disk that holds it, by its name in the repository."""

    @property
    def sizes(self) -> dict[str, int]:
        """The number of bytes of each file."""
        return {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in self.files.items()}

    @property
    def card(self) -> str:
        """The text of the model card."""
        return bytes(self.files[CARD_FILE]).decode()  # pyright: ignore[reportArgumentType]

    @property
    def saes(self) -> list[str]:
        """The folders of the SAEs in the repository."""
        return _sae_folders(self.files)


def pack(folder: str | Path, repo: str, *, license: str = "mit") -> Parcel:
    """Return the files that `push` would send. Every SAE is loaded first.

    Of absolute paths in configs (a language model's folder, a text) only the last part is kept.

    Args:
        folder: The folder of a study, of one run, or of the studies of a sweep at several hooks.
        repo: The repository, user/repo.
        license: The licence of what is sent, as the hub names licences.

    Raises:
        ValueError: The folder holds no study or run, no run has finished, an SAE cannot be loaded, or `repo` is not
            the name of a repository.
    """
    place = place_of(repo)
    if place.folder:
        raise ValueError(f"{repo!r}: a repository holds one study; write user/repo")
    found = _studies(Path(folder))
    # Studies of one sweep at several hooks share a repository; studies that differ in anything else are refused.
    records = records_of(found, hooks_apart=True)
    files: dict[str, bytes | Path] = {}
    shapes: set[tuple[int, int]] = set()
    for results in found:
        prefix = f"{results.folder.name}/" if len(found) > 1 else ""
        files[prefix + STUDY_FILE] = _public(results.folder / STUDY_FILE)
        files[prefix + RESULTS_FILE] = json_lines(results.records).encode()
        for run in results.runs:
            sae = run.load().config
            shapes.add((sae.d_in, sae.d_sae))
            _check_files(run.folder)
            for file in (run.folder / name for name in SAE_FILES if (run.folder / name).is_file()):
                files[f"{prefix}{run.folder.name}/{file.name}"] = _public(file) if file.name == CONFIG_FILE else file
    configs = [_without_paths(read_study(results.folder)) for results in found]
    files[FIGURE_FILE] = _figure(records)
    files[CARD_FILE] = card_of(configs, shapes, records, place.repo, FIGURE_FILE, license).encode()
    return Parcel(place, files)


def check_push(parcel: Parcel, *, revision: str, private: bool) -> Head:
    """Ask the hub what the repository holds, and return the state that a push builds on.

    Raises:
        ValueError: Nobody is logged in, the repository is public although a private one was asked for, or it holds SAEs
            that are not in the parcel.
        ConnectionError: The hub does not answer.
    """
    head = look(parcel.place, revision)
    if private and not head.private:
        raise HubError(f"{parcel.place}: exists already and is public; make it private on its page, or push elsewhere")
    # The card describes the SAEs of one push only, so a repository holds one study.
    if others := sorted(set(_sae_folders(head.files)) - set(parcel.saes)):
        raise HubError(
            f"{parcel.place}: holds SAEs that are not in this push ({', '.join(others[:3])}); push the whole study, or "
            "push to another repository"
        )
    return head


def deliver(parcel: Parcel, head: Head, *, revision: str, private: bool) -> Sent:
    """Send a parcel in one commit.

    Args:
        parcel: The files.
        head: The state of the repository that `check_push` has seen. If somebody has committed since, nothing is sent.
        revision: The branch to commit to.
        private: Whether a new repository is private.

    Raises:
        ValueError: The hub refused.
        ConnectionError: The hub does not answer.
    """
    n = len(parcel.saes)
    message = f"{n} sparse autoencoder{'s' if n > 1 else ''}, by prolu"
    return send(parcel.place, head, parcel.files, message, revision=revision, private=private)


def push(folder: str | Path, repo: str, *, private: bool = False, revision: str = MAIN, license: str = "mit") -> Sent:
    """Send a study, or one run of it, to the Hugging Face hub in one commit.

    The repository then holds a folder per SAE, the results, the frontier's figure and a model card. The token is
    huggingface_hub's own (`hf auth login`, or HF_TOKEN). Files that the hub already has are not sent again.

    Args:
        folder: The folder of a study, of one run, or of the studies of a sweep at several hooks.
        repo: The repository, user/repo. It is created if it does not exist.
        private: Whether a new repository is private. An existing one must then be private too.
        revision: The branch. It is created from the main branch if it does not exist.
        license: The licence of what is sent, as the hub names licences.

    Raises:
        ValueError: There is nothing to push, or the hub refused.
        ConnectionError: The hub does not answer. Nothing is committed then.
    """
    parcel = pack(folder, repo, license=license)
    head = check_push(parcel, revision=revision, private=private)
    return deliver(parcel, head, revision=revision, private=private)


def pull(place: str, out: str | Path, *, revision: str = MAIN) -> list[str]:
    """Download a study, or one folder of it, from the Hugging Face hub, and return the folders of its SAEs.

    Every SAE is loaded before anything is written. The folder of an SAE that lies in `out` itself is "".

    Args:
        place: The repository or a folder in it: user/repo or user/repo/FOLDER.
        out: A new folder, which then holds the same files. A folder that already holds them is left as it is.
        revision: The branch, tag or commit.

    Raises:
        ValueError: There are no SAEs at that place, one cannot be loaded, or `out` holds something else.
        ConnectionError: The hub does not answer. Nothing is written then.
    """
    files = fetch_checked(place, revision)
    if not holds_same(files, Path(out)):
        unpack(files, Path(out))
    return _sae_folders(files)


def fetch_checked(place: str, revision: str) -> dict[str, Path]:
    """Download the files of a place into the hub's cache, load every SAE, and return the files by name.

    Raises:
        ValueError: There are no SAEs at that place, or one cannot be loaded.
        ConnectionError: The hub does not answer.
    """
    where = place_of(place)
    root = fetch(where, revision, [f"*{name}" for name in sorted(PULLED)])
    files = {str(f.relative_to(root)): f for f in sorted(root.rglob("*")) if f.name in PULLED and f.is_file()}
    for name in files:
        for part in Path(name).parts:
            plain_name(part, f"{where}: the name")
    if not _sae_folders(files):
        raise HubError(f"{where}: no SAEs there (no {WEIGHTS_FILE} at revision {revision!r})")
    try:
        for name in _sae_folders(files):
            SAE.load(root / name)
        for file in (f for f in files.values() if f.name == RESULTS_FILE):
            for run in Results.load(file.parent).runs:
                if not (run.folder / WEIGHTS_FILE).is_file():
                    raise ValueError(f"{file}: names the run {run.folder.name}, which is not there")
    except ValueError as problem:
        # The user named a place on the hub, so the message names it too, and not its path in the cache on this disk.
        raise HubError(f"{where}: {str(problem).replace(f'{root}/', '')}") from None
    return files


def holds_same(files: Mapping[str, Path], out: Path) -> bool:
    """Say whether a folder already holds these files, with the same bytes; it may hold others too.

    Raises:
        ValueError: It is not empty, and a file is missing or has other bytes.
    """
    check_can_be_folder(out)
    if not out.exists() or not any(out.iterdir()):
        return False
    for name, file in files.items():
        if not (out / name).is_file() or (out / name).read_bytes() != file.read_bytes():
            raise ValueError(f"out {str(out)!r}: holds something else ({name} differs); choose another folder")
    return True


def unpack(files: Mapping[str, Path], out: Path) -> None:
    """Copy files into a new folder, which afterwards is complete or does not exist."""
    partial = out.with_name(f".{out.name}.partial")
    remove(partial)
    try:
        for name, file in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            write_flushed(partial / name, file.read_bytes())
        rename_folder(partial, out)
    except OSError:
        remove(partial)
        raise


def _studies(folder: Path) -> list[Results]:
    """Return the studies in a folder: one, or one per hook. The folder of a run counts as its study with that run."""
    if (folder / WEIGHTS_FILE).is_file():
        # Links are not followed, because a run that is linked into a study is a run of that study.
        study = Results.load(folder.absolute().parent)
        records = [r for r in study.records if r["run_id"] == folder.absolute().name]
        if not records:
            raise ValueError(
                f"{folder}: an SAE without results; push a run that `prolu train` or `prolu sweep` finished"
            )
        return [replace(study, records=records)]
    if (folder / STUDY_FILE).is_file():
        return [Results.load(folder)]
    inside = sorted(file.parent for file in folder.glob(f"*/{RESULTS_FILE}"))
    # A sweep at several hooks names each study's folder after its hook. Other studies in one folder, as in runs/, need
    # not belong together.
    at_hooks = [place for place in inside if read_study(place)["stream"].get("hook") == place.name]
    if not at_hooks:
        raise ValueError(f"{folder}: neither a study with finished runs nor a run of one")
    return [Results.load(place) for place in at_hooks]


def _check_files(folder: Path) -> None:
    """Raise ValueError unless the files of a run are what their names say, wherever a link of that name may lead.

    The SAE has been loaded before. A link in a study from elsewhere could otherwise send any file of this machine.
    """
    read_curve(folder)
    read_documents_of(folder)
    if (folder / LATENTS_FILE).is_file():
        read_safetensors(folder / LATENTS_FILE)


def _public(file: Path) -> bytes:
    """Return one of our JSON files without paths of this machine."""
    return (json_text(_without_paths(read_json_object(file, "study or SAE")), indent=1) + "\n").encode()


def _without_paths(value: Any) -> Any:
    """Return a JSON value in which every absolute path is reduced to its last part."""
    match value:
        case dict():
            return {key: _without_paths(part) for key, part in value.items()}
        case list():
            return [_without_paths(part) for part in value]
        case str():
            kinds = (PurePosixPath, PureWindowsPath)  # a study may have been trained on another system
            return next((kind(value).name for kind in kinds if kind(value).is_absolute()), value)
    return value


def _figure(records: Sequence[Record]) -> bytes:
    # matplotlib, which `import prolu` must not wait for
    from prolu.evaluation.comparison.figures import draw_frontier, save_figure

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FIGURE_FILE
        save_figure(draw_frontier(records, "l0", main_metric(records)), file)
        return file.read_bytes()


def _sae_folders(names: Iterable[str]) -> list[str]:
    """Return the folders that hold an SAE among files with these names; "" if it lies beside the others."""
    return sorted(str(Path(name).parent) if "/" in name else "" for name in names if Path(name).name == WEIGHTS_FILE)
