"""Requests that are not answered, in the form of OpenAI's errors."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

# Seconds after which a client may try again.
RETRY_AFTER = "1"
KINDS = {
    400: "invalid_request_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class Refusal(Exception):
    """A request that is not answered: its status, and one sentence for the client. ``parameter`` is the field at fault."""

    def __init__(self, status: int, message: str, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.parameter = parameter
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.parameter, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": RETRY_AFTER} if self.status in (429, 503) else None
        return JSONResponse(self.body, self.status, headers)
