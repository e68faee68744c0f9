"""What of SGLang's runtime configuration forbids to pair a checkpoint that could be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...fusion_core.decision.outcome import Paired
from ...fusion_core.decision.paired_places import unrun
from ...fusion_core.reasons import Reason
from ...settings import CPU_THRESHOLD, LAYOUT, Settings
from ..running_config import config_differs
from . import native
from .refusals import RUNNERS, SIMULATORS

# Modules that the pass reads: an adapter on one of them would be left out.
READ = {"gate", "shared_expert_gate", "experts", "gate_up_proj", "gate_proj", "up_proj", "down_proj", "all"}
# Switches under which blocks run in pieces, or allocate in memory that other processes see.
IN_PIECES = ("enable_two_batch_overlap", "enable_single_batch_overlap", "enable_symm_mem")


def pair_refusals(decision: Paired, model_config: Any, effective: Settings) -> Iterator[Reason]:
    """Say what of the runtime configuration forbids to pair, first reason first."""
    from sglang.srt.environ import envs
    from sglang.srt.layers.moe import get_moe_a2a_backend, get_moe_runner_backend
    from sglang.srt.runtime_context import get_server_args
    from sglang.srt.utils import get_device_name

    server, platform = get_server_args(), native.platform()
    if platform == "cpu":
        if not effective.cpu_threshold:
            yield Reason("backend.layout", f"a CPU pairs for tests alone; set {CPU_THRESHOLD} for one")
    elif effective.layout != "paired" and (reason := unrun(decision.engine, platform, get_device_name())):
        yield Reason(reason.code, f"{reason.detail}; {LAYOUT}=paired takes it anyway")
    if server.enable_eplb or server.ep_num_redundant_experts:
        yield Reason("parallel.eplb", "the expert load balancer is on; run without --enable-eplb")
    if not get_moe_a2a_backend().is_none():
        yield Reason("parallel.all2all", "tokens go to their experts' ranks; run without --moe-a2a-backend")
    if server.dp_size > 1 or server.enable_dp_attention:
        yield Reason("parallel.all2all", "tokens are gathered from other ranks; run without data parallelism")
    for name in IN_PIECES:
        if getattr(server, name, False):
            flag = name.replace("_", "-")
            yield Reason("backend.layout", f"blocks run in pieces; run without --{flag}")
    if server.enable_lora or server.lora_paths:
        targets = getattr(server, "lora_target_modules", None)
        if not targets or any(name.rpartition(".")[2] in READ for name in targets):
            why = "LoRA may touch experts; give --lora-target-modules without MLP and experts"
            yield Reason("lora", why)
    runner = get_moe_runner_backend().value
    if runner not in RUNNERS:
        yield Reason(
            "backend.layout", f"--moe-runner-backend is {runner}; use one of {', '.join(sorted(RUNNERS))}"
        )
    if server.kt_weight_path is not None:
        yield Reason(
            "backend.routing", "KTransformers runs experts by their number; run without --kt-weight-path"
        )
    if server.enable_return_routed_experts or server.expert_distribution_recorder_mode:
        yield Reason("routing.capture", "routed experts are recorded; run without that")
    if any(setting is not None and setting.get() for setting in (getattr(envs, n, None) for n in SIMULATORS)):
        yield Reason("routing.simulator", f"one of {', '.join(SIMULATORS)} is set; unset it")
    if server.enable_deterministic_inference:
        why = "with --enable-deterministic-inference, another way for another batch breaks its promise"
        yield Reason("slower.unmeasured", why)
    yield from config_differs(decision, model_config.hf_text_config)
