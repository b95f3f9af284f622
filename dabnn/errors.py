"""The exceptions that `dab` raises on purpose: one clear message each; `main()` alone turns it into an exit code.

A bug is any other exception and keeps its traceback.
"""

from collections.abc import Mapping
from typing import ClassVar


class DabError(Exception):
    """Something went wrong that a person can act on: a worker died, a file is damaged, a server does not answer."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, details: Mapping[str, object] | None = None) -> None:
        """Take the message, and what a program that reads JSON should get beside it."""
        super().__init__(message)
        self.details = dict(details or {})


class PassingError(DabError):
    """Something that another attempt may well not meet: a helper process was killed, a store did not answer."""


class InvalidInputError(DabError, ValueError):
    """The user asked for something that cannot be: an unknown key, a range outside the model, a missing file.

    The message starts with the field or file it is about and says the value, the limit and what to do.
    """

    exit_code: ClassVar[int] = 2
