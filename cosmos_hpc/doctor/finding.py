"""What a check found."""

from enum import StrEnum
from typing import NamedTuple


class Verdict(StrEnum):
    """How bad it is."""

    PASS = "pass"
    """As it should be."""

    WARN = "warn"
    """Runs would start, but something may be lost, or could not be told from here."""

    FAIL = "fail"
    """Runs would not start, or end in vain."""


class Finding(NamedTuple):
    """One line of the table."""

    check: str
    """What was looked at."""

    verdict: Verdict
    """How bad it is."""

    message: str
    """What was seen; where that is not as it should be, also where, and the mend."""

    @property
    def has_failed(self) -> bool:
        """Whether this alone is a reason not to send anything."""
        return self.verdict is Verdict.FAIL


def passed(check: str, message: str) -> Finding:
    """As it should be."""
    return Finding(check, Verdict.PASS, message)


def warned(check: str, message: str) -> Finding:
    """To know of."""
    return Finding(check, Verdict.WARN, message)


def failed(check: str, message: str) -> Finding:
    """To mend first."""
    return Finding(check, Verdict.FAIL, message)
