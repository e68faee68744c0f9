"""What stops a model is told in a line of its own, once."""

from __future__ import annotations

import logging

import pytest

from fse_patch.adapters.stop import stop_told
from fse_patch.errors import AuditError


@stop_told()
def inner(error: Exception | None) -> str:
    if error is not None:
        raise error
    return "served"


@stop_told()
def outer(error: Exception | None) -> str:
    return inner(error)


def test_an_error_of_ours_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AuditError, match="no slot"):
        outer(AuditError("main model: no slot"))
    (record,) = caplog.records
    assert record.levelno == logging.CRITICAL
    assert record.getMessage() == "stopped: AuditError: main model: no slot"
    # Another one of the same text.
    with pytest.raises(AuditError):
        inner(AuditError("main model: no slot"))
    assert len(caplog.records) == 2


def test_other_errors_are_the_engines(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyError):
        outer(KeyError("experts"))
    assert outer(None) == "served"
    assert caplog.records == []
