"""The exceptions that `dab` raises on purpose: one clear message each; `main()` alone turns it into an exit code.

A bug is any other exception and keeps its traceback.
"""

from typing import ClassVar


class DabError(Exception):
    """Something went wrong that a person can act on: a worker died, a file is damaged, a server does not answer."""

    exit_code: ClassVar[int] = 1


class InvalidInputError(DabError, ValueError):
    """The user asked for something that cannot be: an unknown key, a range outside the model, a missing file.

    The message starts with the field or file it is about and says the value, the limit and what to do.
    """

    exit_code: ClassVar[int] = 2
