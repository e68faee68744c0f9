"""Which layout a role gets: merged, paired, or stock."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fse_patch import settings  # noqa: E402
from fse_patch.adapters.start import Settled, laid_out  # noqa: E402
from fse_patch.fusion_core.decision.outcome import Paired, Stock  # noqa: E402
from fse_patch.fusion_core.forward.plan import always  # noqa: E402
from fse_patch.fusion_core.reasons import Reason  # noqa: E402

from .paired_roles import MERGED  # noqa: E402

LORA = Reason("lora", "a test")


@pytest.mark.parametrize(
    ("layout", "plan", "refused", "expected"),
    [
        ("merged", always("split", "t"), False, "Merged"),
        ("paired", always("fused", "t"), False, "Paired"),
        ("paired", always("fused", "t"), True, "Stock"),
        ("auto", always("fused", "t"), False, "Merged"),  # gains beyond few tokens
        ("auto", always("split", "t"), False, "Paired"),
        ("auto", always("split", "t"), True, "Merged"),
    ],
)
def test_which_layout_is_taken(layout: str, plan: Any, refused: bool, expected: str) -> None:
    settled = Settled(MERGED, plan=plan)
    effective = settings.Settings(layout=layout)
    outcome = laid_out(settled, effective, lambda _: iter([LORA] if refused else []))
    assert type(outcome.decision).__name__ == expected
    assert (outcome.plan is plan) == (expected == "Merged")
    if expected == "Stock":
        assert outcome.decision.reason == LORA  # type: ignore[union-attr]


@pytest.mark.parametrize(("layout", "expected"), [("merged", Stock), ("auto", Paired), ("paired", Paired)])
def test_what_does_not_merge_may_pair(layout: str, expected: type) -> None:
    settled = Settled(MERGED.refused(Reason("quant.unproven", "a test")))
    outcome = laid_out(settled, settings.Settings(layout=layout), lambda _: iter(()))
    assert isinstance(outcome.decision, expected)


@pytest.mark.parametrize(("layout", "code"), [("auto", "quant.unproven"), ("paired", "backend.layout")])
def test_a_configuration_that_cannot_be_asked_leaves_a_server_that_starts(layout: str, code: str) -> None:
    def refusals(_: Paired) -> Any:
        raise AttributeError("no such\nargument")
        yield

    settled = Settled(MERGED.refused(Reason("quant.unproven", "a test")))
    decision = laid_out(settled, settings.Settings(layout=layout), refusals).decision
    assert isinstance(decision, Stock)
    assert decision.reason.code == code
    if layout == "paired":
        assert "AttributeError: no such argument" in decision.reason.detail
