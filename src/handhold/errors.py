"""The errors a user can meet. Each message is one sentence that says what to do."""

from __future__ import annotations


class HandholdError(Exception):
    """Base of every error that is the user's to mend; the command line prints it without a traceback and exits 3."""

    exit_code = 3


class UnusableInput(HandholdError):
    """The video, masks, landmarks or model file cannot be used."""


class MissingAsset(HandholdError):
    """A weight file is not on this machine; the message names the command that fetches it."""


class StageFailed(HandholdError):
    """A stage found nothing to work with (no hand, no object, nothing registers)."""


class BadConfig(HandholdError):
    """A setting is unknown or has a value that cannot be; the command line exits 2."""

    exit_code = 2


def require(ok: bool, message: str) -> None:
    """Raise `BadConfig` with the message unless `ok`."""
    if not ok:
        raise BadConfig(f"Bad setting: {message}.")
