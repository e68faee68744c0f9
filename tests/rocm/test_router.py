"""What routes a fused layer on ROCm: AITER where it is right, else the reference; and always all columns."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fse_patch.errors import AuditError
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import MoeSpec, RoutingSpec
from fse_patch.fusion_core.forward import aiter_router
from fse_patch.fusion_core.forward import router as routing
from fse_patch.fusion_core.forward.aiter_router import AiterRouter, router_class, top_k_refusal
from fse_patch.fusion_core.forward.plan import ModeCounter
from fse_patch.fusion_core.forward.router import FusedRouter
from fse_patch.fusion_core.kernels.aiter_check import usable
from fse_patch.fusion_core.kernels.routing_reference import append_shared_slots

from ..core.moe import moe_spec
from ..fakes.aiter_profiles import PROFILES, UNUSABLE, Profile, installed

HIDDEN, TOKENS = 64, 7
GLM = RoutingSpec("sigmoid", True, 2.5, has_correction_bias=True)
# Layers of the families: layout, routing.
LAYERS = {
    "Qwen1.5-MoE": (ExpertLayout(60, 4, 4, HIDDEN, 128), RoutingSpec("softmax", False)),
    "Qwen3.5-35B": (ExpertLayout(256, 1, 8, HIDDEN, 128), RoutingSpec("softmax", True)),
    "Qwen3-Next": (ExpertLayout(512, 1, 10, HIDDEN, 128), RoutingSpec("softmax", True)),
    "GLM-4.7": (ExpertLayout(160, 1, 8, HIDDEN, 128), GLM),
    "GLM in groups": (
        ExpertLayout(160, 2, 8, HIDDEN, 128),
        RoutingSpec("sigmoid", True, 2.5, 4, 2, has_correction_bias=True),
    ),
}
ALL = {**PROFILES, **UNUSABLE}
Routed = tuple[torch.Tensor, torch.Tensor]


def moe_of(name: str) -> MoeSpec:
    layout, spec = LAYERS[name]
    glm = spec.scoring == "sigmoid"
    return moe_spec(layout, spec, "constant" if glm else "sigmoid_gate")


def build(name: str, cls: type[FusedRouter]) -> Callable[[torch.Tensor, torch.Tensor], Routed]:
    layout, spec = LAYERS[name]
    glm = spec.scoring == "sigmoid"
    bias = 0.01 * torch.randn(layout.num_routed, generator=torch.Generator().manual_seed(1))
    return cls(0, moe_of(name), ModeCounter(), None if glm else lambda x: x[:, :1], bias if glm else None)


def draw(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(TOKENS, HIDDEN, generator=generator),
        torch.randn(TOKENS, LAYERS[name][0].num_routed, generator=generator),
    )


def alike(one: Routed, other: Routed) -> bool:
    """The same experts with the same weights, in whatever order, and the slots in theirs."""
    dense = []
    for weights, ids in (one, other):
        out = torch.zeros(TOKENS, 1024, dtype=torch.float64)
        dense.append(out.scatter_add(1, ids.long(), weights.double()))
    return bool(torch.allclose(*dense, atol=1e-5))


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_routed_as_by_the_reference(profile: str, name: str) -> None:
    wanted = build(name, FusedRouter)(*draw(name))
    with installed(ALL[profile]):
        assert router_class() is AiterRouter
        found = build(name, router_class())(*draw(name))
    assert alike(found, wanted)
    assert [part.dtype for part in found] == [torch.float32, torch.int32]
    assert all(part.is_contiguous() for part in found)
    # All S columns, each time: upstream lost them where a buffer was not there (vllm-project/vllm#39280).
    layout = LAYERS[name][0]
    assert found[1][:, layout.top_k :].tolist() == [list(layout.shared_slots)] * TOKENS


def test_aiter_is_what_routes() -> None:
    """The control: with another AITER the same layers are routed otherwise."""
    with installed(PROFILES["newest"]):
        found = {name: build(name, AiterRouter)(*draw(name)) for name in LAYERS}
        caps = usable("cpu")

        def other(*args: Any) -> None:
            for out in args[:4]:
                if out.dtype == torch.int32:
                    out.zero_()

        broken = {"topk_softmax": other, "biased_grouped_topk": other}
        with patch.multiple(aiter_router, usable=lambda _: type(caps)(**{**vars(caps), **broken})):
            for name, right in found.items():
                assert not alike(build(name, AiterRouter)(*draw(name)), right)


def test_glms_scale_is_folded_once_and_the_slot_weighs_one() -> None:
    """sgl-project/sglang#28237 gave the slot 1/scale, vllm-project/vllm#44313 scaled the output again."""
    with installed(PROFILES["0.1.10"]):
        weights, _ = build("GLM-4.7", AiterRouter)(*draw("GLM-4.7"))
    assert torch.allclose(weights[:, :8].sum(-1), torch.full((TOKENS,), 2.5))
    assert weights[:, 8].tolist() == [1.0] * TOKENS


def test_layers_of_two_models_share_nothing() -> None:
    """A buffer for all layers held another layer's experts, or another's weight of the slot."""
    with installed(PROFILES["newest"]):
        routers = {name: build(name, AiterRouter) for name in LAYERS}
        first = {name: routers[name](*draw(name)) for name in LAYERS}
        kept = {name: tuple(part.clone() for part in found) for name, found in first.items()}
        for name in reversed(LAYERS):
            routers[name](*(2 * part for part in draw(name)))
        assert all(torch.equal(a, b) for n in LAYERS for a, b in zip(first[n], kept[n], strict=True))


def test_what_failed_its_check_is_not_called() -> None:
    def drops(profile: Profile, weights: torch.Tensor, ids: torch.Tensor, *_: Any) -> None:
        weights.fill_(0.25)
        ids.fill_(3)

    wanted = build("Qwen3-Next", FusedRouter)(*draw("Qwen3-Next"))
    with installed(Profile(faults={"topk_softmax": drops})):
        router = build("Qwen3-Next", AiterRouter)
        assert "topk_softmax is not to be used" in top_k_refusal(usable("cpu"), router)  # type: ignore[arg-type]
        assert alike(router(*draw("Qwen3-Next")), wanted)


def test_the_check_runs_where_the_layer_is_built() -> None:
    with installed(PROFILES["newest"]):
        assert usable.cache_info().misses == 0
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)  # as engines build
        try:
            router = build("Qwen3-Next", AiterRouter)
        finally:
            torch.set_default_dtype(before)
        assert usable.cache_info().misses == 1
        assert usable("cpu").topk_takes_shared
        router(*draw("Qwen3-Next"))
        assert usable.cache_info().misses == 1
    with installed(PROFILES["newest"], hip=None):
        assert router_class() is FusedRouter


@pytest.mark.parametrize("name", LAYERS)
def test_the_append_kernel_gets_what_the_reference_gets(name: str) -> None:
    """The kernel itself is tested where there is Triton."""
    stand_in = ModuleType("append")
    calls = []

    def append(weights: Any, ids: Any, slots: range, gate: Any, slot_weight: float, ranks: int) -> Routed:
        calls.append(slots)
        shared = slot_weight if gate is None else gate.to(weights.dtype).sigmoid() * slot_weight
        return append_shared_slots(weights, ids, slots, shared, ranks)

    stand_in.append = append  # type: ignore[attr-defined]
    wanted = build(name, FusedRouter)(*draw(name))
    with (
        installed(PROFILES["newest"]),
        patch.object(routing, "on_gpu", lambda _: True),
        patch.dict(sys.modules, {"fse_patch.fusion_core.kernels.append": stand_in}),
    ):
        router: Any = build(name, AiterRouter)
        assert alike(router(*draw(name)), wanted)
        assert len(calls) == 1
        assert router.counter.by_mode() == {"fused": 1}
        router.control_factor = 0.5
        assert not alike(router(*draw(name)), wanted)
        router.closed = "not proved yet"
        with pytest.raises(AuditError, match="not proved yet"):
            router(*draw(name))
