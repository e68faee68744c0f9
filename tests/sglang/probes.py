"""What is looked at in a model that was built as on CUDA; each looks in that process, for `on_cuda.py`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from fse_patch.adapters.sglang import run as forward
from fse_patch.adapters.sglang.run import ATTRIBUTE
from fse_patch.fusion_core.forward.mode_registry import MODES

# Enough that rounding moves the choice of some.
MANY = 2048


def states(fused_role: Any, tokens: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, fused_role.layout.hidden_size, generator=draw).to(torch.bfloat16)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


class Stream:
    """A CUDA stream that notes who waits for whom."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@contextmanager
def streams(block: Any) -> Iterator[list[str]]:
    """A block as while SGLang captures a graph, with a second stream; yields what happens on both."""
    from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode

    log: list[str] = []
    main, side = Stream("main", log), Stream("side", log)
    execution = getattr(block, ATTRIBUTE).execution

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        log.append(f"on {stream.name}")
        yield
        log.append(f"off {stream.name}")

    with (
        model_capture_mode(),
        patch.object(block, "alt_stream", side),
        patch.object(execution.experts, "stream", side),
        patch.object(torch.cuda, "current_stream", lambda *_: main),
        patch.object(torch.cuda, "stream", entered),
    ):
        yield log


def first_block(fused_role: Any) -> Any:
    return next(iter(fused_role.layers.values())).block


def dual_stream(fused_role: Any) -> dict[str, Any]:
    """By number of tokens: what runs on the second stream, and how far the output is from without one."""
    block = first_block(fused_role)
    cls = type(block)
    found: dict[str, Any] = {"log": {}, "distance": {}, "unhooked": []}
    with torch.no_grad():
        for tokens in (1, 2, 3):
            x = states(fused_role, tokens)
            plain = block(x.clone())
            with streams(block) as log:
                output = block(x.clone())
            found["log"][tokens] = log
            found["distance"][tokens] = distance(output, plain)
        original = cls.forward_normal_dual_stream.__wrapped__
        with patch.object(cls, "forward_normal_dual_stream", original), streams(block) as log:
            block(states(fused_role, 1))
        found["unhooked"] = log
    return found


def compiled(fused_role: Any) -> dict[str, Any]:
    """A layer under torch.compile, its number of tokens a symbol: graphs, modes, and distance to eager."""
    block = first_block(fused_role)
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def run() -> dict[str, Any]:
        graphs.clear()
        torch._dynamo.reset()
        layer = torch.compile(
            lambda x: block._forward_router_experts(x) + 0, backend=backend, fullgraph=True, dynamic=True
        )
        found: dict[str, Any] = {"modes": [], "distance": []}
        for tokens in (2, 3, 5):
            x = states(fused_role, tokens)
            expected = block._forward_router_experts(x)
            fused_role.counter.reset()
            output = layer(x)
            found["modes"].append(fused_role.counter.by_mode())
            found["distance"].append(distance(output, expected))
        nodes = [str(node.target) for graph in graphs for node in graph.graph.nodes]
        return {**found, "graphs": len(graphs), "operators": sum("run_layer" in n for n in nodes)}

    # The stand-in for SGLang's kernels switches it off.
    with patch.dict(os.environ, {"TORCHDYNAMO_DISABLE": "0"}), torch.no_grad():
        found = run()
        checks = torch.library.opcheck(
            forward.run_layer,
            (states(fused_role, 3), getattr(block, ATTRIBUTE).number),
            raise_exception=False,
        )
        with patch.object(forward, "_run", lambda modes, x: modes(x)):
            try:
                found["bare"] = run()
            except Exception as error:
                found["bare"] = {"error": type(error).__name__}
    return {**found, "checks": checks}


def all_reduce(fused_role: Any) -> dict[str, Any]:
    """How often a layer of two processes sums, and what of: by who runs it and whether SGLang skips it."""
    from sglang.srt.layers.moe import utils
    from sglang.srt.models import glm4_moe

    block = first_block(fused_role)
    summed: list[torch.Tensor] = []

    def total(part: torch.Tensor) -> torch.Tensor:
        summed.append(part.clone())
        return part * 2

    # Up to 0.5.20 the block asks and sums by itself; later one function does both.
    inline = hasattr(glm4_moe, "should_skip_post_experts_all_reduce")
    module = glm4_moe if inline else utils
    found = {}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for place in (glm4_moe, communication_op()):
            if hasattr(place, "tensor_model_parallel_all_reduce"):
                stack.enter_context(patch.object(place, "tensor_model_parallel_all_reduce", total))
        # By the table one token runs in small mode; what is closed is left to SGLang.
        for name, parts, skip, closed in (
            ("one process", 1, False, ""),
            ("two", 2, False, ""),
            ("two, skipped", 2, True, ""),
            ("two, left", 2, False, "not proved"),
        ):
            summed.clear()
            x = states(fused_role, 1)
            router = getattr(block, ATTRIBUTE).execution.router
            if closed and fused_role.start.merged:
                continue
            asked = patch.object(module, "should_skip_post_experts_all_reduce", lambda skip=skip, **_: skip)
            width = patch.object(utils, "get_parallel", lambda parts=parts: SimpleNamespace(tp_size=parts))
            size = patch.object(block, "tp_size", parts) if inline else width
            with asked, size, patch.object(router, "closed", closed):
                output = block(x.clone())
            doubled = distance(output, summed[0]) if summed else 0.0
            found[name] = {"sums": len(summed), "factor": 1 + round(doubled, 3)}
    return {**found, "sums itself": inline or hasattr(glm4_moe, "reduce_moe_output")}


def communication_op() -> Any:
    from sglang.srt.distributed import communication_op

    return communication_op


def chosen(execution: Any, x: torch.Tensor) -> torch.Tensor:
    """``topk_ids`` of the mode `fused`."""
    ids: list[torch.Tensor] = []
    honest = execution.route

    def route(*args: Any) -> Any:
        top_k = honest(*args)
        ids.append(top_k[1])
        return top_k

    with patch.object(execution, "route", route):
        MODES["fused"].load()(execution, x, x)
    return ids[0]


def choice(fused_role: Any) -> dict[str, Any]:
    """Tokens whose experts are not those of SGLang's own top-k: as we route, and by 16-bit logits."""
    from fse_patch.fusion_core.kernels.route import reference

    block = first_block(fused_role)
    execution, k = getattr(block, ATTRIBUTE).execution, fused_role.layout.top_k
    x = states(fused_role, MANY)

    def others(ids: torch.Tensor, stock: torch.Tensor) -> int:
        return int((ids.sort().values != stock.sort().values).any(1).sum())

    with torch.no_grad():
        stock = block.topk(x, block.gate(x)).topk_ids[:, :k].int()
        ours = chosen(execution, x)[:, :k]
        rounded = torch.nn.functional.linear(x, block.gate.weight.to(x.dtype))
        router = execution.router
        narrow = reference(
            rounded, k, fused_role.layout.shared_slots, router.routing, router.correction_bias
        )[1]
    return {"ours": others(ours.int(), stock), "16 bit": others(narrow[:, :k].int(), stock)}


PROBES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "dual stream": dual_stream,
    "compiled": compiled,
    "all-reduce": all_reduce,
    "choice": choice,
}
