"""The adapter on vLLM's real configuration, model classes and loaders, without an engine around them:
what is refused before anything is built, and what stops a model that is not what was decided."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from .engine import Checkpoints
from .processes import in_process
from .test_inherited import building, load

ENTRY = "vllm.model_executor.models.qwen2_moe:Qwen2MoeForCausalLM"
# Code, attribute of the configuration, value. An attribute that a release lacks is an error of this test.
REFUSED: list[tuple[str, str, Any]] = [
    ("parallel.tp", "parallel_config.tensor_parallel_size", 3),
    ("parallel.eplb", "parallel_config.enable_eplb", True),
    ("parallel.dp", "parallel_config.data_parallel_size", 2),
    ("parallel.dp", "parallel_config.prefill_context_parallel_size", 2),
    ("lora", "lora_config", SimpleNamespace(target_modules=None)),
    ("memory.offload", "offload_config.uva.cpu_offload_gb", 1.0),
    ("memory.offload", "offload_config.prefetch.offload_group_size", 2),
    ("memory.sleep", "model_config.enable_sleep_mode", True),
    ("load.format", "load_config.load_format", "sharded_state"),
    ("load.format", "weight_transfer_config", SimpleNamespace(backend="sparse_nccl")),
    ("quant.online", "quant_config", "any"),
    ("quant.online", "model_config.quantization", "fp8"),
    ("config.differs", "model_config.hf_text_config.num_experts_per_tok", 1),
    ("config.differs", "model_config.hf_text_config.norm_topk_prob", True),
    ("config.differs", "model_config.hf_text_config.num_hidden_layers", 1),
    ("config.differs", "model_config.hf_text_config.mlp_only_layers", [0]),
    ("config.differs", "model_config.hf_text_config.decoder_sparse_step", 2),
    ("config.differs", "model_config.hf_text_config.shared_expert_intermediate_size", 64),
]
CAPTURE = ("aux_output_config.enable_return_routed_experts", "model_config.enable_return_routed_experts")

# How config.json says that constants stand in for some experts, and another thing that looks like it.
SUBSTITUTED: list[tuple[str, Any]] = [
    ("approximate_experts", {"0": [1]}),
    ("compression_config", {"transform_config": {"expert_substitution": {"0": [1]}}}),
    ("compression_config", {"transform_config": {}}),
]


@contextmanager
def put(config: Any, path: str, value: Any) -> Iterator[None]:
    """The configuration with one existing attribute changed."""
    *owners, name = path.split(".")
    for owner in owners:
        config = getattr(config, owner)
    old = getattr(config, name)
    object.__setattr__(config, name, value)
    try:
        yield
    finally:
        object.__setattr__(config, name, old)


def reason(config: Any) -> str:
    """The code of the decision for the entry class."""
    from fse_patch import runtime
    from fse_patch.adapters.start import Start
    from fse_patch.adapters.vllm.start import start_of

    runtime.clear()
    start = start_of(load(ENTRY), config)
    (recorded,) = runtime.decisions()
    assert isinstance(start, Start) == recorded["fuse"]
    return str(recorded["reason"])


def substituted(config: Any, name: str, value: Any) -> str:
    """The code for a config.json with one more key."""
    setattr(config.model_config.hf_config, name, value)
    try:
        return reason(config)
    finally:
        delattr(config.model_config.hf_config, name)


def quantised(config: Any, method: str | None) -> str:
    """The code for a checkpoint in FP8 that is run as ``method``."""
    from fse_patch.adapters.vllm import start

    made = start.decision_of

    def fp8(*args: Any) -> Any:
        outcome = made(*args)
        decision = dataclasses.replace(
            outcome.decision, quant_method="fp8", read_as="fp8", formats=("fp8-block",)
        )
        return dataclasses.replace(outcome, decision=decision)

    with (
        patch.object(start, "decision_of", fp8),
        patch.dict(os.environ, FSE_PATCH_ALLOW_UNPROVEN="1"),
        put(config, "model_config.quantization", method),
        put(config, "quant_config", "any"),
    ):
        return reason(config)


def probe_refusals(checkpoint: str) -> dict[str, Any]:
    from vllm.platforms import current_platform

    from fse_patch.adapters.vllm import spread

    with building(checkpoint) as config:
        found: dict[str, Any] = {"plain": reason(config)}
        for _, path, value in REFUSED:
            with put(config, path, value):
                found[path] = reason(config)
        with (
            put(config, "parallel_config.tensor_parallel_size", 2),
            put(config, "parallel_config.enable_expert_parallel", True),
        ):
            found["experts by rank"] = reason(config)
            with patch.object(spread, "LEAVE_OUT", {"cpu"}):
                found["experts by rank, left out"] = reason(config)
            with put(config, "parallel_config.data_parallel_size", 2):
                found["experts dispatched"] = reason(config)
        owners = {p: getattr(config, p.partition(".")[0], None) for p in CAPTURE}
        capture = next(p for p, owner in owners.items() if hasattr(owner, p.partition(".")[2]))
        with put(config, capture, True):
            found["capture"] = reason(config)
        with patch.dict(os.environ, VLLM_MOE_ROUTING_SIMULATION_STRATEGY="uniform_random"):
            found["simulator"] = reason(config)
        found["experts replaced by constants"] = [substituted(config, *way) for way in SUBSTITUTED]
        with patch.object(type(current_platform), "is_cpu", lambda self: False):
            found["other device"] = reason(config)
            with patch.dict(os.environ, FSE_PATCH_ALLOW_UNMEASURED="1"):
                found["other device, allowed"] = reason(config)
        for method in ("fp8", "fp8_per_tensor", "modelopt_fp4"):
            found[f"fp8 as {method}"] = quantised(config, method)
        with put(config, "model_config.model", f"{checkpoint}-is-not-there"):
            found["no such folder"] = reason(config)
        return found | {"plain again": reason(config)}


def attempt(action: Callable[[], object]) -> str:
    """What an action raises, as text, or "" if nothing."""
    from fse_patch.errors import FsePatchError

    try:
        action()
    except FsePatchError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def probe_model(checkpoint: str) -> dict[str, Any]:
    """Build and load the real model, rightly and wrongly."""
    import gc

    from safetensors.torch import load_file
    from vllm.plugins import load_general_plugins

    from fse_patch.adapters.role import ACTIVE, constructed

    load_general_plugins()
    tensors = list(load_file(f"{checkpoint}/model.safetensors").items())
    cls = load(ENTRY)

    def build(prefix: str = "") -> Any:
        # Layers register by name, once in a configuration.
        with building(checkpoint) as config:
            return cls(vllm_config=config, prefix=prefix)

    def built_otherwise() -> None:
        honest = load("vllm.model_executor.models.qwen2_moe:Qwen2MoeSparseMoeBlock").__init__

        def other(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            with put(config, "num_experts_per_tok", 1):
                honest(self, config, *args, **kwargs)

        with patch(f"{ENTRY.partition(':')[0]}.Qwen2MoeSparseMoeBlock.__init__", other):
            build()

    found, experts = probe_loads(build(), tensors)
    found |= {
        "filled otherwise": attempt(lambda: filled_otherwise(build()).load_weights(tensors)),
        "a part": hasattr(build("language_model"), "_fse_patch"),
        "built otherwise": attempt(built_otherwise),
        "left active": ACTIVE.get() is not None,
    }
    gc.collect()
    return found | {"kept": experts() is not None, "constructed": len(constructed())}


def filled_otherwise(model: Any) -> Any:
    """As a dummy loader leaves it, which loads nothing and lets the engine pack what it made up."""
    for layer in model._fse_patch.layers.values():
        for parameter in layer.experts.parameters():
            parameter.data.normal_()
    return model


def probe_loads(model: Any, tensors: list[tuple[str, Any]]) -> tuple[dict[str, Any], Any]:
    """What the audit says of loads, wrong ones first; and a weak reference to the experts."""
    import weakref

    fused_role, loader = model._fse_patch, model._fse_patch_loader
    experts = [layer.experts for layer in fused_role.layers.values()]
    shared = [item for item in tensors if ".shared_expert." in item[0]]
    slot = fused_role.layout.num_routed
    found: dict[str, Any] = {
        "poisoned": all(bool(e.w13_weight[slot:].isnan().all()) for e in experts),
        "shared MLP": [layer.mlp.shared_expert is not None for layer in model.model.layers],
        "one missing": attempt(lambda: model.load_weights(t for t in tensors if t[0] != shared[0][0])),
        "one twice": attempt(lambda: model.load_weights([*tensors, shared[0]])),
        "none read": attempt(lambda: loader.load(lambda stream: None, tensors)),
        "whole": attempt(lambda: model.load_weights(tensors)),
    }
    down = dict(tensors)["model.layers.0.mlp.shared_expert.down_proj.weight"]
    found["slot holds the weight"] = bool((experts[0].w2_weight[slot] == down).all())
    found["finite"] = all(bool(e.w13_weight[slot:].isfinite().all()) for e in experts)
    # An update may be partial: it is counted, not enforced.
    found["partial update"] = attempt(lambda: model.load_weights(shared[:1]))
    return found, weakref.ref(experts[0])


@pytest.fixture
def checkpoint(checkpoints: Checkpoints, tmp_path: Path) -> str:
    """A path of the test's own: its rendezvous file lies beside it."""
    path = tmp_path / "qwen2_moe"
    path.symlink_to(checkpoints.path("qwen2_moe"))
    return str(path)


def test_what_is_not_proven_is_refused_before_it_is_built(checkpoint: str) -> None:
    found = in_process(f"{__name__}:probe_refusals", checkpoint, FSE_PATCH="vllm")
    assert found["plain"] == found["plain again"] == "ok"
    assert {path: found[path] for _, path, _ in REFUSED} == {path: code for code, path, _ in REFUSED}
    # A CPU's kernels leave out nothing; where they did, it would fuse.
    assert found["experts by rank"] == "parallel.ep"
    assert found["experts by rank, left out"] == "ok"
    assert found["experts dispatched"] == "parallel.all2all"
    assert found["capture"] == "routing.capture"
    assert found["simulator"] == "routing.simulator"
    assert found["experts replaced by constants"] == ["backend.routing"] * 2 + ["ok"]
    assert found["other device"] == "slower.unmeasured"
    assert found["other device, allowed"] == "ok"
    assert found["fp8 as fp8"] == "ok"
    assert found["fp8 as fp8_per_tensor"] == found["fp8 as modelopt_fp4"] == "quant.online"
    assert found["no such folder"] == "evidence.unreadable"


def test_what_is_not_as_decided_is_not_served(checkpoint: str) -> None:
    found = in_process(f"{__name__}:probe_model", checkpoint, FSE_PATCH="vllm")
    assert found["poisoned"]
    assert found["shared MLP"] == [False, False]
    assert not found["a part"]
    assert "the engine does not build what was decided: top_k=1, expected 2" in found["built otherwise"]
    assert not found["left active"]
    assert found["one missing"].startswith("AuditError: main model: 1 shared slot tensors never written")
    assert "twice" in found["one twice"]
    assert "never written" in found["none read"]
    assert found["whole"] == ""
    assert found["slot holds the weight"]
    assert found["finite"]
    assert found["partial update"] == ""
    assert "load_weights alone cannot update" in found["filled otherwise"]
    assert not found["kept"]
    assert found["constructed"] == 0
