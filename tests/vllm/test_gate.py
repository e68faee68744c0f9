"""The gate of an unfused shared expert, on vLLM's real MLP classes and their real weights' shapes."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest

from .engine import Checkpoints
from .processes import in_process
from .test_inherited import building

MLPS = ("qwen2_moe:Qwen2MoeMLP", "qwen3_moe:Qwen3MoeMLP")


def probe(checkpoint: str) -> dict[str, Any]:
    """What each class gives."""
    return {reference: probe_class(reference, checkpoint) for reference in MLPS}


def probe_class(reference: str, checkpoint: str) -> dict[str, Any]:
    """The class's output: stock, patched where the kernel is not for it, patched with the kernel, control."""
    import torch
    from vllm.model_executor.layers.linear import ReplicatedLinear
    from vllm.plugins import load_general_plugins

    from fse_patch.adapters.vllm import shared_gate

    load_general_plugins()
    module, name = reference.split(":")
    cls = getattr(__import__(f"vllm.model_executor.models.{module}", fromlist=[name]), name)
    calls = []

    def kernel(factor: float) -> ModuleType:
        """Triton is not here: the same in torch."""
        made = ModuleType("gated_mlp")

        def gated_mlp(x: Any, weight: Any, y: Any) -> Any:
            calls.append(x.shape)
            return ((x.double() @ weight.double().T).sigmoid() * y.double() * factor).to(y.dtype)

        made.gated_mlp = gated_mlp  # type: ignore[attr-defined]
        return made

    with building(checkpoint), torch.no_grad():
        linear = ReplicatedLinear(64, 1, bias=False, prefix="gate")
        mlp = cls(64, 32, "silu", expert_gate=linear, prefix="mlp")
        plain = cls(64, 32, "silu", prefix="plain")
        draw = torch.Generator().manual_seed(0)
        for parameter in (*mlp.parameters(), *plain.parameters()):
            parameter.normal_(0, 0.3, generator=draw)
        weight = torch.nn.Parameter(linear.weight.data.clone(), requires_grad=False)
        for part in (linear, *mlp.children(), *plain.children()):
            if hasattr(part, "quant_method"):
                part.quant_method.process_weights_after_loading(part)
        x = torch.randn(5, 64, generator=draw)
        patched = hasattr(cls.forward, "__wrapped__")
        stock = getattr(cls.forward, "__wrapped__", cls.forward)(mlp, x)
        found: dict[str, Any] = {
            "patched": patched,
            "cpu": torch.equal(mlp(x), stock),
            "cpu_calls": len(calls),
        }
        linear.weight = weight  # on a CPU vLLM packs it away
        for label, factor in (("kernel", 1.0), ("control", 1.01)):
            name = "fse_patch.fusion_core.kernels.gated_mlp"
            with (
                patch.dict(sys.modules, {name: kernel(factor)}),
                patch.object(shared_gate, "takes", lambda *_: True),
            ):
                got = mlp(x)
                found[f"plain_{label}"] = bool(torch.isfinite(plain(x)).all())
            found[label] = float((got - stock).norm() / stock.norm())
        found["calls"] = len(calls)
        return found


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, checkpoints: Checkpoints) -> dict[str, Any]:
    """By class, where the setting is as the test's parameter."""
    folder, setting = str(checkpoints.path("qwen2_moe")), request.param
    result: dict[str, Any] = in_process(
        f"{__name__}:probe", folder, FSE_PATCH="vllm", FSE_PATCH_GATE_KERNEL=setting
    )
    return result


@pytest.mark.one_release
@pytest.mark.parametrize("found", ["1"], indirect=True)
@pytest.mark.parametrize("reference", MLPS)
def test_gate_kernel_is_wired(reference: str, found: dict[str, Any]) -> None:
    found = found[reference]
    # On a CPU it is not taken, and the result is stock's to the bit.
    assert (found["patched"], found["cpu"], found["cpu_calls"]) == (True, True, 0)
    # Taken once for each gated call; an MLP without a gate has none.
    assert found["calls"] == 2
    assert found["plain_kernel"]
    assert found["kernel"] < 1e-6
    assert found["control"] > 5e-3


@pytest.mark.one_release
@pytest.mark.parametrize("found", [None], indirect=True)
@pytest.mark.parametrize("reference", MLPS)
def test_without_the_setting_it_is_stock(reference: str, found: dict[str, Any]) -> None:
    found = found[reference]
    assert (found["patched"], found["calls"]) == (False, 0)
    assert found["kernel"] == found["control"] == 0.0
