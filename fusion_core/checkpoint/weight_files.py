"""The one answer to "which files will this engine load here"."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ...errors import FsePatchError
from ..engines import EngineFacts, LoadFormat, facts_of
from ..reasons import Reason
from .headers import CheckpointHeaders, merge_headers
from .sources import CONFIG_NAME, Source

AUTO = "auto"
SAFETENSORS = ".safetensors"
# Endings of files that hold weights.
_WEIGHTS = (SAFETENSORS, ".bin", ".pt")
# Index of the files that a pattern matches, by how the pattern begins.
_INDEXES = {"consolidated": "consolidated.safetensors.index.json", "*": "model.safetensors.index.json"}


@dataclass(frozen=True)
class WeightFiles:
    """The files that an engine loads a checkpoint's weights from.

    Args:
        names: in the order of their names; empty where there are none. Of a load format that is not known,
            those that another would load.
        refusal: why the tensors of these files are not, or not surely, what is loaded; or None.
    """

    names: tuple[str, ...] = ()
    refusal: Reason | None = None


@dataclass(frozen=True)
class CheckpointFiles:
    """The files that a decision rests on, and a digest of their headers as they were then."""

    source: Source
    names: tuple[str, ...] = ()
    digest: str = ""


def weight_files(source: Source, engine: str, load_format: str = AUTO) -> WeightFiles:
    """Name the files of ``source`` that an engine loads, by what patches/ENGINE.yaml says of the load format.

    Raises:
        FsePatchError: the engine is unknown, an index is malformed, or a file that it names is missing.
    """
    facts = facts_of(engine)
    rule = facts.load_formats.get(load_format)
    if rule is None:
        return replace(weight_files(source, engine), refusal=_other_format(engine, load_format))
    there = source.names()
    for pattern in rule.patterns:
        # As a shell's: "*" does not stand for the dot of a hidden file.
        names = [name for name in there if not name.startswith(".") and fnmatchcase(name, pattern)]
        if names and not pattern.endswith(SAFETENSORS):
            return WeightFiles(tuple(sorted(names)), _no_headers(min(names), load_format))
        if names:
            return WeightFiles(tuple(sorted(_narrowed(source, names, pattern, rule, facts))))
    if source.is_remote:
        indexes = (index for index in _INDEXES.values() if index in source)
        listed = (file for index in indexes for file in sorted(_listed(source, index)))
        raise source.missing(next(listed, rule.patterns[0]), "it is to be loaded")
    if any(name.endswith(_WEIGHTS) for name in there):
        why = f"none of the files is one that the load format {load_format} reads: {', '.join(rule.patterns)}"
        return WeightFiles(refusal=Reason("load.format", why))
    return WeightFiles()


def read_headers(source: Source, files: WeightFiles) -> CheckpointHeaders:
    """Read the headers of the tensors that an engine loads; none where it loads no safetensors files.

    Raises:
        FsePatchError: a file is missing, truncated or malformed, or two files hold one name.
    """
    readable = [name for name in files.names if name.endswith(SAFETENSORS)]
    return merge_headers(source.headers(readable), source.where)


def _narrowed(
    source: Source, names: list[str], pattern: str, rule: LoadFormat, facts: EngineFacts
) -> set[str]:
    """Leave out what an index beside the files does not name, and add what the engine adds."""
    index = next(name for start, name in _INDEXES.items() if pattern.startswith(start))
    if index not in source or not (rule.by_index or source.is_remote):
        pairs = facts.dropped_beside.items()
        dropped = {old for old, new in pairs if len(names) == 2 and {old, new} == set(names)}
        return set(names) - dropped | _added(source, facts)
    listed = _listed(source, index)
    for name in sorted(listed - set(names)):
        raise source.missing(name, f"{index} names it")
    return listed | _added(source, facts)


def _listed(source: Source, index: str) -> set[str]:
    where = source.where(index)
    weight_map = source.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FsePatchError(f"{where}: has no 'weight_map' of tensor names to files; download it again")
    listed = set(map(str, weight_map.values()))
    for file in listed:
        # Engines look for shards beside the index only; anything else would leave the folder.
        if "/" in file or "\\" in file or not file.endswith(SAFETENSORS):
            raise FsePatchError(f"{where}: 'weight_map' names {file!r}, no safetensors file beside it")
    return listed


def _added(source: Source, facts: EngineFacts) -> set[str]:
    """Name files that the engine loads whatever an index says: it mends checkpoints of some classes so."""
    added = {file for file in facts.added_files if file in source}
    if not added:
        return set()
    config = source.read_json(CONFIG_NAME)
    classes = config.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else None
    return {
        file
        for file in added
        if first in facts.added_files[file].architectures and config.get(facts.added_files[file].where_key)
    }


def _no_headers(name: str, load_format: str) -> Reason:
    why = f"{name} holds no headers: what it stores is not known before it is loaded"
    if load_format == AUTO:
        return Reason("evidence.unreadable", f"{why}; convert the checkpoint to safetensors")
    return Reason("load.format", f"{why}; load safetensors files, with the load format {AUTO}")


def _other_format(engine: str, load_format: str) -> Reason:
    what = f"the load format of {engine} is {load_format}"
    return Reason("load.format", f"{what}, which does not pass tensors by their names; use {AUTO}")
