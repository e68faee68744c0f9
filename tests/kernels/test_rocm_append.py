"""ROCm's router with the real append kernel: interpreted on a fake AITER, on a GPU on the reference."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from fse_patch.fusion_core.forward import router as routing
from fse_patch.fusion_core.forward.aiter_router import AiterRouter
from fse_patch.fusion_core.forward.router import FusedRouter

from ..fakes.aiter_profiles import PROFILES, installed
from ..rocm.test_router import LAYERS, alike, build, draw
from .test_kernels import DEVICE


@pytest.mark.parametrize("profile", PROFILES if DEVICE == "cpu" else [None])
@pytest.mark.parametrize("name", LAYERS)
def test_the_slots_are_appended_as_by_the_reference(name: str, profile: str | None) -> None:
    wanted = build(name, FusedRouter)(*draw(name))
    with (
        installed(None if profile is None else PROFILES[profile]),
        patch.object(routing, "on_gpu", lambda _: True),
    ):
        router = build(name, AiterRouter)
        bias = getattr(router, "correction_bias", None)
        if bias is not None:
            router.correction_bias = bias.to(DEVICE)  # type: ignore[attr-defined]
        weights, ids = (part.cpu() for part in router(*(part.to(DEVICE) for part in draw(name))))
    assert alike((weights, ids), wanted)
    top_k = LAYERS[name][0].top_k
    assert ids[:, top_k:].tolist() == wanted[1][:, top_k:].tolist()
    # The control: a slot's weight 1 % off.
    weights[:, top_k] *= 1.01
    assert not alike((weights, ids), wanted)
