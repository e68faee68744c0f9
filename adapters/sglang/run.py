"""How a fused layer runs in SGLang on CUDA: the forwards of its blocks, in one of several modes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch

from ...errors import FsePatchError
from ...fusion_core.forward.gate_rows import GateRows
from ...fusion_core.forward.router import FusedRouter
from ..start import Start
from .experts import Experts, routed_topk
from .plan import KNOWN_BACKENDS

if TYPE_CHECKING:
    from ...fusion_core.forward.execution import Execution  # needs Triton

# Of a block: its `BlockModes`.
ATTRIBUTE = "_fse_patch_modes"
# Set on a replacement: without it, the layers of a release run in one mode.
MARK = "_fse_patch_runs_modes"
# By number, for the operator.
_blocks: WeakValueDictionary[int, BlockModes] = WeakValueDictionary()


@torch.library.custom_op("fse_patch::run_layer", mutates_args=())
def run_layer(hidden_states: torch.Tensor, number: int) -> torch.Tensor:
    """Run a block on [num_tokens, H], opaque to torch.compile: the real number of tokens chooses the mode."""
    return _blocks[number](hidden_states)


@run_layer.register_fake
def _(hidden_states: torch.Tensor, number: int) -> torch.Tensor:
    return torch.empty_like(hidden_states)


def attach_modes(block: Any, modes: BlockModes) -> None:
    """Let ``block`` run in its modes from now on."""
    modes.number = max(_blocks, default=-1) + 1
    _blocks[modes.number] = modes
    setattr(block, ATTRIBUTE, modes)


def runs_modes(block: Any) -> bool:
    """Return whether the forward of a block is one of ours."""
    forwards = (getattr(type(block), name, None) for name in ("_forward_router_experts", "forward_normal"))
    return any(getattr(forward, MARK, False) for forward in forwards)


def _run(modes: BlockModes, hidden_states: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling():
        output: torch.Tensor = run_layer(hidden_states, modes.number)
        return output
    return modes(hidden_states)


def check_finished(kwargs: Mapping[str, Any]) -> None:
    """Stop where SGLang wants the sum of the experts' outputs to be done later, which no mode can.

    It asks for that with a shared expert beside the routed ones alone, and there is none.

    Raises:
        FsePatchError: it asks all the same.
    """
    if kwargs.get("defer_finalize"):
        raise FsePatchError("SGLang asks fused experts to leave their sum to a later layer")


def router_experts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``_forward_router_experts`` of the Qwen block: all of a layer but the sum over processes."""

    @functools.wraps(original)
    def _forward_router_experts(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        modes: BlockModes | None = getattr(self, ATTRIBUTE, None)
        if modes is None:
            return original(self, hidden_states, **kwargs)
        check_finished(kwargs)
        if modes.is_left(hidden_states):
            modes.note_left()
            return original(self, hidden_states, **kwargs)
        return _run(modes, hidden_states)

    setattr(_forward_router_experts, MARK, True)
    return _forward_router_experts


def dual_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``forward_normal_dual_stream`` of the Qwen block: its modes take that stream by themselves."""

    @functools.wraps(original)
    def forward_normal_dual_stream(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        modes: BlockModes | None = getattr(self, ATTRIBUTE, None)
        if modes is None or modes.is_left(hidden_states):
            return original(self, hidden_states, *args, **kwargs)
        check_finished(kwargs)
        return self._forward_router_experts(hidden_states), None

    return forward_normal_dual_stream


def glm_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``forward_normal`` of the GLM block, which sums over processes as the release's own does."""
    summed = sum_of(original)

    @functools.wraps(original)
    def forward_normal(self: Any, hidden_states: torch.Tensor) -> Any:
        modes: BlockModes | None = getattr(self, ATTRIBUTE, None)
        if modes is None or not len(hidden_states):
            return original(self, hidden_states)
        if modes.is_left(hidden_states):
            modes.note_left()
            return original(self, hidden_states)
        return summed(self, _run(modes, hidden_states))

    setattr(forward_normal, MARK, True)
    return forward_normal


def sum_of(forward: Callable[..., Any]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Return how a block's ``forward`` sums its output [num_tokens, H] over processes, by what it calls.

    Raises:
        FsePatchError: it calls what nobody has read.
    """
    names = set(forward.__code__.co_names)
    if "should_skip_post_experts_all_reduce" in names:  # up to 0.5.20
        return _sum_of_tensor_parallel
    if "reduce_moe_output" in names:  # 0.5.21
        return _sum_by_its_function
    if any("reduce" in name for name in names):
        raise FsePatchError(f"{forward.__qualname__} sums its output in a way that nobody has read")
    return lambda block, output: output  # the layer around it sums


def _sum_of_tensor_parallel(block: Any, output: torch.Tensor) -> torch.Tensor:
    from sglang.srt.models import glm4_moe

    if block.tp_size > 1 and not glm4_moe.should_skip_post_experts_all_reduce(is_tp_path=True):
        output = glm4_moe.tensor_model_parallel_all_reduce(output)
    return output


def _sum_by_its_function(block: Any, output: torch.Tensor) -> torch.Tensor:
    from sglang.srt.models import glm4_moe

    total: torch.Tensor = glm4_moe.reduce_moe_output(output)
    return total


class BlockModes:
    """One block with its execution.

    Args:
        native: SGLang fuses the block by itself: the mode "fused" is its own forward.
    """

    def __init__(self, execution: Execution, native: bool) -> None:
        self.execution = execution
        self.native = native
        # Of the operator that runs it under torch.compile.
        self.number = -1

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute the block's output [num_tokens, H], without the sum over processes."""
        return self.execution(hidden_states, hidden_states)

    def is_left(self, hidden_states: torch.Tensor) -> bool:
        """Return whether SGLang's own forward runs ``hidden_states`` [num_tokens, H]."""
        if not self.native:
            return False
        execution = self.execution
        # The number of tokens is a symbol there; and what nothing has proved yet is not served.
        if torch.compiler.is_compiling() or execution.router.closed:
            return True
        mode = execution.mode_of(hidden_states.shape[0])
        # Where the control of `verify` is with the router, it needs a forward that asks that.
        return mode == "fused" and execution.router.control_factor == 1.0

    def note_left(self) -> None:
        """Count that SGLang's own forward runs."""
        if not self.execution.router.closed:
            self.execution.router.enter("fused")


def execution_of(start: Start, block: Any, router: FusedRouter) -> Execution:
    """Return the execution of a block, as soon as it is built.

    Raises:
        FsePatchError: SGLang took another backend for its experts.
    """
    from ...fusion_core.forward.execution import Execution

    backend = block.experts.quant_method.runner.runner_backend.value
    if backend not in KNOWN_BACKENDS:
        raise FsePatchError(f"layer {router.layer}: SGLang took the MoE backend {backend!r}")
    name = start.naming.family.shared_gate
    shared_gate = None if name is None else getattr(block, name, None)

    def gate_linear(hidden_states: torch.Tensor) -> torch.Tensor:
        answer: Any = block.gate(hidden_states)
        logits: torch.Tensor = answer[0] if isinstance(answer, tuple) else answer
        return logits

    return Execution(
        router,
        start.plan,
        Experts(block.experts, routed_topk(block, start.moe), block.alt_stream),
        GateRows([block.gate] if shared_gate is None else [block.gate, shared_gate]),
        gate_linear,
        shared_gate,
    )
