"""What the tests of both engines run: cases, their checkpoints, and both arms of a comparison."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
import torch
from safetensors.torch import load_file, save_file

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.checkpoint.weight_files import AUTO
from fse_patch.fusion_core.decision.decide import decide_roles
from fse_patch.fusion_core.decision.outcome import Merged
from fse_patch.fusion_core.engines import facts_of
from fse_patch.lab import verify

from .laid_out import LAID_OUT, lay_out

VOCAB = 256
ROOT = Path(__file__).parent.parent
Results = dict[str, dict[str, Any]]
# Jobs, whether they are fused, environment: results in their order.
RunArm = Callable[[list[verify.VerifyJob], bool, dict[str, str]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Case:
    """One checkpoint in one engine configuration; ``order`` permutes its tensors over shards."""

    recipe: str
    dtype: str = "float32"
    engine_args: dict[str, Any] = field(default_factory=dict)
    order: str | None = None
    fault: str | None = None

    @property
    def name(self) -> str:
        return "-".join(filter(None, [self.recipe, self.dtype, self.order, self.fault]))

    @property
    def plain(self) -> Case:
        """What it is compared with: nothing permuted, no fault, one process."""
        return replace(self, order=None, fault=None, engine_args={})


def parameters(cases: Iterable[Case], each: Collection[str] = (), long: Collection[str] = ()) -> list[Any]:
    """Cases as parameters of a test; those in ``each`` and ``long``, by name or recipe, have these marks."""
    marks = {"every_release": set(each), "long": set(long)}
    return [
        pytest.param(
            case,
            id=case.name,
            marks=[getattr(pytest.mark, mark) for mark, of in marks.items() if of & {case.name, case.recipe}],
        )
        for case in cases
    ]


def asked(request: pytest.FixtureRequest) -> set[str]:
    """Names among the parameters of tests that will run and use this fixture; of a case, the plain one too.

    What takes many models through one process of an engine takes those that a test asks for, and no others.
    """
    names: set[str] = set()
    for item in request.session.items:
        if request.fixturename in getattr(item, "fixturenames", ()) and hasattr(item, "callspec"):
            for value in item.callspec.params.values():
                names |= {value.name, value.plain.name} if isinstance(value, Case) else {str(value)}
    return names


def timeless(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What the first process of an arm says of its roles, but for how long it took."""
    return [{**role, "canary": {**role["canary"], "seconds": 0}} for role in result["workers"][0]["roles"]]


class Checkpoints:
    """Makes each checkpoint once a session."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.folder = folder
        self.engine = engine

    def path(self, recipe: str, dtype: str = "float32", order: str | None = None, seed: int = 0) -> Path:
        plain = self.folder / f"{dtype}-{seed}" / recipe
        if not plain.exists() and recipe.startswith(LAID_OUT):
            source = tiny_checkpoints.make("qwen2_moe", plain, dtype, seed)
            other = self.path("qwen2_moe", dtype, seed=seed + 1)
            lay_out(source, other, int(recipe.removeprefix(LAID_OUT)))
        elif not plain.exists():
            tiny_checkpoints.make(recipe, plain, dtype, seed)
        if order is None:
            return plain
        permuted = plain.with_name(f"{recipe}-{order}")
        return permuted if permuted.exists() else tiny_checkpoints.permute(plain, permuted, order)

    def job(self, case: Case) -> verify.VerifyJob:
        """The case as `fse-patch verify` would run it."""
        folder = self.path(case.recipe, case.dtype, case.order)
        try:
            load_format = case.engine_args.get("load_format", AUTO)
            decisions = decide_roles(folder, self.engine, load_format=load_format)
        except FsePatchError:  # not to be read: the engine runs it unpatched
            decisions = {}
        drafts = facts_of(self.engine).lab.draft_argument in case.engine_args
        return verify.VerifyJob(
            folder,
            tuple(d for role, d in decisions.items() if isinstance(d, Merged) and (role == "main" or drafts)),
            VOCAB,
            case.dtype,
            case.engine_args if case.fault is None else {**case.engine_args, "fault": case.fault},
        )


def with_other_shared_dtype(source: Path, out: Path) -> Path:
    """A copy whose shared experts are stored as bfloat16: routed and shared specs differ."""
    out.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
            continue
        held = load_file(file)
        narrow = {k: v.to(torch.bfloat16) if ".shared_expert" in k else v for k, v in held.items()}
        save_file(narrow, out / file.name, {"format": "pt"})
    return out


def with_dense_layer(source: Path, out: Path) -> Path:
    """A copy whose first layer is dense by config.json, and has no experts in the checkpoint."""
    out.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "decoder_sparse_step": 2}))
    sparse = {n: t for n, t in load_file(source / "model.safetensors").items() if ".layers.0.mlp." not in n}
    save_file(sparse, out / "model.safetensors", {"format": "pt"})
    return out


@dataclass(frozen=True)
class Pair:
    """Results of both arms, by case name."""

    stock: Results
    fused: Results


class Runs:
    """Both arms of each batch, run side by side when a test first asks for them.

    Of the cases of a batch, those run whose names are ``asked`` for.
    """

    def __init__(self, checkpoints: Checkpoints, run: RunArm, asked: Collection[str]) -> None:
        self.checkpoints = checkpoints
        self.run = run
        self.asked = asked
        self.done: dict[str, Pair] = {}

    def arm(self, cases: list[Case], fused: bool, env: dict[str, str]) -> Results:
        """Results of one arm, by case name."""
        results = self.run([self.checkpoints.job(case) for case in cases], fused, env)
        return {case.name: result for case, result in zip(cases, results, strict=True)}

    def steps(self, case: Case, fused: bool, env: dict[str, str] | None = None) -> list[Any]:
        """What each step of a case gave; an arm that failed fails the test with its log."""
        (result,) = self.arm([case], fused, env or {}).values()
        assert "steps" in result, f"{result['error']}\n{result['log']}"
        found: list[Any] = result["steps"]
        return found

    def pair(self, name: str, stock: list[Case], fused: list[Case], env: dict[str, str]) -> Pair:
        """Both arms; a pair of that name is run once a session."""
        if name not in self.done:
            stock, fused = ([case for case in cases if case.name in self.asked] for cases in (stock, fused))
            for case in {case.name: case for case in (*stock, *fused)}.values():
                self.checkpoints.job(case)  # made here: both arms would write the same files
            # In opposite orders: vLLM inspects every new model class for ten seconds, and keeps what it found
            # for the other arm.
            with ThreadPoolExecutor() as pool:
                arms = [
                    pool.submit(self.arm, stock, False, env),
                    pool.submit(self.arm, fused[::-1], True, env),
                ]
            self.done[name] = Pair(*(arm.result() for arm in arms))
        return self.done[name]

    def report(self, case: Case, stock: dict[str, Any], fused: dict[str, Any]) -> dict[str, Any]:
        """The verdict of `verify` on two results of a case."""
        return verify.judge(self.checkpoints.job(case), stock, fused)
