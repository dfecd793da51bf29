"""The one exception a user's mistake raises, and how foreign text is shown."""

import re


def printable(text: str) -> str:
    """``text`` with whatever is not printable escaped: names and files of others must not steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def reason(error: BaseException) -> str:
    """The first sentence of what another library says in ``error``, on one line and without its full stop."""
    sentence, *_ = re.split(r"(?<=\w)\. (?=[A-Z])", " ".join(str(error).split()))
    return printable(sentence).rstrip(".") or type(error).__name__


class UserError(Exception):
    """What a user can put right: one sentence that names the thing, the value and the way out.

    The command line prints the message alone, without a traceback, and exits with ``exit_status``: 1 when the work
    failed, 2 when it could not start (wrong arguments or files).
    """

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status
