"""What the processes of an engine did otherwise than decided: no patch may stay out unseen, in no stage."""

from __future__ import annotations

from typing import Any

from ..fusion_core.decision.outcome import Merged, Paired

Worker = dict[str, Any]


def by_stage(workers: list[Worker]) -> dict[int, list[Worker]]:
    """Return reports of processes by their pipeline stage, the first stage first."""
    stages: dict[int, list[Worker]] = {}
    for worker in sorted(workers, key=lambda worker: worker.get("stage", 0)):
        stages.setdefault(worker.get("stage", 0), []).append(worker)
    return stages


def ran_as_decided(decision: Merged | Paired, workers: list[Worker]) -> list[str]:
    """Return what a role did otherwise than decided, in any worker.

    A stage of several runs its own layers; all of them together are those that were decided.
    """
    decided, stages = list(decision.moe.layers), by_stage(workers)
    problems: list[str] = []
    held: list[int] = []
    for mine in stages.values():
        layers = decided if len(stages) == 1 else _built(decision, mine)
        held += layers
        for worker in mine:
            problems += _of_worker(decision, worker, layers)
    if stages and sorted(held) != decided:
        why = "".join(dict.fromkeys(_refused(decision, worker) for worker in workers))
        problems.append(
            f"{decision.role} model: the {len(stages)} stages have built layers {sorted(held)}, "
            f"{decided} were decided{why}"
        )
    return problems


def _built(decision: Merged | Paired, workers: list[Worker]) -> list[int]:
    """Return the layers of a stage: those that any of its processes has built."""
    roles = (_role(decision, worker) for worker in workers)
    return sorted({number for role in roles if role is not None for number in role["built_layers"]})


def _role(decision: Merged | Paired, worker: Worker) -> dict[str, Any] | None:
    return next((role for role in worker["roles"] if role["role"] == decision.role), None)


def _refused(decision: Merged | Paired, worker: Worker) -> str:
    refused = [entry for entry in worker.get("refused", ()) if entry["role"] == decision.role]
    return "".join(f": {entry['reason']}: {entry['detail']}" for entry in refused)


def _of_worker(decision: Merged | Paired, worker: Worker, layers: list[int]) -> list[str]:
    """Return what one process did otherwise, which should run ``layers``."""
    where = f"{decision.role} model, process {worker['pid']}"
    role = _role(decision, worker)
    if role is None:
        return [f"{where}: was not fused{_refused(decision, worker)}"] if layers else []
    problems = []
    if role["fused_layers"] != layers:
        problems.append(f"{where}: layers {role['fused_layers']} ran fused, {layers} were decided")
    if role.get("canary", {}).get("state") == "pending":
        problems.append(f"{where}: was not compared with its checkpoint before serving")
    slots = len(layers) * decision.moe.layout.num_shared_slots
    # Where the engine fuses by itself, its own loader fills the slots; paired layers have none.
    left = role.get("native") or role.get("weight_layout") == "paired"
    if not left and role["slots_loaded"] != slots:
        problems.append(f"{where}: {role['slots_loaded']} of {slots} shared slots were loaded")
    return problems
