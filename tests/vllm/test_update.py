"""Weights that change while the engine runs, by vLLM's own `reload_weights`: what is answered then is what an
engine answers that was started on those weights, and what cannot be updated says so and changes nothing.

On a CPU, stock vLLM does not pack experts that it reloads, and its answers are wrong after it. So updates are
compared with fused engines that were started on the weights; those are compared with stock ones elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tiny_checkpoints

from ..running import asked
from .engine import IN_PROCESS, VOCAB
from .processes import in_process

RECIPES = ("qwen2_moe_wide4", "glm4_moe_scale")
Tensors = dict[str, Any]


def is_shared(name: str) -> bool:
    return ".shared_expert." in name or ".shared_experts." in name


def is_routed(name: str) -> bool:
    return ".experts." in name


class Engine:
    """One fused engine, and the log-probabilities that it gives to the same tokens every time."""

    def __init__(self, folder: Path, load_format: str = "auto") -> None:
        from vllm import LLM

        from fse_patch.lab.vllm.verify_arm import DEFAULTS

        self.llm = LLM(model=str(folder), dtype="float32", load_format=load_format, **DEFAULTS)

    def answers(self) -> list[list[float]]:
        from fse_patch.lab.vllm.verify_arm import score

        prompts = [[3 + (step * place) % (VOCAB - 3) for place in range(32)] for step in (5, 7, 11)]
        return score(self.llm, prompts, 1, batched=True)["logprobs"]

    def update(self, tensors: Tensors) -> str:
        """What vLLM's reload of these tensors says, in the form of a checkpoint's."""
        return self._error("reload_weights", {"weights_iterator": list(tensors.items())})

    def update_in_parts(self, *parts: Tensors) -> str:
        """As trainers send them: vLLM's weight transfer makes these calls, over NCCL or CUDA's IPC."""

        def update(worker: Any) -> None:
            from vllm.model_executor.model_loader import reload

            model = worker.model_runner.model
            reload.initialize_layerwise_reload(model)
            for part in parts:
                model.load_weights(part.items())
            reload.finalize_layerwise_reload(model, worker.model_config)

        return self._error(update)

    def update_from(self, folder: Path) -> str:
        return self._error("reload_weights", {"weights_path": str(folder)})

    def write(self, tensors: Tensors) -> str:
        """Into the parameters as they are, as many trainers do."""
        return self._error(lambda worker: worker.model_runner.model.load_weights(tensors.items()))

    def _error(self, method: Any, kwargs: dict[str, Any] | None = None) -> str:
        from fse_patch.errors import FsePatchError

        try:
            self.llm.collective_rpc(method, kwargs=kwargs)
        except FsePatchError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def close(self) -> None:
        from fse_patch.lab.vllm.verify_arm import shut_down

        shut_down(self.llm)


def started_on(folder: Path) -> list[list[float]]:
    engine = Engine(folder)
    try:
        return engine.answers()
    finally:
        engine.close()


def probe(folder: str, *recipes: str) -> dict[str, Any]:
    """Answers and errors after each update, of each recipe."""
    return {recipe: probe_recipe(recipe, Path(folder)) for recipe in recipes}


def probe_recipe(recipe: str, folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file, save_file

    old, new, mixed = (folder / recipe / name for name in ("old", "new", "mixed"))
    for seed, place in enumerate((old, new)):
        tiny_checkpoints.make(recipe, place, seed=seed)
    tensors = load_file(new / "model.safetensors")
    shared = {name: t for name, t in tensors.items() if is_shared(name)}
    routed = {name: t for name, t in tensors.items() if is_routed(name)}
    others = {name: t for name, t in tensors.items() if name not in shared and name not in routed}
    shutil.copytree(old, mixed)
    save_file(load_file(old / "model.safetensors") | shared, mixed / "model.safetensors", {"format": "pt"})
    found: dict[str, Any] = {"started on mixed": started_on(mixed), "started on new": started_on(new)}
    empty = Engine(old, load_format="dummy")
    try:
        found["into dummy weights"] = empty.update_in_parts(others, shared, routed)
        found["then"] = empty.answers()
    finally:
        empty.close()
    engine = Engine(old)
    try:
        return found | probe_updates(engine, old, new, shared, routed, others)
    finally:
        engine.close()


def probe_updates(
    engine: Engine, old: Path, new: Path, shared: Tensors, routed: Tensors, others: Tensors
) -> dict[str, Any]:
    import torch
    from torch.nn import Parameter
    from vllm.model_executor.model_loader.reload import layerwise

    from fse_patch.adapters.load import RoleLoader
    from fse_patch.adapters.role import constructed

    down = next(name for name in shared if name.endswith("down_proj.weight"))
    gate = down.replace("down_proj", "gate_proj")
    found: dict[str, Any] = {}

    def note(what: str, error: str = "") -> None:
        found[what] = {"error": error, "answers": engine.answers()}

    note("old")
    gates = {n: t for n, t in shared.items() if "gate_proj" in n}
    rest = {n: t for n, t in shared.items() if n not in gates and n != down}
    note("shared but one", engine.update_in_parts(gates, rest))
    note("that one", engine.update({down: shared[down]}))
    note("gate alone", engine.update({gate: shared[gate] * 2}))
    (fused_role,) = constructed()
    experts = next(iter(fused_role.layers.values())).experts
    experts.register_parameter("w2_scale", Parameter(torch.ones(()), requires_grad=False))
    note("packed together", engine.update({down: shared[down] * 2}))
    del experts.w2_scale
    note("written in place", engine.write({down: shared[down] * 2}))
    note("routed", engine.update(routed))
    note("others", engine.update(others))
    note("all old", engine.update_from(old))
    note("all new", engine.update_from(new))
    engine.update_from(old)
    with patch.object(RoleLoader, "_write", lambda self, part: None):
        note("without our writing", engine.update_from(new))
    engine.update_from(old)
    with patch.object(layerwise, "_layerwise_process", layerwise._layerwise_process.__wrapped__):
        note("without our reload", engine.update(shared))
    return found


@pytest.fixture(scope="module")
def updates(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("updates"))
    recipes = [recipe for recipe in RECIPES if recipe in asked(request)]
    # Four engines for each, one after the other.
    return dict(
        in_process(f"{__name__}:probe", folder, *recipes, timeout=600.0, FSE_PATCH="vllm", **IN_PROCESS)
    )


@pytest.fixture(params=[RECIPES[0], pytest.param(RECIPES[1], marks=pytest.mark.long)])
def seen(request: pytest.FixtureRequest, updates: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = updates[request.param]
    return found


def test_an_update_of_everything(seen: dict[str, Any]) -> None:
    assert seen["all new"] == {"error": "", "answers": seen["started on new"]}
    assert seen["all old"] == {"error": "", "answers": seen["old"]["answers"]}
    assert seen["all new"] != seen["all old"]


def test_an_engine_that_was_started_without_weights(seen: dict[str, Any]) -> None:
    assert seen["into dummy weights"] == ""
    assert seen["then"] == seen["started on new"]


def test_an_update_of_the_shared_expert_alone(seen: dict[str, Any]) -> None:
    """In two updates, of which the second is one tensor; the first sends gate and up in different parts."""
    assert seen["that one"] == {"error": "", "answers": seen["started on mixed"]}
    assert seen["shared but one"]["error"] == ""
    answers = [seen[what]["answers"] for what in ("old", "shared but one", "that one")]
    assert all(answers.count(each) == 1 for each in answers)


def test_an_update_of_the_routed_experts_alone(seen: dict[str, Any]) -> None:
    assert seen["routed"]["error"] == ""
    assert seen["routed"]["answers"] not in (seen["started on mixed"], seen["started on new"])
    # What neither expert is follows, and leaves nothing of the old weights.
    assert seen["others"] == {"error": "", "answers": seen["started on new"]}


def test_what_cannot_be_updated_says_so_and_changes_nothing(seen: dict[str, Any]) -> None:
    for what, words in {
        "gate alone": "was not updated: only a part of w13 of expert",
        "packed together": "was not updated: only some experts were sent",
        "written in place": "load_weights alone cannot update the shared expert",
    }.items():
        assert seen[what]["error"].startswith("FsePatchError: ")
        assert words in seen[what]["error"]
        assert seen[what]["answers"] == seen["that one"]["answers"]


def test_without_our_part_the_answers_are_wrong(seen: dict[str, Any]) -> None:
    """The control: each comparison above could have failed."""
    assert seen["without our writing"]["answers"] != seen["started on new"]
    assert seen["without our reload"]["answers"] != seen["started on mixed"]
