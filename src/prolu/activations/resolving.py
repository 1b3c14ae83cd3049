"""What a source of rows is: files, a folder, a dataset on the hub, texts or an object; its name, and its splits."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prolu.activations.arrow_files import ArrowFile, DatasetObject
from prolu.activations.repository_files import NOT_FOUND, splits_of_repository
from prolu.activations.shards import Shard, ending_of
from prolu.activations.text_files import FILE_FORMATS, StandardLibrary, Texts, open_file
from prolu.runtime.files import first_line


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
        check_is_there(source)
        return splits_of_repository(source, config)
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
