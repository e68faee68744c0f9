"""Tuned tables: which mode was measured to be the fastest, by device, engine release, backend, dtype, shape.

Shipped ones lie in patches/tuned/; FSE_PATCH_TUNED names a file of the user's, as `fse-patch tune` writes it,
whose rows come first. patches/execution.yaml says where `split` can stand in for a measurement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from ...patches import FOLDER as DATA
from ..checkpoint.config import UNQUANTISED
from ..data_file import Strict, Text, check, parse
from ..decision.layout import ExpertLayout
from .mode_registry import MODES
from .plan import ModePlan, always

FOLDER = DATA / "tuned"
EXECUTION_FILE = DATA / "execution.yaml"
# Outcome of a lookup where the table says that nothing is as fast as stock.
SLOWER = "slower"


@dataclass(frozen=True)
class Situation:
    """Everything that a measurement depends on: another value of any of these is another measurement.

    Args:
        engine, release, backend: who runs the grouped GEMM; backend in the engine's word, lower case.
        device: the GPU's name, as its driver gives it.
        dtype: of hidden states, and of weights that are not quantised, as torch names it.
        scoring, gated: how the layer routes, and whether the shared expert has a sigmoid gate.
        quant: how the experts' weights are stored, with the size of blocks: "fp8-block 128x128"; or "none".
    """

    engine: str
    release: str
    backend: str
    device: str
    dtype: str
    num_routed: int
    num_shared_slots: int
    top_k: int
    hidden_size: int
    width: int
    scoring: str
    gated: bool
    quant: str = UNQUANTISED

    @classmethod
    def of(cls, layout: ExpertLayout, parts: int, **rest: Any) -> Situation:
        """Make it of a layer whose experts are cut in ``parts`` along their width."""
        return cls(
            num_routed=layout.num_routed,
            num_shared_slots=layout.num_shared_slots,
            top_k=layout.top_k,
            hidden_size=layout.hidden_size,
            width=layout.moe_intermediate_size // parts,
            **rest,
        )

    def __str__(self) -> str:
        quant = "" if self.quant == UNQUANTISED else f" with {self.quant}"
        return (
            f"{self.engine} {self.release} ({self.backend}) on {self.device}: {self.dtype}{quant}, "
            f"{self.scoring}{', gated' if self.gated else ''}, "
            f"E={self.num_routed}+{self.num_shared_slots}, k={self.top_k}, H={self.hidden_size}, "
            f"I={self.width}"
        )


Size = Annotated[int, Field(ge=1)]


def _choice(text: str) -> str:
    if text != SLOWER and text not in MODES:
        raise ValueError(f"{text!r} is none of {', '.join([*MODES, SLOWER])}")
    return text


Choice = Annotated[str, AfterValidator(_choice)]


class _Written(Strict):
    """A part of a tuned table, which users may have written by hand: 4.0 is read as 4."""

    model_config = ConfigDict(strict=False)


class Step(_Written):
    """A mode up to so many tokens; "slower" where none is as fast as stock."""

    up_to: Size
    mode: Choice


class Row(_Written):
    """One shape; ``gains`` as of `ModePlan`: tables of users may be without."""

    num_routed: Size
    num_shared_slots: Size
    top_k: Size
    hidden_size: Size
    width: Size
    dtype: Text
    scoring: Literal["softmax", "sigmoid"]
    gated: bool
    quant: Text = UNQUANTISED
    steps: list[Step]
    otherwise: Choice
    gains: dict[Size, float] = Field(default_factory=dict)

    @property
    def key(self) -> dict[str, Any]:
        """Return what a row is looked up by, beside the head of its table."""
        return self.model_dump(exclude={"steps", "otherwise", "gains"})

    @model_validator(mode="after")
    def _ascending(self) -> Row:
        limits = [step.up_to for step in self.steps]
        if limits != sorted(set(limits)):
            raise ValueError(f"limits {limits} are not in ascending order")
        return self


class Table(_Written):
    """One file: the rows of one device, release and backend; ``versions`` and ``measured`` say whence."""

    engine: Text
    release: Text
    backend: Text
    device: Text
    versions: dict[str, str]
    measured: Text
    rows: list[Row]


class Split(Strict):
    """A place where `split` runs stock's kernels on views of the fused weights."""

    engine: Text
    releases: list[Text]
    backend: Text
    platform: Literal["cuda", "rocm"]
    dtypes: list[Text]
    quants: list[Text] = Field(default_factory=lambda: [UNQUANTISED])
    # By name; None stands for every one of the platform.
    devices: list[Text] | None = None
    max_slots: Size
    why: Text


class _SplitPlaces(Strict):
    """The file patches/execution.yaml."""

    split: list[Split]


def read_table(path: Path) -> Table:
    """Read one table.

    Raises:
        FsePatchError: the file cannot be read or is none; file and field are named.
    """
    return check(path, Table, parse(path))


@cache
def shipped() -> tuple[tuple[str, Table], ...]:
    """Read the tables of this package: (file name, table)."""
    return tuple((path.name, read_table(path)) for path in sorted(FOLDER.glob("*.yaml")))


@cache
def split_places() -> tuple[Split, ...]:
    """Read the allow-list of `split`."""
    return tuple(check(EXECUTION_FILE, _SplitPlaces, parse(EXECUTION_FILE)).split)


def plan_for(
    situation: Situation,
    platform: str,
    user_table: Path | None = None,
    places: Iterable[Split] | None = None,
) -> ModePlan | Literal["slower"] | None:
    """Look up the measured plan; without a measurement `split` where that is stock; otherwise None.

    Args:
        user_table: a table of the user's, asked first.
        places: in place of the shipped allow-list.

    Returns:
        A plan, or "slower" where a table says that some number of tokens is slower in every mode.
    """
    first = [(str(user_table), read_table(user_table))] if user_table else []
    for name, table in (*first, *shipped()):
        for row in table.rows:
            if _holds(table, row, situation):
                return _plan(row, f"table {name}")
    if split_is_stock(situation, platform, places):
        return always("split", "no table; split is stock's kernels")
    return None


def split_is_stock(situation: Situation, platform: str, places: Iterable[Split] | None = None) -> bool:
    """Return whether `split` runs the kernels of stock there; ``places`` as of `plan_for`."""
    allowed = split_places() if places is None else places
    return any(_is_stock(place, situation, platform) for place in allowed)


def _holds(table: Table, row: Row, situation: Situation) -> bool:
    known = table.model_dump(include={"engine", "release", "backend", "device"})
    return known | row.key == asdict(situation)


def _plan(row: Row, source: str) -> ModePlan | Literal["slower"]:
    if SLOWER in (row.otherwise, *(step.mode for step in row.steps)):
        return "slower"
    steps = tuple((step.up_to, step.mode) for step in row.steps)
    return ModePlan(steps, row.otherwise, source, row.gains)


def _is_stock(place: Split, situation: Situation, platform: str) -> bool:
    return (
        place.engine == situation.engine
        and situation.release in place.releases
        and place.backend == situation.backend
        and place.platform == platform
        and situation.dtype in place.dtypes
        and situation.quant in place.quants
        and (place.devices is None or situation.device in place.devices)
        and situation.num_shared_slots <= place.max_slots
    )
