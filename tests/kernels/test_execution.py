"""One layer in every mode against float64: gates of its own, logits from the engine, no shared gate."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fse_patch.adapters.vllm.fp8 import Fp8Experts, Slot
from fse_patch.errors import AuditError
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import RoutingSpec
from fse_patch.fusion_core.forward.execution import Execution, TopK
from fse_patch.fusion_core.forward.gate_rows import GateRows
from fse_patch.fusion_core.forward.layer import FusedLayer
from fse_patch.fusion_core.forward.mode_registry import MODES
from fse_patch.fusion_core.forward.plan import ModeCounter, ModePlan, always
from fse_patch.fusion_core.forward.router import FusedRouter
from fse_patch.fusion_core.kernels import experts_fp8, silu_mul
from fse_patch.fusion_core.kernels.routing_reference import route
from fse_patch.lab.slot_control import slot_rows

from ..core.moe import moe_spec
from .test_experts_fp8 import drawn
from .test_kernels import DEVICE, draw, off

DTYPE = torch.bfloat16
LAYOUT = ExpertLayout(num_routed=12, num_shared_slots=1, top_k=3, hidden_size=96, moe_intermediate_size=48)
QWEN = RoutingSpec("softmax", True)
GLM = RoutingSpec("sigmoid", True, 2.5, has_correction_bias=True)
# Rounding of inner states and output to bfloat16.
ALLOWED = 0.02
OWN_GATES = ("own gates", "fp8", "glm, own gate")
BLOCK = (32, 32)


class Linear(torch.nn.Module):
    """A gate as engines have it."""

    def __init__(self, rows: int, seed: int, dtype: torch.dtype = DTYPE) -> None:
        super().__init__()
        weight = draw(rows, LAYOUT.hidden_size, seed=seed, dtype=dtype, scale=0.3)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)


class Experts:
    """`GroupedExperts` in torch."""

    def __init__(self, spec: RoutingSpec, bias: torch.Tensor | None, stream: Any = None) -> None:
        total, width, hidden = LAYOUT.num_experts, LAYOUT.moe_intermediate_size, LAYOUT.hidden_size
        self.w13 = draw(total, 2 * width, hidden, seed=5, dtype=DTYPE, scale=0.1)
        self.w2 = draw(total, hidden, width, seed=6, dtype=DTYPE, scale=0.1)
        self.spec, self.bias, self.stream = spec, bias, stream

    def gemm(
        self, hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, top_k: TopK
    ) -> torch.Tensor:
        return layer(hidden_states, w13, w2, *top_k).to(DTYPE)

    def choose(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> TopK:
        return route(logits, LAYOUT.top_k, self.spec, self.bias)

    def side_stream(self, num_tokens: int) -> Any:
        return self.stream


class Dense:
    """vLLM's kernel of a dense FP8 layer, in torch."""

    def apply_weights(self, slot: Slot, states: torch.Tensor) -> torch.Tensor:
        halves = 2 if slot.name == "w13" else 1
        weight = experts_fp8.dequantised(slot.weight[None], slot.weight_scale_inv[None], BLOCK, halves)[0]
        return (states.double() @ weight.T).to(states.dtype)


def in_fp8(experts: Experts) -> Fp8Experts:
    """Gives the layer FP8 weights; the plain ones are what they stand for."""
    held = SimpleNamespace()
    for number, name in enumerate(("w13", "w2")):
        weight, scale = drawn(tuple(getattr(experts, name).shape), BLOCK, 2 - number, 20 + number)
        setattr(held, f"{name}_weight", weight)
        setattr(held, f"{name}_weight_scale_inv", scale)
        setattr(experts, name, experts_fp8.dequantised(weight, scale, BLOCK, 2 - number).to(DTYPE))
    return Fp8Experts(held, "weight_scale_inv", BLOCK, [Dense(), Dense()], LAYOUT.num_routed)


def layer(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, w: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Every token and slot by itself, in float64."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for token in range(len(x)):
        for weight, expert in zip(w[token], ids[token].tolist(), strict=True):
            gate, up = (w13[expert].double() @ x[token].double()).chunk(2)
            out[token] += weight.double() * (w2[expert].double() @ (torch.nn.functional.silu(gate) * up))
    return out


def build(kind: str, plan: ModePlan, stream: Any = None) -> tuple[Execution, Any]:
    """An execution, and what it must give for hidden states (with a factor on the shared expert)."""
    glm = kind.startswith("glm")
    spec = GLM if glm else QWEN
    moe = moe_spec(LAYOUT, spec, "constant" if glm else "sigmoid_gate")
    # GLM routes in float32.
    gate = Linear(LAYOUT.num_routed, 1, torch.float32 if glm else DTYPE)
    shared_gate = None if glm else Linear(1, 2)
    bias = draw(LAYOUT.num_routed, seed=3, scale=0.1) if glm else None
    router = FusedRouter(0, moe, ModeCounter(), (lambda x: x[:, :1]) if shared_gate else None, bias)
    experts = Experts(spec, bias, stream)
    quantised = in_fp8(experts) if kind == "fp8" else None

    def logits(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.to(gate.weight.dtype), gate.weight)

    def wanted(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        weights, ids = route(x.double() @ gate.weight.double().T, LAYOUT.top_k, spec, bias)
        share = torch.ones(len(x), 1, dtype=torch.float64, device=x.device)
        if shared_gate is not None:
            share = (x.double() @ shared_gate.weight.double().T).sigmoid()
        weights = torch.cat([weights.double(), share * factor], 1)
        ids = torch.cat([ids, torch.full_like(ids[:, :1], LAYOUT.num_routed)], 1)
        return layer(x, experts.w13, experts.w2, weights, ids)

    own = GateRows([gate, shared_gate] if shared_gate else [gate]) if kind in OWN_GATES else None
    made = Execution(router, plan, experts, own, logits if own else None, shared_gate, quantised)
    return made, (wanted, logits)


def layer_of(run: Execution) -> FusedLayer:
    """The layer that an execution runs."""
    return FusedLayer(0, run.router, weights_of(run), torch.nn.Module(), run)


def weights_of(run: Any) -> Any:
    """A module with the weights of the layer, in the same memory."""
    tensors = {f"{name}_weight": getattr(run.experts, name) for name in ("w13", "w2")}
    if run.quantised is not None:
        tensors = vars(run.quantised.experts)
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    return module


def clear(x: torch.Tensor, logits: Any) -> torch.Tensor:
    """The tokens whose choice of experts no rounding changes."""
    ordered = logits(x).double().sort(dim=1, descending=True).values
    return x[(ordered[:, LAYOUT.top_k - 1] - ordered[:, LAYOUT.top_k]) > 0.3]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [*OWN_GATES, "logits given", "glm"])
def test_every_mode_gives_the_layer(kind: str, mode: Any) -> None:
    stream = torch.cuda.Stream() if DEVICE == "cuda" else None
    run, (wanted, logits) = build(kind, always(mode, "test"), stream)
    x = clear(draw(40, LAYOUT.hidden_size, seed=8, dtype=DTYPE), logits)[:5].contiguous()
    assert len(x) == 5
    given = x if kind in OWN_GATES else logits(x)
    before = x.clone()
    got = run(x, given)
    assert off(got, wanted(x)) < ALLOWED
    assert torch.equal(x, before)
    assert run.router.counter.by_mode() == {mode: 1}
    # The control of `verify` reaches every mode, and a wrong slot weight shows.
    assert off(got, wanted(x, 0.5)) > 5 * ALLOWED
    run.router.control_factor = 0.5
    assert off(run(x, given), wanted(x, 0.5)) < ALLOWED


@pytest.mark.parametrize("kind", ["own gates", "fp8"])
def test_more_tokens_than_the_kernels_of_once_take_go_in_turn(kind: str) -> None:
    run, (_, logits) = build(kind, always("once", "test"))
    x = clear(draw(60, LAYOUT.hidden_size, seed=8, dtype=DTYPE), logits)[:5].repeat(4, 1)[:19]
    assert len(x) == 19
    got = run(x, logits(x))
    first = run(x[:5].contiguous(), logits(x[:5]))
    assert off(got[15:], first[:4]) < ALLOWED
    # The control: the tokens differ.
    assert off(got[14:18], first[:4]) > 5 * ALLOWED


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["own gates", "fp8", "glm"])
def test_a_factor_in_the_weights_is_one_on_the_slot(kind: str, mode: Any) -> None:
    run, (wanted, logits) = build(kind, always(mode, "test"))
    x = clear(draw(40, LAYOUT.hidden_size, seed=8, dtype=DTYPE), logits)[:5].contiguous()
    full, half, quarter = (wanted(x, factor) for factor in (1.0, 0.5, 0.25))
    held = weights_of(run)
    rows = slot_rows(held, LAYOUT, True, LAYOUT.num_experts)
    assert rows is not None
    assert (rows.dtype == DTYPE) == (kind != "fp8")
    rows.mul_(0.5)
    if kind == "fp8":  # what stands for the grouped GEMM has plain weights
        run.experts.w2.copy_(experts_fp8.dequantised(held.w2_weight, held.w2_weight_scale_inv, BLOCK, 1))
    got = run(x, x if kind in OWN_GATES else logits(x))
    assert off(got, half) < ALLOWED
    # The controls: no factor would be seen, and so would one on the router as well.
    assert off(got, full) > 5 * ALLOWED
    assert off(got, quarter) > 2 * ALLOWED


def test_gates_of_another_size_are_no_gates_of_the_layer() -> None:
    run, (_, logits) = build("glm", always("small", "test"))
    few = GateRows([Linear(LAYOUT.num_routed - 1, 1)])
    for gate, linear in ((few, logits), (GateRows([Linear(LAYOUT.num_routed, 1)]), None)):
        with pytest.raises(ValueError, match=f"{LAYOUT.num_routed} rows"):
            run.compute_logits(gate, linear)
    assert run.gate is None


@pytest.mark.parametrize("before_shared", [True, False])
def test_the_shared_expert_of_split_starts_where_stock_starts_it(
    monkeypatch: pytest.MonkeyPatch, before_shared: bool
) -> None:
    events: list[str] = []
    stream = SimpleNamespace(wait_stream=lambda _: events.append("shared may start"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_stream=lambda _: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    run, (wanted, logits) = build("glm", always("split", "test"), stream)

    def noted(states: torch.Tensor) -> torch.Tensor:
        events.append("logits")
        found: torch.Tensor = logits(states)
        return found

    run.compute_logits(GateRows([Linear(LAYOUT.num_routed, 1, torch.float32)]), noted, before_shared)
    x = clear(draw(40, LAYOUT.hidden_size, seed=8, dtype=DTYPE), logits)[:5].contiguous()
    assert off(run(x, x), wanted(x)) < ALLOWED
    assert events == (["logits", "shared may start"] if before_shared else ["shared may start", "logits"])


def test_split_asks_the_engine_with_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    current, side = SimpleNamespace(waited=[]), SimpleNamespace(waited=[])
    for one in (current, side):
        one.wait_stream = one.waited.append
    entered: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream) or nullcontext())
    run, (_, logits) = build("logits given", always("split", "test"), side)
    x = draw(5, LAYOUT.hidden_size, seed=8, dtype=DTYPE)
    experts, asked = run.experts, []
    choose, side_stream = experts.choose, experts.side_stream
    monkeypatch.setattr(experts, "choose", lambda *of: asked.append(of) or choose(*of))
    monkeypatch.setattr(experts, "side_stream", lambda number: asked.append(number) or side_stream(number))
    given = logits(x)
    run(x, given)
    assert asked[0] == 5
    assert asked[1][0] is x
    assert asked[1][1] is given
    # The side stream waits for the states, the shared expert runs there, and it is waited for.
    assert (side.waited, entered, current.waited) == ([current], [side], [side])


def test_the_quantised_shared_expert_of_split_is_the_engines() -> None:
    run, (wanted, logits) = build("fp8", always("split", "test"))
    x = clear(draw(40, LAYOUT.hidden_size, seed=8, dtype=DTYPE), logits)[:5].contiguous()
    expected = wanted(x)
    # What stands for plain weights of the slot is not looked at.
    for weights in (run.experts.w13, run.experts.w2):
        weights[LAYOUT.num_routed :] = float("nan")
    assert off(run(x, x), expected) < ALLOWED


def test_nothing_runs_before_it_was_proved() -> None:
    run, (_, logits) = build("glm", always("small", "test"))
    run.router.closed = "not proved"
    x = draw(2, LAYOUT.hidden_size, seed=8, dtype=DTYPE)
    for mode in MODES:
        with layer_of(run).forced(mode), pytest.raises(AuditError, match="not proved"):
            run(x, logits(x))


@pytest.mark.parametrize("mode", MODES)
def test_no_tokens_are_an_answer_too(mode: Any) -> None:
    run, (_, logits) = build("glm", always(mode, "test"))
    x = draw(1, LAYOUT.hidden_size, seed=8, dtype=DTYPE)[:0]
    assert run(x, logits(x)).shape == (0, LAYOUT.hidden_size)


def test_the_plan_chooses_by_tokens_and_can_be_overruled() -> None:
    run, (_, logits) = build("glm", ModePlan(((2, "small"), (4, "fused")), "split", "test"))
    for tokens in (1, 2, 3, 5):
        x = draw(tokens, LAYOUT.hidden_size, seed=8, dtype=DTYPE)
        run(x, logits(x))
    assert run.router.counter.by_mode() == {"small": 2, "fused": 1, "split": 1}
    with layer_of(run).forced("split"):
        run(x[:1], logits(x[:1]))
    assert run.router.counter.by_mode()["split"] == 2
    run(x[:1], logits(x[:1]))
    assert run.router.counter.by_mode()["small"] == 3


@pytest.mark.parametrize("shape", [(1, 40, 96), (3, 512, 2048), (2, 1408, 4096), (7, 600, 64)], ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_silu_mul(shape: tuple[int, int, int], gated: bool) -> None:
    tokens, width, hidden = shape
    both = draw(tokens, 2 * width, seed=1, dtype=DTYPE)
    x, row = draw(tokens, hidden, seed=2, dtype=DTYPE), draw(1, hidden, seed=3, dtype=DTYPE, scale=0.05)
    rest = (x, row) if gated else ()
    got = silu_mul.silu_mul(both, *rest)
    assert off(got, silu_mul.reference(both, *rest)) < 4e-3
    assert (
        off(silu_mul.silu_mul(both, *(rest or (None, None)), 2.0), 2 * silu_mul.reference(both, *rest)) < 4e-3
    )
    assert off(got, silu_mul.reference(both.flip(1), *rest)) > 0.1
