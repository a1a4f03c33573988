"""One form of error for everything that can go wrong: OpenAI's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qmoe.serve.engine import Busy, Closing

SECONDS_TO_WAIT = "1"
LONGEST_MESSAGE = 500  # what a client sent may be in it


class Refused(Exception):
    """A request that gets an error for an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message[:LONGEST_MESSAGE])
        self.status, self.code = status, code
        self.param = param and param[:LONGEST_MESSAGE]
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def refusal_of(error: Exception) -> Refused:
    """What a client is told about an error of the engine."""
    retry = {"Retry-After": SECONDS_TO_WAIT}
    if isinstance(error, Refused):
        return error
    if isinstance(error, Busy):
        return Refused(429, str(error), code="queue_full", headers=retry)
    if isinstance(error, Closing):
        return Refused(503, str(error), code="shutting_down", headers=retry)
    if isinstance(error, torch.OutOfMemoryError):
        message = "the GPU has not enough memory for this request; ask for fewer or shorter texts"
        return Refused(503, message, code="out_of_memory", headers=retry)
    if isinstance(error, ValueError):
        return Refused(400, " ".join(str(error).split()))
    first_line = " ".join(str(error).split())[:300]
    return Refused(500, f"{type(error).__name__}: {first_line}", code="internal_error")


def refusal_of_fields(errors: Sequence[Any]) -> Refused:
    """What is wrong with a request's fields: the first of pydantic's complaints."""
    first = errors[0]
    place = [str(p) for p in first["loc"] if p not in ("body", "query")]
    if first["type"] == "json_invalid":
        return Refused(400, "the body is not JSON", code="invalid_json")
    name = place[0] if place else None
    if name is None:
        message = "the body is not a JSON object sent as Content-Type: application/json"
        return Refused(400, message)
    messages = dict.fromkeys(
        e["msg"].removeprefix("Value error, ") for e in errors if e["loc"][1:2] == first["loc"][1:2]
    )
    if first["type"] == "extra_forbidden":
        messages = {"is not a field that this server knows": None}
    if first["type"] == "missing":
        messages = {"is missing": None}
    return Refused(400, f"{'.'.join(place)}: {' or '.join(messages)}", param=name)
