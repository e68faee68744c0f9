"""What ci/gpu_int4.py runs: every kind in each engine, in a dtype that it takes, at widths that are read."""

from __future__ import annotations

import gpu_int4
import pytest

from fse_patch.fusion_core.quant.built_int4 import BuiltInt4, refusal

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("engine", gpu_int4.ARGUMENTS)
@pytest.mark.parametrize("size", gpu_int4.SIZES)
def test_every_kind_is_run_once(engine: str, size: str) -> None:
    groups = gpu_int4.groups(engine, list(gpu_int4.KINDS), size)
    jobs = [job for group in groups.values() for job in group.jobs]
    assert sorted(jobs) == sorted(f"{size}_{kind}" for kind in gpu_int4.KINDS)
    for group in groups.values():
        assert group.paired
        half = engine == "sglang" and any("gptq" in job for job in group.jobs)
        assert group.dtype == ("float16" if half else "bfloat16")


@pytest.mark.parametrize("packing", ["marlin", "humming"])
def test_its_widths_are_read(packing: str) -> None:
    def built(width: int) -> BuiltInt4:
        return BuiltInt4(packing, "bfloat16", "bfloat16", "bfloat16", False, width, 128, width)  # type: ignore[arg-type]

    assert refusal(built(gpu_int4.WIDTH)) is None
    assert refusal(built(512)) is None  # the real one
    if packing == "marlin":
        assert refusal(built(128)) is not None  # the control: that of the other tiny checkpoints


def test_its_kernel_tests_are_there() -> None:
    assert all((gpu_int4.ROOT / name).is_file() for name in gpu_int4.KERNEL_TESTS)


def test_a_report_is_told() -> None:
    proof = {"state": "passed", "ours": 0.001, "stock": 0.002, "between": 0.003}
    now = {"formats": ["int4 g128 + bfloat16"], "reason": "", "threshold": 16, "proof": proof}
    told = gpu_int4.told({"roles": [{"role": "main", "paired": now}]})
    assert told.startswith("int4 g128 + bfloat16; up to 16 tokens; proof passed: ours 0.001 off float32")
    off = now | {"reason": "upstream.wrong", "detail": "why"}
    assert "upstream.wrong: why" in gpu_int4.told({"roles": [{"role": "main", "paired": off}]})
    assert gpu_int4.told({}) == "nothing was paired"
