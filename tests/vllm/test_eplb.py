"""Nothing is appended in front of the load balancer's mapping: it turns ids that it does not know into -1."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from .engine import Checkpoints
from .processes import in_process
from .test_inherited import building, load

ENTRY = "vllm.model_executor.models.qwen2_moe:Qwen2MoeForCausalLM"
BLOCK = "vllm.model_executor.models.qwen2_moe"
E, K, S = 8, 2, 1
LAYOUTS = ("merged", "paired")


class Stop(Exception):
    """Nothing more is to be built."""


def mapped(topk_ids: Any, **_: Any) -> Any:
    """What the kernel of the mapping gives on a GPU, for as many physical experts as logical ones."""
    return topk_ids.where((topk_ids >= 0) & (topk_ids < E), topk_ids.new_tensor(-1))


def through_the_mapping(arguments: dict[str, Any]) -> list[int]:
    """The ids of one token behind vLLM's own router, as a layer with these arguments gets it."""
    import torch
    from vllm.distributed.eplb.eplb_state import EplbLayerState
    from vllm.model_executor.layers.fused_moe.router import base_router, router_factory

    some = torch.zeros(1, dtype=torch.int32)
    state = EplbLayerState(some, some, some, some, [some])
    with patch.object(base_router, "eplb_map_to_physical_and_record", mapped):
        router = router_factory.create_fused_moe_router(
            top_k=arguments["top_k"],
            global_num_experts=arguments["num_experts"],
            eplb_state=state,
            renormalize=arguments.get("renormalize", True),
            custom_routing_function=arguments.get("custom_routing_function"),
        )
        if "custom_routing_function" not in arguments:
            # A CPU's router is one of its own; the mapping is the one of every router.
            return base_router.BaseRouter._apply_eplb_mapping(router, torch.tensor([[1, 5]])).tolist()[0]
        logits = torch.arange(E, dtype=torch.float32)[None]
        return router._select_experts(torch.ones(1, 64), logits)[1].tolist()[0]


def factory_arguments(config: Any) -> tuple[dict[str, Any], str]:
    """What the block passes to vLLM's layer factory, through ours, and the code of the decision."""
    import importlib

    from fse_patch import runtime
    from fse_patch.adapters.vllm.build import layer_factory

    seen: list[dict[str, Any]] = []

    def spy(**kwargs: Any) -> Any:
        seen.append(kwargs)
        raise Stop

    runtime.clear()
    with patch.object(importlib.import_module(BLOCK), "FusedMoEFactory", layer_factory(spy)):
        with pytest.raises(Stop):
            load(ENTRY)(vllm_config=config)
        for attribute in config.compilation_config.static_forward_context.copy():
            del config.compilation_config.static_forward_context[attribute]
    (decision,) = runtime.decisions()
    (arguments,) = seen
    return arguments, decision["reason"]


def probe(folder: str) -> dict[str, Any]:
    import os

    from vllm.plugins import load_general_plugins

    load_general_plugins()
    found = {}
    with building(folder) as config:
        for balanced in (False, True):
            config.parallel_config.enable_eplb = balanced
            for layout in LAYOUTS:
                os.environ |= {"FSE_PATCH_LAYOUT": layout, "FSE_PATCH_CPU_THRESHOLD": "4"}
                arguments, reason = factory_arguments(config)
                found[f"{layout} {balanced}"] = {
                    "reason": reason,
                    "sizes": [arguments["num_experts"], arguments["top_k"]],
                    "appends": "custom_routing_function" in arguments,
                    "ids": [] if layout == "paired" else through_the_mapping(open_(arguments)),
                }
    return found


def open_(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with our router let run before a proof."""
    if (ours := arguments.get("custom_routing_function")) is not None:
        router = next(c.cell_contents for c in ours.__closure__ if hasattr(c.cell_contents, "closed"))
        router.closed, router.shared_gate = "", lambda states: states[:, :1]
    return arguments


@pytest.mark.one_release
def test_nothing_is_appended_before_the_mapping(checkpoints: Checkpoints) -> None:
    found = in_process(f"{__name__}:probe", str(checkpoints.path("qwen2_moe")), FSE_PATCH="vllm")
    for layout in LAYOUTS:
        told = found[f"{layout} True"]
        assert (told["reason"], told["sizes"], told["appends"]) == ("parallel.eplb", [E, K], False)
        assert found[f"{layout} False"]["reason"] == "ok"
    assert found["merged True"]["ids"] == [1, 5]
    # The control: without the refusal the shared slot would be appended, and vanish in the mapping.
    assert found["merged False"]["sizes"] == [E + S, K + S]
    assert found["merged False"]["appends"]
    assert found["merged False"]["ids"] == [E - 1, E - 2, -1]
