"""Routing of a fused layer on ROCm: AITER's top-k of the routed experts, then the shared slots."""

from __future__ import annotations

from typing import Any

import torch

from ..kernels.aiter import AiterCaps, TopK, grouped_refusal, grouped_topk, softmax_topk
from ..kernels.aiter_check import usable
from ..kernels.routing_reference import route
from .router import FusedRouter


def top_k_refusal(caps: AiterCaps, router: FusedRouter) -> str:
    """Say why AITER does not choose the routed experts of ``router``'s layer, or ""."""
    spec, layout = router.routing, router.layout
    if spec.scoring == "sigmoid":
        return grouped_refusal(caps, spec, layout.num_routed, layout.top_k)
    if caps.topk_softmax is None:
        return caps.why or "topk_softmax is not to be used"
    if spec.routed_scaling_factor != 1.0:
        return "its topk_softmax knows no routed_scaling_factor"
    return ""


class AiterRouter(FusedRouter):
    """A `FusedRouter` whose routed experts AITER chooses, where it does that rightly; else the reference.

    Nothing is kept between calls: buffers that layers share were how upstream lost the shared expert. AITER
    is looked at when the first layer is built, before any graph is captured.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        here = torch.empty(0).device
        if here.type != "meta":
            usable(str(here))

    def choose(self, router_logits: torch.Tensor) -> TopK:
        """Choose the routed experts of each token, as `route` does: a scale is inside the weights.

        Args:
            router_logits: [num_tokens, E], any float dtype.

        Returns:
            ``topk_weights`` float32 and ``topk_ids`` int32, both [num_tokens, k].
        """
        caps = usable(str(router_logits.device))
        if top_k_refusal(caps, self):
            return route(router_logits, self.layout.top_k, self.routing, self.correction_bias)
        if self.routing.scoring == "sigmoid":
            assert self.correction_bias is not None
            return grouped_topk(caps, router_logits, self.correction_bias, self.layout.top_k, self.routing)
        return softmax_topk(caps, router_logits, self.layout.top_k, self.routing.renormalize)

    def __call__(self, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> TopK:
        """Route each token; shapes and dtypes are those of `FusedRouter`."""
        return self.append(hidden_states, *self.choose(router_logits))


def router_class() -> type[FusedRouter]:
    """Return the class that routes a fused layer on this build of torch."""
    return FusedRouter if torch.version.hip is None else AiterRouter
