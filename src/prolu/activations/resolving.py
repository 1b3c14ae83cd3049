"""Where the rows of a split lie: splits and configurations of a source, resolved as the datasets library does it."""

import logging
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prolu.activations.arrow_files import ArrowFile, DatasetObject
from prolu.activations.shards import Shard, ending_of
from prolu.activations.text_files import FILE_FORMATS, StandardLibrary, Texts, open_file
from prolu.runtime.files import first_line

logger = logging.getLogger(__name__)

TABLES = {*FILE_FORMATS, ".csv", ".tsv"}
"""The endings from which the format of a split is chosen. Text tables such as CSV are listed so that a licence file
beside them is not taken for the data, although they cannot be read here."""

PREFERRED = (".json", ".jsonl", ".arrow", ".parquet")
"""The order of preference for endings with equally many files, the most preferred last, as in `datasets`."""

ABOUT_THE_DATA = ("license", "licence", "copying", "notice", "readme", "changelog", "citation")
"""The first words of the names of text files that describe data, such as a licence. They are data only if a card lists
them."""

CLEARLY_LARGER = 10
"""A format with fewer files than another one is chosen if its files are this many times as large as all others
together."""

NOT_DATA = {"dataset_info.json", "state.json", "dataset_dict.json"}
"""The names of files that `datasets` writes beside the rows."""

NOT_FOUND = "neither a file, a folder, 'builtin', nor a dataset that the hub provides"
"""What is wrong with a name under which there is nothing."""


def shards_of(source: Any, config: str, split: str) -> Sequence[Shard]:
    """Return the shards of a split of a source.

    Args:
        source: As `load_blocks` takes it.
        config: The name of a configuration, where a repository has several.
        split: The name of a split, without a slice.

    Raises:
        ValueError: There is no such source, configuration or split; the sentence lists those that there are.
    """
    name = name_of(source)
    splits = _splits_of(source, config)
    if split not in splits:
        raise ValueError(f"split {split!r}: {name} has {', '.join(map(str, splits))}")
    return splits[split]


def plain_source(source: Any) -> Any:
    """Return a source in the form that the other functions here take: paths as str, a list of texts as a dataset.

    Raises:
        ValueError: It is a list that holds neither files nor texts only.
    """
    if isinstance(source, Path):
        return str(source)
    if not isinstance(source, list | tuple):
        return source
    if not source or not all(isinstance(item, str | Path) for item in source):
        raise ValueError(f"data: a {type(source).__name__} of neither files nor texts; pass either, and at least one")
    items = [str(item) for item in source]
    missing = [item for item in items if not os.path.isfile(item)]
    # A wrong name of a file must not become a short text; a text may happen to be the name of a file.
    if any(isinstance(item, Path) for item in source) or all(map(_looks_like_a_file, missing)):
        _check_files(items)
        return [absolute_path(item) for item in items]
    return Texts(items)


def _check_files(files: Sequence[str]) -> None:
    """Raise ValueError unless there are files by all these names."""
    if not files:
        raise ValueError("data: name at least one file")
    for file in files:
        if not os.path.isfile(file):
            known = f"a folder {file!r}" if os.path.isdir(file) else f"no file {file!r}"
            raise ValueError(f"data: {known}, in a list of files; name files only, or one folder or dataset by itself")


def _looks_like_a_file(text: str) -> bool:
    return ending_of(text) in FILE_FORMATS and not re.search(r"\s", text)


def check_is_there(source: Any) -> None:
    """Raise ValueError if a name can only be that of a file or folder on this machine, and there is none.

    This check is fast, so it is made before a language model is opened and before the hub is asked, which takes half a
    minute without a network.
    """
    if isinstance(source, list):
        _check_files(source)
        return
    if not isinstance(source, str) or os.path.exists(source):
        return
    # A name like user/repo may be a dataset on the hub, whatever its ending.
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_path or ("/" not in source and _looks_like_a_file(source)):
        raise ValueError(f"data {source!r}: {NOT_FOUND} (no such file or folder)")


def name_of(source: Any) -> Any:
    """Return what names a source of rows: names and paths themselves, or the kind and fingerprint of an object."""
    if isinstance(source, str | list):
        return source
    if isinstance(source, Texts):
        return source.file
    kind = f"datasets.{type(source).__name__}"
    return f"{kind} {source._fingerprint}" if hasattr(source, "_fingerprint") else kind


def absolute_paths(source: Any) -> Any:
    """Return the name of a source, with absolute paths of files and folders that are there."""
    return [absolute_path(file) for file in source] if isinstance(source, list) else absolute_path(source)


def absolute_path(name: str) -> str:
    """Return the absolute path of a file or folder that is there; any other name (of the hub ...) stays as it is.

    Links are not followed: a file of the hub's cache has its ending in the name of the link only.
    """
    there = name != "builtin" and os.path.exists(name)
    return str(Path(name).absolute()) if there else name


def _splits_of(source: Any, config: str) -> Mapping[str, Sequence[Shard]]:
    if source == "":
        # `Path("")` is the working directory, whose files nobody has asked for.
        raise ValueError("data '': must be a file, a folder, a dataset on the hub, or 'builtin'")
    if isinstance(source, list):
        splits = {"train": [open_file(file) for file in source]}
    elif isinstance(source, Texts):
        splits = {"train": [source]}
    elif not isinstance(source, str):
        splits = _splits_of_object(source)
    elif source == "builtin":
        splits = {"train": [StandardLibrary(source)]}
    elif os.path.isfile(source):  # also for a name that is too long for a file
        splits = {"train": [open_file(source)]}
    elif _is_saved_dataset(Path(source)):
        splits = _splits_of_saved_dataset(source)
    else:
        return _splits_of_repository(source, config)
    if config:
        raise ValueError(f"data_config {config!r}: {name_of(source)} has no configurations; leave it out")
    return splits


def _splits_of_object(source: Any) -> dict[str, list[Shard]]:
    """Return the splits of an object of the `datasets` library; an object without splits is `train`."""
    from datasets import Dataset, IterableDataset

    splits = source if isinstance(source, dict) else {"train": source}
    if not splits or not all(isinstance(dataset, Dataset | IterableDataset) for dataset in splits.values()):
        raise ValueError(
            f"data: a {type(source).__name__}; pass a name, a path, a list of files or texts, or a dataset"
        )
    return {split: [DatasetObject(name_of(dataset), dataset)] for split, dataset in splits.items()}


def _is_saved_dataset(folder: Path) -> bool:
    """Return whether `save_to_disk` of a Dataset or a DatasetDict wrote this folder."""
    alone = ("state.json", "dataset_info.json")
    return os.path.isfile(folder / "dataset_dict.json") or all(os.path.isfile(folder / name) for name in alone)


def _splits_of_saved_dataset(source: str) -> dict[str, list[Shard]]:
    """Return the Arrow files of each split; a Dataset that was saved alone is `train`."""
    from datasets import load_from_disk

    try:
        saved = load_from_disk(source, keep_in_memory=False)
        splits = saved if isinstance(saved, dict) else {"train": saved}
        files = {str(split): [file["filename"] for file in dataset.cache_files] for split, dataset in splits.items()}
    except Exception as problem:  # whatever is damaged has an error of its own there
        raise ValueError(f"data {source!r}: not a readable folder of a saved dataset ({first_line(problem)})") from None
    return {split: [ArrowFile(file) for file in named] for split, named in files.items()}


def _splits_of_repository(source: str, config: str) -> dict[str, list[Shard]]:
    """Return the splits of a folder of files, of a cloned repository, or of a dataset on the hub."""
    check_is_there(source)
    folder = Path(source)
    card = _configs_of_card(folder) if os.path.isdir(source) else None
    if card == []:  # a folder without a card: its files tell the splits
        if config not in ("", "default"):
            raise ValueError(f"data_config {config!r}: {source} has no configurations; leave it out")
        found = _files_by_pattern(folder)
    else:
        found = _declared_files(source, config)
    splits = {}
    for split, files in found.items():
        if kept := _of_one_kind(source, str(split), [str(file) for file in files], is_declared=bool(card)):
            splits[str(split)] = [open_file(file) for file in kept]
    if not splits:
        raise ValueError(f"data {source!r}: no file of a known kind; known: {', '.join(FILE_FORMATS)}")
    return splits


def _files_by_pattern(folder: Path) -> Mapping[Any, Iterable[Any]]:
    """Return the files of a folder by split.

    Names such as train-00000.parquet or test/a.jsonl tell the split, as they do on the hub; other files are `train`.
    """
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        return DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    except (EmptyDatasetError, FileNotFoundError):
        return {}


def _configs_of_card(folder: Path) -> list[Any]:
    """Return the configurations that a folder's card (README.md) declares; none if there is no card.

    Raises:
        ValueError: the card cannot be read, or names files outside the folder.
    """
    import yaml
    from huggingface_hub import metadata_load

    configs = []
    try:
        if (folder / "README.md").is_file():
            configs = (metadata_load(folder / "README.md") or {}).get("configs") or []
        if (folder / ".huggingface.yaml").is_file():  # takes the place of the card's own
            own = yaml.safe_load((folder / ".huggingface.yaml").read_text(encoding="utf-8")) or {}
            configs = own.get("configs") or configs
    except (OSError, ValueError, AttributeError, TypeError, RecursionError, yaml.YAMLError) as problem:
        raise ValueError(f"data {str(folder)!r}: its card cannot be read ({first_line(problem)})") from None
    if not isinstance(configs, list):
        raise ValueError(f"data {str(folder)!r}: 'configs' in its card is no list")
    for pattern in _texts_in(configs):
        # A card from an unknown author must not make this machine download anything, or read files outside the folder.
        if "://" in pattern or "::" in pattern or os.path.isabs(pattern) or ".." in Path(pattern).parts:
            raise ValueError(f"data {str(folder)!r}: its card names {pattern!r}, which is not in the folder")
    return configs


def _texts_in(value: Any) -> Iterable[str]:
    """Return all texts in nested lists and objects; an object that occurs several times is visited once."""
    texts = []
    seen: set[int] = set()
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            texts.append(one)
        elif isinstance(one, list | dict) and id(one) not in seen:
            seen.add(id(one))
            todo += one.values() if isinstance(one, dict) else one
    return texts


def _declared_files(source: str, config: str) -> Mapping[Any, Iterable[Any]]:
    """Return the files of a configuration by split, as a repository declares them, here or on the hub."""
    from datasets import get_dataset_config_names, get_dataset_default_config_name, load_dataset_builder

    is_folder = os.path.isdir(source)
    # An absolute path: a folder called `text` or `json` would be taken for a format of that name.
    place = str(Path(source).absolute()) if is_folder else source
    if is_folder and (Path(place) / f"{Path(place).name}.py").exists():
        raise ValueError(f"data {source!r}: a dataset with a script, and scripts are not run; pass its files")
    try:
        names = get_dataset_config_names(place)
        chosen = config or get_dataset_default_config_name(place) or ""
        if chosen in names:
            # Nothing is kept: `datasets` makes a folder in its cache, which may not be writable.
            with tempfile.TemporaryDirectory() as cache:
                return dict(load_dataset_builder(place, chosen, cache_dir=cache).config.data_files or {})  # pyright: ignore[reportArgumentType, reportCallIssue]
    except Exception as problem:  # the hub client raises many kinds; each means that the dataset cannot be had
        reason = first_line(problem)
        what = "its card cannot be resolved" if is_folder else NOT_FOUND
        raise ValueError(f"data {source!r}: {what} ({reason})") from None
    listed = ", ".join(names)
    if config:
        raise ValueError(f"data_config {config!r}: {source} has {listed}")
    raise ValueError(f"data_config: {source} has several configurations; name one of {listed}")


def _of_one_kind(source: str, split: str, files: Sequence[str], *, is_declared: bool) -> list[str]:
    """Return the files of a split that are of its format, in the order of their names; the rest is named in a warning.

    The format is that of most files, as in `datasets`, or one that holds nearly all bytes.

    Raises:
        ValueError: The files of another format are larger, so that the format cannot be told.
    """
    files = sorted(file for file in files if Path(file).name not in NOT_DATA)
    tables = [file for file in files if ending_of(file) in TABLES]
    about = [] if is_declared else [file for file in tables if _is_about_the_data(file)]
    data = [file for file in tables if file not in about] or tables
    if not data:
        return []
    by_ending = {ending: [f for f in data if ending_of(f) == ending] for ending in {ending_of(f) for f in data}}
    sizes = {ending: _bytes_of(named) for ending, named in by_ending.items()}
    chosen = max(by_ending, key=lambda e: (len(by_ending[e]), PREFERRED.index(e) if e in PREFERRED else -1, e))
    largest = max(sizes, key=lambda e: (sizes[e], e == chosen))
    if sizes[largest] >= CLEARLY_LARGER * (sum(sizes.values()) - sizes[largest]):
        chosen = largest  # one large table is the data, and not the two small files beside it
    if chosen not in FILE_FORMATS or chosen != largest:
        found = ", ".join(f"{len(by_ending[e])} {e} ({sizes[e]:,} bytes)" for e in sorted(sizes))
        raise ValueError(
            f"data {source!r}, split {split}: files of several formats or of none that is known ({found}); pass one "
            f"file or a folder of one format; known: {', '.join(FILE_FORMATS)}"
        )
    kept = by_ending[chosen]
    if others := [
        os.path.relpath(file, source) if Path(file).exists() else file for file in tables if file not in kept
    ]:
        logger.warning(
            "data %s, split %s: %d %s files are read, and not %s", source, split, len(kept), chosen, ", ".join(others)
        )
    return kept


def _is_about_the_data(file: str) -> bool:
    return ending_of(file) == ".txt" and Path(file).name.lower().startswith(ABOUT_THE_DATA)


def _bytes_of(files: Iterable[str]) -> int:
    """Return the size of local files together; of files on the hub, 0."""
    return sum(Path(file).stat().st_size for file in files if Path(file).is_file())
