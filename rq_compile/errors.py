"""The exception for mistakes of the user, and how foreign text is shown."""

import re


def printable(text: str) -> str:
    """``text`` with unprintable characters escaped, because foreign names and files must not control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def reason(error: BaseException) -> str:
    """The first sentence of another library's message in ``error``, on one line and without its full stop."""
    sentence, *_ = re.split(r"(?<=\w)\. (?=[A-Z])", " ".join(str(error).split()))
    return printable(sentence).rstrip(".") or type(error).__name__


class UserError(Exception):
    """An error that the user can correct: one sentence that names the thing, the value and the way out.

    The command line prints only the message, without a traceback, and exits with ``exit_status``: 1 if the work
    failed, 2 if it could not start (wrong arguments or files).
    """

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status
