"""Faults in what is built: other arguments than decided, wrappers that are gone, MLPs beside their slots."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from fse_patch.adapters.role import FusedRole
from fse_patch.fusion_core.decision.layout import ExpertLayout

from .plant import PLANTS, adapter, plant

Context = AbstractContextManager[Any]
MODELS = {"vllm": "vllm.model_executor.models", "sglang": "sglang.srt.models"}
FACTORY = {"vllm": "FusedMoEFactory", "sglang": "get_moe_impl_class"}
LOADERS = {
    "vllm": ("vllm.model_executor.model_loader", "base_loader.BaseModelLoader", "load_model"),
    "sglang": ("sglang.srt.model_loader", "loader.DefaultModelLoader", "load_weights_and_postprocess"),
}
QWEN = ("qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeForCausalLM")


def module(engine: str, name: str = QWEN[0]) -> Any:
    return importlib.import_module(f"{MODELS[engine]}.{name}")


def engine_passes(name: str, **changes: Any) -> Callable[[str], Context]:
    """The block ``name`` asks for its experts with other arguments, as another release or plugin makes it."""

    def context(engine: str) -> Context:
        home = module(engine, name)
        held = getattr(home, FACTORY[engine])

        def factory(*args: Any, **kwargs: Any) -> Any:
            if engine == "vllm":
                return held(*args, **{**kwargs, **changes})
            cls = held(*args, **kwargs)
            return lambda *a, **k: cls(*a, **{**k, **changes})

        return patch.object(home, FACTORY[engine], factory)

    return context


# Name of the fault: the block, and the arguments that it passes.
PASSED: dict[str, tuple[str, dict[str, Any]]] = {
    "engine_builds_another_top_k": ("qwen2_moe", {"top_k": 1}),
    "engine_builds_one_expert_less": ("qwen2_moe", {"num_experts": 7}),
    "engine_builds_another_width": ("qwen2_moe", {"intermediate_size": 64}),
    "engine_builds_another_activation": ("qwen2_moe", {"activation": "gelu"}),
    "engine_weighs_the_input": ("qwen2_moe", {"apply_router_weight_on_input": True}),
    "engine_builds_another_scale": ("glm4_moe", {"routed_scaling_factor": 1.0}),
    "engine_scores_otherwise": ("glm4_moe", {"scoring_func": "softmax"}),
    "engine_replicates_experts": ("qwen2_moe", {"num_redundant_experts": 2}),
    "engine_clamps": ("qwen2_moe", {"swiglu_limit": 7.0}),
    "engine_fuses_by_itself_too": ("qwen2_moe", {"num_fused_shared_experts": 1}),
    "engine_has_no_shared_expert": ("qwen2_moe", {"shared_experts": None}),
}
PLANTS |= {name: engine_passes(block, **changes) for name, (block, changes) in PASSED.items()}


@plant
def engine_renormalises(engine: str) -> Context:
    """vLLM passes it to its factory, SGLang to its top-k."""
    if engine == "vllm":
        return engine_passes("qwen2_moe", renormalize=True)(engine)
    return topk_passes("qwen2_moe", renormalize=True)


@plant
def engine_groups_otherwise(engine: str) -> Context:
    if engine == "vllm":
        return engine_passes("glm4_moe", topk_group=4)(engine)
    return topk_passes("glm4_moe", topk_group=4)


@plant
def engine_has_no_correction_bias(engine: str) -> Context:
    if engine == "vllm":
        return engine_passes("glm4_moe", e_score_correction_bias=None)(engine)
    return topk_passes("glm4_moe", correction_bias=None)


def topk_passes(name: str, **changes: Any) -> Context:
    home = module("sglang", name)
    honest = home.TopK
    return patch.object(home, "TopK", lambda *args, **kwargs: honest(*args, **{**kwargs, **changes}))


@plant
def wrapper_of_the_block_gone(engine: str) -> Context:
    """Another plugin has put the original constructor back."""
    cls = getattr(module(engine), QWEN[1])
    return patch.object(cls, "__init__", cls.__init__.__wrapped__)


@plant
def wrapper_of_the_factory_gone(engine: str) -> Context:
    home = module(engine)
    return patch.object(home, FACTORY[engine], getattr(home, FACTORY[engine]).__wrapped__)


@plant
def wrapper_of_load_weights_gone(engine: str) -> Context:
    """Built fused, and nobody writes the slots or looks at them."""
    cls = getattr(module(engine), QWEN[2])
    return patch.object(cls, "load_weights", cls.load_weights.__wrapped__)


@plant
def wrapper_of_the_canary_gone(engine: str) -> Context:
    """A loader that proves nothing: what was loaded runs first in the engine's warm-up."""
    package, name, method = LOADERS[engine]
    home, _, cls = name.partition(".")
    owner = getattr(importlib.import_module(f"{package}.{home}"), cls)
    held = vars(owner)[method]
    plain = getattr(held, "__func__", held).__wrapped__
    return patch.object(owner, method, type(held)(plain) if isinstance(held, staticmethod) else plain)


@plant
def layer_built_twice(_: str) -> Context:
    honest = FusedRole.add_layer

    def add(self: Any, layer: Any) -> None:
        honest(self, layer)
        honest(self, layer)

    return patch.object(FusedRole, "add_layer", add)


@plant
def layer_left_out(engine: str) -> Context:
    """A layer of those that were decided on is built as stock builds it."""
    cls = adapter(engine, "role").Slots
    honest = cls.layer_at

    def layer_at(self: Any, start: Any, place: Any) -> Any:
        number = honest(self, start, place)
        return None if number == 1 else number

    return patch.object(cls, "layer_at", layer_at)


@contextmanager
def layout(**changes: int) -> Any:
    """The decision has another layout than the model."""
    honest = FusedRole.__init__

    def init(self: Any, start: Any, *args: Any) -> None:
        changed = dataclasses.replace(start.moe.layout, **changes)
        moe = dataclasses.replace(start.moe, layout=changed)
        honest(self, dataclasses.replace(start, moe=moe), *args)

    with patch.object(FusedRole, "__init__", init):
        yield


@plant
def decided_on_one_expert_less(_: str) -> Context:
    return layout(num_routed=7)


@plant
def decided_on_one_expert_more(_: str) -> Context:
    return layout(num_routed=9)


@plant
def decided_on_another_width(_: str) -> Context:
    return layout(moe_intermediate_size=16)


@plant
def decided_on_two_slots(_: str) -> Context:
    """The shared expert is one slot wide, and split into two halves."""
    return layout(num_shared_slots=2)


@plant
def built_with_e_instead_of_e_and_s(_: str) -> Context:
    """No room for the slots."""
    return patch.object(ExpertLayout, "num_experts", property(lambda self: self.num_routed))


@plant
def shared_mlp_runs_too(engine: str) -> Context:
    """Double counting: the slots are there, and the MLP that they replace still adds its output."""
    cls = getattr(module(engine), QWEN[1])
    honest = cls.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        held: list[Any] = []
        plain = torch.nn.Module.__setattr__

        def keep(module_: Any, name: str, value: Any) -> None:
            if name == "shared_expert" and value is None:
                held.append(module_.shared_expert)
            plain(module_, name, value)

        with patch.object(torch.nn.Module, "__setattr__", keep):
            honest(self, *args, **kwargs)
        if held:
            w13, w2 = (torch.full_like(p, 0.01) for p in held[0].parameters() if p.shape[0] > 1)
            # Not a module: nothing loads it, as nothing loads what stock would run beside the slots.
            beside = self.forward

            def mlp(hidden: torch.Tensor) -> torch.Tensor:
                gate, up = (hidden @ w13.T).chunk(2, dim=-1)
                return (torch.nn.functional.silu(gate) * up) @ w2.T

            object.__setattr__(self, "forward", lambda hidden, *a, **k: beside(hidden, *a, **k) + mlp(hidden))

    return patch.object(cls, "__init__", init)


@plant
def hook_of_the_experts_gone(engine: str) -> Context:
    """The slots are loaded and no token is ever routed to them."""
    return patch.object(adapter(engine, "build"), "AppendHook", lambda appender: lambda *_: None)


@plant
def hook_of_the_experts_set_twice(engine: str) -> Context:
    build = adapter(engine, "build")
    honest = build.AppendHook

    def make(appender: Any) -> Any:
        hook = honest(appender)

        def twice(experts: Any, args: Any, kwargs: Any) -> Any:
            return hook(experts, *hook(experts, args, kwargs))

        return twice

    return patch.object(build, "AppendHook", make)


@plant
def topk_in_another_format(engine: str) -> Context:
    """A backend that routes by itself."""
    from sglang.srt.layers.moe import topk

    honest = topk.TopK.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = honest(self, *args, **kwargs)
        return topk.BypassedTopKOutput(
            args[0] if args else kwargs["hidden_states"], found.router_logits, self.topk_config
        )

    return patch.object(topk.TopK, "forward", forward)
