"""Errors that are the user's to mend: one message, no traceback, exit status 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad arguments, configuration or data; the message says what was given, what is allowed and what to do
    next.
    """


class Agreed(UserError):
    """An error that all processes of a run have alike; the first one tells it."""


def one_line(text: object, *, first: int = 200, last: int = 250) -> str:
    """A message without line ends; of a long one the beginning and the end."""
    line = " ".join(str(text).split())
    return line if len(line) <= first + last + 5 else f"{line[:first]} ... {line[-last:]}"


def unknown(kind: str, given: str, choices: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with close matches and all choices."""
    choices = sorted(choices)
    close = difflib.get_close_matches(given, choices, n=1, cutoff=0.6)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    return UserError(f"unknown {kind} '{given}'{hint} available: {', '.join(choices) or 'none'}")
