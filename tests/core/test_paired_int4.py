"""4-bit routed experts beside a plain one through a paired role: proof, faults, record, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fse_patch.adapters import int4_reading  # noqa: E402
from fse_patch.adapters.expert_reading import Unreadable  # noqa: E402
from fse_patch.adapters.int4_reading import KeptInt4, int4_of  # noqa: E402
from fse_patch.adapters.pair_proof import start_roles  # noqa: E402
from fse_patch.fusion_core.decision.layout import ExpertLayout  # noqa: E402
from fse_patch.fusion_core.forward.paired import PairedWeights  # noqa: E402
from fse_patch.fusion_core.kernels.expert_weights import ExpertWeights  # noqa: E402
from fse_patch.fusion_core.kernels.int4 import Int4, Layout  # noqa: E402
from fse_patch.fusion_core.kernels.pass_reference import dense  # noqa: E402
from fse_patch.fusion_core.quant.built_int4 import BuiltInt4  # noqa: E402

from . import paired_roles as roles  # noqa: E402

E, H, I = 8, 64, 128  # noqa: E741
LAYOUT = ExpertLayout(E, 1, 2, H, I)
GROUP = 32


def made(seed: int, tiles: bool, zeros: bool) -> PairedWeights:
    """Random words: every pattern of bits is some weight."""
    draw = torch.Generator().manual_seed(seed)

    def bits(*shape: int) -> Any:
        return torch.randint(-(2**31), 2**31 - 1, shape, generator=draw, dtype=torch.int64).int()

    def scales(n: int, k: int) -> Any:
        found = (torch.rand(E, k // GROUP, n, generator=draw) + 0.5) / 100
        return found if tiles else found.transpose(1, 2).contiguous()

    def matrix(n: int, k: int) -> Any:
        return bits(E, k // 16, 2 * n) if tiles else bits(E, n, k // 8).view(torch.uint8)

    def points(n: int, k: int) -> Any:
        return (
            bits(E, k // GROUP, n // 8)
            if tiles
            else bits(E, n // 8, k // GROUP).view(torch.uint8).view(E, n // 2, k // GROUP)
        )

    sizes = ((2 * I, H), (H, I))
    beside = Int4(
        Layout.MARLIN_TILE if tiles else Layout.PACKED_BYTES,
        *(scales(*size) for size in sizes),
        GROUP,
        *((points(*size) for size in sizes) if zeros else (None, None)),
    )
    routed = ExpertWeights(*(matrix(*size) for size in sizes), int4=beside)

    def plain(*shape: int) -> Any:
        return torch.randn(*shape, generator=draw) / 8

    shared = ExpertWeights(plain(1, 2 * I, H), plain(1, H, I))
    return PairedWeights(routed, shared, plain(E, H), plain(1, H))


class Layer(roles.Layer):
    """An engine that keeps experts in 4 bits; its own forward has them as numbers."""

    def __init__(self, number: int, role: Any, tiles: bool, zeros: bool) -> None:
        super().__init__(number, role)
        self.held = made(number, tiles, zeros)
        numbers = [dense(self.held.routed, torch.float32, expert) for expert in range(E)]
        w13, w2 = (torch.stack(all_) for all_ in zip(*numbers, strict=True))
        self.engine_held = replace(self.held, routed=ExpertWeights(w13, w2))


@pytest.fixture
def role_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    merged = replace(roles.decision(LAYOUT, layers=(0, 1)), pairing=roles.decision(LAYOUT, layers=(0, 1)).moe)
    monkeypatch.setattr(roles, "PAIRED", roles.paired(merged))
    monkeypatch.setattr("tests.core.test_paired_layer.LAYOUT", LAYOUT)

    def build(tiles: bool = True, zeros: bool = False) -> Any:
        monkeypatch.setattr(roles, "Layer", lambda number, role: Layer(number, role, tiles, zeros))
        return roles.role_of()

    return build


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("zeros", [True, False])
def test_it_is_proved_and_said(role_of: Callable[..., Any], tiles: bool, zeros: bool) -> None:
    role = role_of(tiles, zeros)
    start_roles([role], roles.Engine())
    assert roles.thresholds(role) == {4}
    told = role.report()["paired"]
    assert (told["proof"]["state"], told["proof"]["ours"] < 2e-5) == ("passed", True)
    (formats,) = told["formats"]
    assert formats.startswith(f"int4 g32{' zero points' if zeros else ''}, ")
    assert formats.endswith(" + float32")


def swapped(words: Any) -> Any:
    size = words.view(torch.uint8)
    return (size << 4 | size >> 4).view(words.dtype)


FAULTS: dict[str, Callable[[ExpertWeights, Int4], ExpertWeights]] = {
    "nibbles swapped": lambda w, _: replace(w, w13=swapped(w.w13)),
    "scales in another order": lambda w, int4: replace(w, int4=replace(int4, w2=int4.w2.roll(1, 2))),
    "zero points off by one": lambda w, int4: replace(
        w,
        int4=replace(int4, w13_zeros=int4.w13_zeros ^ 0x11111111),  # type: ignore[operator]
    ),
    "zero points left out": lambda w, int4: replace(w, int4=replace(int4, w13_zeros=None, w2_zeros=None)),
    "zero points of Humming": lambda w, int4: replace(w, int4=replace(int4, humming=True)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_reading_is_caught(role_of: Callable[..., Any], fault: str) -> None:
    role = role_of(True, True)
    layer = role.layers[0]
    routed = layer.held.routed
    layer.held = replace(layer.held, routed=FAULTS[fault](routed, routed.int4))
    start_roles([role], roles.Engine())
    assert roles.thresholds(role) == {0}
    assert role.loaded.reason.code == "proof.failed"


def test_every_address_of_an_expert_is_held(role_of: Callable[..., Any]) -> None:
    held = role_of(True, True).layers[0].held
    int4 = held.routed.int4
    for changed in (
        replace(int4, w2=int4.w2.clone()),
        replace(int4, w13_zeros=int4.w13_zeros.clone()),
    ):
        moved = replace(held, routed=replace(held.routed, int4=changed))
        assert moved.addresses != held.addresses


BUILT = BuiltInt4("marlin", "bfloat16", "bfloat16", "bfloat16", False, I, GROUP)


def kept(**changes: Any) -> KeptInt4:
    held = made(0, True, False).routed
    int4 = held.int4
    assert int4 is not None
    scales = (int4.w13.bfloat16(), int4.w2.bfloat16())
    return replace(KeptInt4(BUILT, H, (held.w13, held.w2), scales), **changes)


def test_what_an_engine_keeps_is_described() -> None:
    weights = int4_of(kept())
    assert (weights.hidden, weights.width, weights.format) == (H, I, "int4 g32, marlin_tile by marlin")
    humming = int4_of(kept(built=replace(BUILT, packing="humming")))
    assert humming.format == "int4 g32, marlin_tile by humming"


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"built": replace(BUILT, activations="int8")}, "quant.layout", "VLLM_MARLIN_INPUT_DTYPE"),
        ({"built": replace(BUILT, act_order=True)}, "quant.layout", "g_idx"),
        ({"built": replace(BUILT, biases=True)}, "quant.layout", "biases"),
        ({"built": replace(BUILT, scales="float16")}, "quant.layout", "scales are in float16"),
        ({"built": replace(BUILT, width=GROUP)}, "upstream.wrong", "50196"),
        ({"built": replace(BUILT, wrong="the engine's own fault")}, "upstream.wrong", "own fault"),
        ({"built": replace(BUILT, packing="humming", width=64)}, "quant.layout", "padded to 128"),
        ({"built": replace(BUILT, group=64)}, "quant.layout", "w13 scales"),
        ({"built": replace(BUILT, group=48)}, "quant.layout", "groups of 48"),
        ({"hidden": 2 * H}, "quant.layout", "states have 128"),
        ({"built": replace(BUILT, packing="bytes")}, "quant.layout", "H 8 and I 256"),
    ],
)
def test_what_it_keeps_otherwise_is_refused_by_code(changes: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(Unreadable, match=words) as found:
        int4_of(kept(**changes))
    assert found.value.code == code


def test_a_refusal_after_the_load_has_its_own_code(role_of: Callable[..., Any]) -> None:
    role = role_of()

    def wrong() -> Any:
        return int4_of(kept(built=replace(BUILT, width=GROUP)))

    role.layers[1].read = wrong
    start_roles([role], roles.Engine())
    assert role.loaded.reason.code == "upstream.wrong"


def test_empty_tensors_are_none() -> None:
    empty, one = torch.empty(3, 0), torch.ones(1)
    assert int4_reading.pair(empty, one) is None
    assert int4_reading.pair(None, one) is None
    assert int4_reading.pair(one, one) == (one, one)
    assert [int4_reading.group_of(size) for size in (None, -1, 128)] == [0, 0, 128]
