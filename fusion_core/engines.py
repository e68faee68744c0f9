"""Facts of each engine itself: the record at the head of patches/<engine>.yaml."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic import Field, model_validator

from ..errors import FsePatchError
from ..patches import ENGINES, FOLDER, Platform
from .data_file import Release, Specifier, Strict, Text, check, parse
from .reasons import Code


class ReleaseRow(Strict):
    """One release whose seams were reviewed, and where fusing was run in it.

    Args:
        cpu: by the test-suite, on a CPU.
        cuda: by hand, on GPUs of these names.
    """

    release: Release
    cpu: bool = False
    cuda: list[Text] = Field(default_factory=list)


class Plugins(Strict):
    """An engine's way to find plugins: a group of entry points, and a variable that allows some only.

    Args:
        pages: a group of plugins that add pages to its server; loaded only where the variable names them.
    """

    group: Text
    variable: Text
    pages: Text = ""


class TunedTables(Strict):
    """The place of an engine's tuned tables of its grouped GEMM.

    Args:
        folder: below its package.
        variable: names a folder of the user's.
        channel_scales: names of tables tell scales of channels from others.
    """

    folder: Text
    variable: Text
    channel_scales: bool = False


class CompileCache(Strict):
    """The place where an engine keeps what it compiled: a variable, and the folder that it is without it."""

    variable: Text
    folder: Text


class Lab(Strict):
    """Facts that measuring needs.

    Args:
        draft_argument: the engine argument that makes it build a draft.
        environment: of its processes, where the user has not said otherwise.
        compile_cache: None where two processes may write to it at once.
        apart_arguments: engine arguments of stock where its own fusion would be wrong for a checkpoint.
    """

    draft_argument: Text
    environment: dict[Text, str] = Field(default_factory=dict)
    compile_cache: CompileCache | None = None
    apart_arguments: dict[Text, bool] = Field(default_factory=dict)


class LoadFormat(Strict):
    """Files of a checkpoint that one load format reads.

    Args:
        patterns: the first that any file matches counts, the others do not.
        by_index: an index beside them narrows what is read from a folder.
    """

    patterns: Annotated[list[Text], Field(min_length=1)]
    by_index: bool = True


class AddedFile(Strict):
    """A file that is loaded whatever the index says, for a config whose first architecture is one of these.

    Args:
        where_key: key of config.json that must be there, and not 0.
    """

    architectures: list[Text]
    where_key: Text


class Ask(Strict):
    """Where one thing that a launch asks for stands: in a flag, in an environment variable, or in both.

    Args:
        flag: where the engine's parser puts the value of the flag.
        key: of the JSON object that is the flag's value; the first that is there counts.
        variable: an environment variable; the flag goes before it.
        default: where neither is given; its type is that of the value.
    """

    flag: Text = ""
    key: list[Text] = Field(default_factory=list)
    variable: Text = ""
    default: bool | int | str | None = None


class Refusal(Strict):
    """A value that a launch may ask for, and why nothing is fused then.

    Args:
        ask: its name. The row holds where the value is one of ``one_of``, none of ``none_of``, above
            ``above``, or where anything is ``given``.
        beside: it holds only where this other name is asked for too.
        layout: it forbids this one alone; None: both.
        detail: what is said; "{value}" stands for the value.
    """

    ask: Text
    one_of: list[bool | int | str] | None = None
    none_of: list[bool | int | str] | None = None
    above: int | None = None
    given: bool = False
    beside: Text | None = None
    layout: Literal["merged", "paired"] | None = None
    reason: Code = "disabled"
    detail: Text = "-"

    def holds(self, value: bool | int | str | None) -> bool:
        """Return whether a value is refused."""
        if self.one_of is not None:
            return value in self.one_of
        if self.none_of is not None:
            return value is not None and value not in self.none_of
        if self.above is not None:
            return isinstance(value, int) and value > self.above
        return value not in (None, "", False)


class DeviceBackend(Strict):
    """Devices, by words of their names, whose MoE backend is another one than that of their platform."""

    devices: Annotated[list[Text], Field(min_length=1)]
    backend: Text


class Bench(Strict):
    """The engine's own client that measures a server.

    Args:
        file: of it, below the engine's package.
        words: behind Python's name, with url, checkpoint, model, input, output, requests, streams, seed,
            folder and file in braces. It leaves one JSON object in the file.
        server: environment of the server that is measured.
    """

    file: Text
    words: Text
    server: dict[Text, Text] = Field(default_factory=dict)


class Launch(Strict):
    """How a server of the engine is launched, and what of that matters here.

    Args:
        commands: words of a shell command that end just before the server's own arguments.
        switched_on_by: those of them that need no FSE_PATCH.
        underscores: flags may be written with underscores.
        dotted: --flag.key VALUE is a key of the flag's JSON object.
        joined: letters that are followed by a value without a space -> the flag that they stand for.
        model: where its parser puts the model; the first that is given counts.
        bench: None where the engine has no client of its own.
        asks: what a launch can ask for, by a name of ours that both engines share.
        refuses: what forbids to fuse, in the order in which the engine is asked.
        native_declined: what makes the engine leave its own fusion out.
        native_wanted: what its own fusion needs where it is not on by default.
        native_backend: what tables call its own fusion, where modes of ours may stand beside it; or "".
        backends: first match counts.
        unread_backends: backends with experts in an order of their own, which no pass over them reads: how
            their names begin.
        amx_kernels: distributions with kernels of the engine for CPUs with AMX, which nobody has measured.
    """

    commands: Annotated[list[Text], Field(min_length=1)]
    switched_on_by: list[Text] = Field(default_factory=list)
    underscores: bool = False
    dotted: bool = False
    joined: dict[Text, Text] = Field(default_factory=dict)
    model: Annotated[list[Text], Field(min_length=1)]
    bench: Bench | None = None
    asks: dict[Text, Ask]
    refuses: list[Refusal]
    native_declined: list[Refusal] = Field(default_factory=list)
    native_wanted: list[Refusal] = Field(default_factory=list)
    native_backend: str = ""
    backends: list[DeviceBackend] = Field(default_factory=list)
    unread_backends: list[Text] = Field(default_factory=list)
    amx_kernels: list[Text] = Field(default_factory=list)

    @model_validator(mode="after")
    def _asked(self) -> Launch:
        for row in (*self.refuses, *self.native_declined, *self.native_wanted):
            if row.ask not in self.asks:
                raise ValueError(f"{row.ask!r} is none of the asks: {', '.join(self.asks)}")
        return self


class EngineFacts(Strict):
    """One engine.

    Args:
        engine: its name here.
        import_name: of its package.
        distributions: names under which it is installed; the first one that is there counts.
        releases: those whose seams were reviewed: every text that patches replace or rely on.
        read: releases whose source was read.
        backends: platform -> stock's MoE backend for unquantised weights, where it is known.
        leave_out: backends whose kernels leave out experts that are in other processes.
        load_formats: those whose loaders pass every tensor by its name, and the files that they read.
        dropped_beside: a file that is not loaded -> the one beside which it is not, where there is no index.
        added_files: files that are loaded whatever the index says.
        launch: None where its command line is not read.
    """

    engine: Text
    import_name: Text
    distributions: Annotated[list[Text], Field(min_length=1)]
    releases: list[ReleaseRow]
    read: Specifier
    backends: dict[Platform, Text]
    leave_out: list[Text] = Field(default_factory=list)
    plugins: Plugins
    tuned_tables: TunedTables
    lab: Lab
    load_formats: dict[Text, LoadFormat]
    dropped_beside: dict[Text, Text] = Field(default_factory=dict)
    added_files: dict[Text, AddedFile] = Field(default_factory=dict)
    launch: Launch | None = None

    @property
    def listed(self) -> tuple[str, ...]:
        """List the releases whose seams were reviewed."""
        return tuple(row.release for row in self.releases)

    @property
    def tested(self) -> tuple[str, ...]:
        """List the releases in which fusing was run."""
        return tuple(row.release for row in self.releases if row.cpu or row.cuda)

    def is_tested(self, version: Version) -> bool:
        """Return whether fusing was run in a release; local labels such as +cpu do not count."""
        return version.public in self.tested

    def standing(self, version: Version) -> str:
        """Say what a release is: "tested", "read" (its source was studied) or "untested"."""
        if self.is_tested(version):
            return "tested"
        read = SpecifierSet(self.read).contains(version.public, prereleases=True)
        return "read" if read else "untested"


def read_engine(path: Path) -> tuple[EngineFacts, dict[str, Any]]:
    """Read the file of an engine.

    Returns:
        Its facts, and the rest of the file as written: what is patched is not the core's business.

    Raises:
        FsePatchError: it is missing or malformed.
    """
    data = parse(path)
    rest = {}
    if isinstance(data, dict):
        rest = {key: data.pop(key) for key in set(data) - set(EngineFacts.model_fields)}
    return check(path, EngineFacts, data), rest


@cache
def facts_of(engine: str) -> EngineFacts:
    """Return the facts of an engine.

    Raises:
        FsePatchError: it is unknown.
    """
    if engine not in ENGINES:
        raise FsePatchError(f"unknown engine {engine!r}; use one of {', '.join(ENGINES)}")
    return read_engine(FOLDER / f"{engine}.yaml")[0]
