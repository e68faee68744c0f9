"""Stand-ins for the kernels of a layer: they take a launch, and run nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from fse_patch.fusion_core.kernels import experts, experts_fp8, experts_once, route, router_logits, work_list

KERNELS: dict[ModuleType, tuple[str, ...]] = {
    experts: ("_w13", "_w2"),
    experts_fp8: ("w13_kernel", "w2_kernel"),
    experts_once: ("w13_kernel", "w2_kernel"),
    work_list: ("_work",),
    route: ("_route",),
    router_logits: ("_router_logits", "_product"),
}
CONSTANT = "constant"


class StandIn:
    """Takes the place of a kernel.

    Args:
        name: with that of its module.
        kernel: as `triton.jit` made it, interpreted or not.
        take: gets the name, the kernel and all arguments of a launch by name.
    """

    def __init__(self, name: str, kernel: Any, take: Callable[[StandIn, dict[str, Any]], None]) -> None:
        self.name, self.kernel, self.take = name, kernel, take
        self.parameters = inspect.signature(kernel.fn).parameters
        told = getattr(kernel, "kwargs", None) or vars(kernel)
        self.plain = set(told["do_not_specialize"] or ())

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.take(self, {**dict(zip(self.parameters, args, strict=False)), **kwargs})

        return launch

    def kind(self, name: str, value: Any) -> Any:
        """Return what of an argument makes it another kernel, as Triton has it.

        Of a tensor its dtype and whether it is aligned, of a number its type or whether it is 1 and whether
        it is a multiple of 16; `CONSTANT` for a constant, None for an option of the launch.
        """
        if name not in self.parameters:
            return None
        if "constexpr" in str(self.parameters[name].annotation):
            return CONSTANT
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if isinstance(value, float) or name in self.plain:
            return type(value)
        return value == 1, value % 16 == 0


def stand_ins(take: Callable[[StandIn, dict[str, Any]], None]) -> Iterator[tuple[ModuleType, str, StandIn]]:
    """Yield module, name and stand-in of every kernel."""
    for module, names in KERNELS.items():
        for name in names:
            short = f"{module.__name__.rpartition('.')[2]}.{name}"
            yield module, name, StandIn(short, getattr(module, name), take)
