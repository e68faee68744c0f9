"""Blocks fuse below an entry class of the ledger and nowhere else: other models inherit them, and nobody
remaps the weights of those. The real block classes, on the configurations that they would fuse with."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fse_patch.adapters.patching.source import source_file

from .engine import Checkpoints
from .processes import in_process

MODELS = "vllm.model_executor.models"
QWEN4 = "vllm.models.qwen4_exp.nvidia.model:Qwen4ExpSparseMoeBlock"
# Inherited block, entry class of the family, checkpoint of the family, attribute of the shared MLP.
BLOCKS = {
    "glm4_moe_lite": (
        f"{MODELS}.glm4_moe_lite:Glm4MoeLite",
        f"{MODELS}.glm4_moe:Glm4MoeForCausalLM",
        "glm4_moe_scale",
        "shared_experts",
    ),
    "qwen4_exp": (QWEN4, f"{MODELS}.qwen3_next:Qwen3NextForCausalLM", "qwen3_next", "shared_expert"),
}


def load(reference: str) -> Any:
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


@contextmanager
def building(checkpoint: str, dtype: str = "float32") -> Iterator[Any]:
    """vLLM's own configuration of a checkpoint, current, as when a worker builds its model."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed import parallel_state as groups
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=checkpoint,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=256,
        skip_tokenizer_init=True,
    ).create_engine_config()
    with set_current_vllm_config(config):
        if not groups.model_parallel_is_initialized():
            init_distributed_environment(1, 0, f"file://{checkpoint}.rendezvous", 0, "gloo")
            initialize_model_parallel()
        yield config


def seen(block: Any, shared: str) -> dict[str, Any]:
    """Number of experts of a block's layer, and whether it owns its shared MLP, with weights."""
    weights = dict(block.named_parameters())
    return {
        "experts": next(w.shape[0] for name, w in weights.items() if name.endswith("w13_weight")),
        "shared_module": getattr(block, shared) is not None,
        "shared_weights": sum(name.startswith(f"{shared}.") for name in weights) > 0,
    }


def probe_block(reference: str, entry: str, checkpoint: str, shared: str) -> dict[str, Any]:
    """The block on its own, then below the decision for the entry class."""
    from vllm.plugins import load_general_plugins

    from fse_patch.adapters.role import ACTIVE, FusedRole
    from fse_patch.adapters.start import Start
    from fse_patch.adapters.vllm.role import Slots
    from fse_patch.adapters.vllm.start import start_of

    load_general_plugins()
    with building(checkpoint) as config:
        cls = load(reference)

        def build(layer: int) -> dict[str, Any]:
            prefix = f"model.layers.{layer}.mlp"
            if entry.endswith("Glm4MoeForCausalLM"):
                return seen(cls(config=config.model_config.hf_config, prefix=prefix), shared)
            return seen(cls(vllm_config=config, prefix=prefix), shared)

        start = start_of(load(entry), config)
        assert isinstance(start, Start)
        fused_role = FusedRole(start, Slots())
        # Two layers that would both fuse: vLLM wants every layer's name but once.
        first, *_, last = start.moe.layers
        stock = build(first)
        token = ACTIVE.set(fused_role)
        fused = build(last)
        ACTIVE.reset(token)
        layout = fused_role.layout
        return {"stock": stock, "fused": fused, "routed": layout.num_routed, "slots": layout.num_experts}


def probe_subclass(checkpoint: str) -> dict[str, Any]:
    """A model of another name that inherits everything from an entry class, and that class itself."""
    from vllm.plugins import load_general_plugins

    from fse_patch.adapters.start import Start
    from fse_patch.adapters.vllm.start import start_of

    load_general_plugins()
    entry = load(f"{MODELS}.qwen3_next:Qwen3NextForCausalLM")

    class Sub(entry):  # type: ignore[valid-type, misc]
        pass

    def build(cls: type) -> dict[str, Any]:
        with building(checkpoint) as config:
            decided = isinstance(start_of(cls, config), Start)
            additional = dict(config.additional_config)
            model = cls(vllm_config=config)
        block = model.model.layers[0].mlp
        return {
            **seen(block, "shared_expert"),
            "decided": decided,
            "marked": hasattr(model, "_fse_patch"),
            "keyed": config.additional_config != additional,
        }

    return {"sub": build(Sub), "entry": build(entry)}


@pytest.fixture
def make(checkpoints: Checkpoints, tmp_path: Path) -> Callable[[str], str]:
    """A checkpoint under a path of the test's own: its rendezvous file lies beside it."""

    def link(recipe: str) -> str:
        path = tmp_path / recipe
        path.symlink_to(checkpoints.path(recipe))
        return str(path)

    return link


@pytest.mark.parametrize("name", BLOCKS)
def test_an_inherited_block_stays_stock(make: Callable[[str], str], name: str) -> None:
    reference, entry, recipe, shared = BLOCKS[name]
    if source_file(reference.partition(":")[0]) is None:
        pytest.skip("this release has no such model")
    found = in_process(f"{__name__}:probe_block", reference, entry, make(recipe), shared, FSE_PATCH="vllm")
    routed, slots = found["routed"], found["slots"]
    assert found["stock"] == {"experts": routed, "shared_module": True, "shared_weights": True}
    # The control: the same class does fuse where an entry class is being built.
    assert found["fused"] == {"experts": slots, "shared_module": False, "shared_weights": False}
    assert slots > routed


def test_a_subclass_of_an_entry_class_stays_stock(make: Callable[[str], str]) -> None:
    found = in_process(f"{__name__}:probe_subclass", make("qwen3_next"), FSE_PATCH="vllm")
    stock = {"shared_module": True, "shared_weights": True, "decided": False, "marked": False, "keyed": False}
    sub, entry = found["sub"], found["entry"]
    assert sub == {"experts": sub["experts"], **stock}
    assert entry == {"experts": sub["experts"] + 1, **{name: not value for name, value in stock.items()}}
