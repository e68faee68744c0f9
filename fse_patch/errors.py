"""The errors that users see: one line each, with the exit status the command line gives them."""


class FsePatchError(Exception):
    """Bad input or a patch that cannot be applied. The text says what, where and what to do."""

    exit_status = 2


class RefusedError(FsePatchError):
    """A request that fse_patch understands and declines, with a stable reason code."""

    exit_status = 3

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class AuditError(FsePatchError):
    """A shared-expert slot was not written as decided: the model must not be served."""

    exit_status = 1


class NoReference(FsePatchError):
    """The checkpoint's tensors do not say what a layer computes; the text says why."""
