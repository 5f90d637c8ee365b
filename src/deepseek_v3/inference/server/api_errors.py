"""The errors of the server, each with its HTTP status and the JSON body that clients of OpenAI's API know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_v3.utils.errors import UserError

RETRY_SECONDS = 2  # what Retry-After tells a client that was refused because of load
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(UserError):
    """A request that is refused or has failed.

    `status` is the HTTP status; `param` names the field of the body that is at fault, and `code` the kind of error,
    if there is one. `headers` are sent with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def overloaded(message: str) -> ApiError:
    """The refusal of a request for which there is no room now."""
    return ApiError(429, message, code="overloaded", headers={"Retry-After": str(RETRY_SECONDS)})


def stopping() -> ApiError:
    """The refusal of a request, or the end of one, because the server stops."""
    return ApiError(
        503, "the server is stopping", code="stopping", headers={"Retry-After": "30", "Connection": "close"}
    )


def engine_failed() -> ApiError:
    """The end of a request whose engine has failed."""
    return ApiError(500, "the engine has failed; the server's log says why", code="engine_failed")


def invalid_body(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error of a body that does not validate, from the list that pydantic makes; it names the first problem."""
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "cannot be parsed")
        return ApiError(400, f"the body is not JSON: {reason}", code="invalid_json")
    param = _field(first)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: is unknown or not supported", param, code="unknown_parameter")
    reasons = dict.fromkeys(problem["msg"] for problem in problems if _field(problem) == param)
    return ApiError(400, f"{param or 'the body'}: {', or '.join(reasons)}", param, code="invalid_value")


def _field(problem: Mapping[str, Any]) -> str | None:
    """The place of a problem in the body, such as `messages.0.role`, without the types of a union."""
    parts = (str(part) for part in problem["loc"] if part not in ("body", "str"))
    return ".".join(part for part in parts if part.isidentifier() or part.isdecimal()) or None
