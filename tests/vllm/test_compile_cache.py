"""Compiled runs: every policy has its own entry in one cache folder, and no graph serves another's model.

As a module, the arm that runs them: each job names its policy, and says what the engine compiled or loaded.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from fse_patch.fusion_core.proof.compare import Tolerance, difference
from fse_patch.lab import verify
from fse_patch.lab.vllm import verify_arm

from .engine import Case, run

# Five starts of an engine that compiles; that a model is keyed at all is shown by test_inherited.py too.
pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
CASE = Case("qwen2_moe_wide4")
RULE = "{{id: {id}, when: {when}, fuse: false, reason: disabled, why: a test, source: 'none: a test'}}"
# The default policy; one with a rule more, which never matches; and one under which nothing fuses.
RULES = {
    "default": "",
    "other": RULE.format(id="never", when="{quant_methods: [never]}"),
    "refused": RULE.format(id="always", when="{}"),
}
COMPILED = {"num_aot_compiles": 1, "num_aot_artifacts_saved": 1}
LOADED = {"num_aot_artifacts_loaded": 1}
FLOAT32 = Tolerance.for_dtype("float32", difference([[0.0]], [[0.0]]))
honest_run = verify_arm.run_job


def graphs() -> dict[str, int]:
    """Compiled models on disk by the folder of their key, with the inode of each: a new file has another."""
    folder = Path(os.environ["VLLM_CACHE_ROOT"], "torch_compile_cache")
    return {
        graph.parents[1].name: graph.stat().st_ino for graph in folder.glob("torch_aot_compile/*/*/model")
    }


def loadable(original: Any) -> Any:
    """Let a CPU engine load what it has compiled, as engines on a GPU do.

    vLLM finishes what it loads by a method of its own GPU backend, does not find it on a plain inductor
    graph, and compiles anew: then no graph could ever be taken for another.
    """

    def load(*args: Any, **kwargs: Any) -> Any:
        loaded = original(*args, **kwargs)
        loaded._artifacts.compiled_fn.finalize_loading = lambda _: None
        return loaded

    return load


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from vllm.compilation.counter import compilation_counter

    from fse_patch.adapters.vllm import build

    keyed, policy = (job["engine_args"].pop(name) for name in ("keyed", "policy"))
    before = dataclasses.asdict(compilation_counter)
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {"FSE_PATCH_POLICY": policy}))
        load = torch.compiler.load_compiled_function
        stack.enter_context(patch.object(torch.compiler, "load_compiled_function", loadable(load)))
        if not keyed:
            stack.enter_context(patch.object(build, "key_compile_cache", lambda *_: None))
        try:
            result = honest_run(job)
        except Exception as error:
            result = {"failed": f"{type(error).__name__}: {error}"}
    after = dataclasses.asdict(compilation_counter)
    counts = {n: after[n] - before[n] for n in before if "aot" in n and after[n] != before[n]}
    return {**result, "graphs": graphs(), "counts": counts}


Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def compiled(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Three policies in one process, one of them again in another; last, a fused model without its key."""
    folder = tmp_path_factory.mktemp("compiled")
    # What vLLM knows of the model classes is kept: it costs time, and is not what is tested.
    known = Path(os.environ.get("VLLM_CACHE_ROOT", "~/.cache/vllm")).expanduser() / "modelinfos"
    if known.is_dir():
        shutil.copytree(known, folder / "modelinfos")
    plain = checkpoints.job(CASE)

    def job(policy: str, keyed: bool = True) -> verify.VerifyJob:
        path = folder / f"{policy}.yaml"
        path.write_text(f"version: 1\nrules: [{RULES[policy]}]\n")
        own = {"policy": str(path) if RULES[policy] else "", "keyed": keyed, "enforce_eager": False}
        return dataclasses.replace(plain, engine_args=own)

    env = {"VLLM_CACHE_ROOT": str(folder), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "ci")])}
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(verify, "ARM", __name__)
        first = run([job("refused"), job("default"), job("other")], True, env)
        again = run([job("default"), job("default", keyed=False)], True, env)
    names = ("refused", "default", "other", "default again", "default without key")
    return dict(zip(names, [*first, *again], strict=True))


def test_every_policy_has_its_own_entry(compiled: Results) -> None:
    for number, name in enumerate(("refused", "default", "other"), start=1):
        assert compiled[name]["counts"] == COMPILED
        assert len(compiled[name]["graphs"]) == number


def test_a_second_start_reuses_its_entry(compiled: Results) -> None:
    again = compiled["default again"]
    assert again["counts"] == LOADED
    assert again["graphs"] == compiled["other"]["graphs"]
    assert again["logprobs"] == compiled["default"]["logprobs"]


@pytest.mark.parametrize("case", [CASE], ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["refused", "default", "other", "default again"])
def test_compiled_equals_eager(runs: Any, compiled: Results, name: str, case: Case) -> None:
    eager = (runs.float32.stock if name == "refused" else runs.float32.fused)[case.name]
    result = compiled[name]
    built = [role["built_layers"] for role in result["workers"][0]["roles"]]
    assert built == ([] if name == "refused" else [[0, 1]])
    assert FLOAT32.holds(difference(result["logprobs"], eager["logprobs"]))
    # The control: one slot's weight off by 1 % would not pass.
    fault = runs.float32.fused[case.name]["control"]
    assert FLOAT32.caught(difference(result["logprobs"], fault))


def test_without_the_key_the_stock_graph_would_serve_the_fused_model(compiled: Results) -> None:
    without = compiled["default without key"]
    assert without["counts"] == LOADED
    assert without["graphs"] == compiled["other"]["graphs"]
    wrong = "failed" in without or not FLOAT32.holds(
        difference(without["logprobs"], compiled["default"]["logprobs"])
    )
    assert wrong, "the graphs of stock and fused are alike, and nothing here proves that the key matters"


if __name__ == "__main__":
    verify_arm.run_job = run_job
    verify_arm.main(Path(sys.argv[1]), Path(sys.argv[2]))
