"""Compiles for a GPU that is not here what a paired layer launches, and prints what each kernel needs.

    TRITON_INTERPRET=0 python -m tests.kernels.compiled BACKEND ARCHITECTURE WARP_SIZE MEMORY FORMAT ...

A line of JSON for each kernel that fits: its name, the format of routed and shared experts, the number of
tokens, its bytes of shared memory, and whether a tile with fewer stages had to be taken. Ends with Triton's
error where one does not compile, or does not fit.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
import triton.language.target_info
from triton import OutOfResources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.forward import paired, paired_pass
from fse_patch.fusion_core.forward.paired import OutputScale, PairedLayer, PairedWeights
from fse_patch.fusion_core.forward.plan import ModeCounter

from ..core.moe import moe_spec
from .formats import experts_in
from .launches import CONSTANT, StandIn, stand_ins
from .test_kernels import draw
from .test_shared_apart import weights_in

# Widths of Qwen3-Next, and few experts: no kernel has to do with their number.
HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 512, 4, 3
TOKENS = (1, 16)
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}
DIVISIBLE = [["tt.divisibility", 16]]


def compile_for(target: GPUTarget, stand_in: StandIn, given: dict[str, Any]) -> Any:
    """Compile one launch as Triton would on the target's device."""
    if "PDL" in given:
        given["PDL"] = target.backend == "cuda" and int(target.arch) >= 90
    if "WIDE" in given:  # for the interpreter alone
        given["WIDE"] = False
    signature, constants, attributes = {}, {}, {}
    for at, name in enumerate(stand_in.parameters):
        value, kind = given[name], stand_in.kind(name, given[name])
        signature[name] = "constexpr"
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if kind[1]:
                attributes[(at,)] = DIVISIBLE
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif kind is int or (isinstance(kind, tuple) and not kind[0]):
            signature[name] = "i32"
            if isinstance(kind, tuple) and kind[1]:
                attributes[(at,)] = DIVISIBLE
        else:
            assert kind == CONSTANT or kind[0]
            constants[(at,)] = value
    source = ASTSource(stand_in.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": given["num_warps"]})


def launch(held: PairedWeights, tokens: int) -> None:
    """Launch all of a layer with such weights."""
    spec = moe_spec(ExpertLayout(EXPERTS, 1, TOP_K, HIDDEN, WIDTH))
    layer = PairedLayer(0, spec, lambda: held, ModeCounter())
    states = draw(tokens, HIDDEN, seed=4, dtype=torch.bfloat16)
    layer(states, states, OutputScale(), torch.empty_like(states))


def main(backend: str, architecture: str, warp_size: str, memory: str, *formats: str) -> None:
    """Run the pass in each format, "routed+shared"."""
    arch = int(architecture) if backend == "cuda" else architecture
    target, limit = GPUTarget(backend, arch, int(warp_size)), int(memory)

    def current_target() -> GPUTarget:
        return target

    current_target.__triton_builtin__ = True  # type: ignore[attr-defined]
    triton.language.target_info.current_target = current_target
    now: dict[str, Any] = {}
    failed: list[str] = []

    def take(stand_in: StandIn, given: dict[str, Any]) -> None:
        shared = int(compile_for(target, stand_in, given).metadata.shared)
        if shared > limit:  # as Triton's launch ends
            failed.append(stand_in.name)
            raise OutOfResources(shared, limit, "shared memory")
        fewer = stand_in.name in failed
        failed.clear()
        print(json.dumps({**now, "kernel": stand_in.name, "shared": shared, "fewer": fewer}), flush=True)

    for module, name, stand_in in list(stand_ins(take)):
        setattr(module, name, stand_in)
    paired.on_gpu = paired_pass.on_gpu = lambda _: True
    torch.version.hip = "7.0" if backend == "hip" else None
    gate, shared_gate = (draw(rows, HIDDEN, seed=8, dtype=torch.bfloat16) for rows in (EXPERTS, 1))
    for pair in formats:
        routed, shared = pair.split("+")
        weights = experts_in(routed, EXPERTS, HIDDEN, WIDTH), weights_in(shared, 1, HIDDEN, WIDTH, 7)[0]
        for tokens in TOKENS:
            now.update(format=pair, tokens=tokens)
            launch(PairedWeights(*weights, gate, shared_gate), tokens)


if __name__ == "__main__":
    main(*sys.argv[1:])
