"""Blocks of vLLM whose layer computes the router's logits: what they give is what their own forward gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from .engine import Checkpoints
from .processes import in_process
from .test_inherited import building

BLOCKS = {"qwen2_moe": "qwen2_moe:Qwen2MoeSparseMoeBlock", "glm4_moe": "glm4_moe:Glm4MoE"}


def probe(*checkpoints: str) -> dict[str, Any]:
    """What each block gives, of a checkpoint of its family."""
    return {
        family: probe_block(checkpoint, BLOCKS[family])
        for family, checkpoint in zip(BLOCKS, checkpoints, strict=True)
    }


def probe_block(checkpoint: str, reference: str) -> dict[str, Any]:
    """How far the block is from its own forward: with the layer's logits, and with another gate."""
    import torch
    from vllm.config import get_current_vllm_config
    from vllm.forward_context import get_forward_context, set_forward_context

    from fse_patch.adapters.vllm.run import take_gate

    class Layer(torch.nn.Module):
        """A layer that looks at its states alone, as one with modes does."""

        def __init__(self, experts: Any) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, hidden_states: Any, router_logits: Any) -> Any:
            assert router_logits.shape == hidden_states.shape
            return self.experts(hidden_states=hidden_states, router_logits=taken["linear"](hidden_states))

    taken: dict[str, Any] = {}
    module, name = reference.split(":")
    cls = getattr(__import__(f"vllm.model_executor.models.{module}", fromlist=[name]), name)
    with building(checkpoint), torch.no_grad():
        config = get_current_vllm_config()
        block = cls(
            config=config.model_config.hf_text_config,
            quant_config=None,
            prefix="model.layers.1.mlp",
        )
        draw = torch.Generator().manual_seed(0)
        for parameter in block.parameters():
            parameter.normal_(0, 0.2, generator=draw)
        gate = block.gate.weight.data.clone()
        # On a CPU vLLM packs gates away; on a GPU they stay as they are.
        gates = (block.gate, getattr(block, "shared_expert_gate", None))
        for one in filter(None, gates):
            one.cpu_linear = torch.nn.functional.linear
        for part in block.modules():
            if hasattr(part, "quant_method") and all(part is not one for one in gates):
                part.quant_method.process_weights_after_loading(part)
        x = torch.randn(5, config.model_config.get_hidden_size(), generator=draw)

        def run(call: Any = block) -> Any:
            with set_forward_context(None, config, num_tokens=len(x)):
                get_forward_context().all_moe_layers = None
                return call(x.clone())

        stock = run()
        execution = SimpleNamespace(
            shared_gate=getattr(block, "shared_expert_gate", None),
            compute_logits=lambda rows, linear, **order: taken.update(rows=rows, linear=linear, **order),
        )
        take_gate(block, execution)
        block.experts = Layer(block.experts)
        found = {"same": float((run() - stock).norm() / stock.norm())}
        traced = torch.compile(block, backend="eager", fullgraph=True, dynamic=True)
        found["compiled"] = float((run(traced) - stock).norm() / stock.norm())
        found["rows"] = taken["rows"].count - len(gate)
        found["before_shared"] = taken["before_shared"]
        # What is in the matrix is what the module answers by.
        taken["rows"].rows[: len(gate)].copy_(gate.flip(0))
        return {**found, "control": float((run() - stock).norm() / stock.norm())}


@pytest.fixture(scope="module")
def blocks(checkpoints: Checkpoints) -> dict[str, Any]:
    result: dict[str, Any] = in_process(
        f"{__name__}:probe", *(str(checkpoints.path(family)) for family in BLOCKS)
    )
    return result


@pytest.mark.one_release
@pytest.mark.parametrize("family", BLOCKS)
def test_the_layer_computes_the_logits_of_its_block(blocks: dict[str, Any], family: str) -> None:
    found = blocks[family]
    assert found["same"] == 0.0
    assert found["compiled"] < 1e-6
    assert found["before_shared"]  # as both blocks have it
    assert found["rows"] == (family == "qwen2_moe")
    assert found["control"] > 0.01
