"""Why a request is not answered: one table of codes, each with its form in HTTP, gRPC, WebSocket and OpenAI's API."""

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Form:
    """How one kind of refusal looks on each wire."""

    http: int  # status
    grpc: str  # name in grpc.StatusCode
    openai: str  # `type` in an OpenAI error object


class Code(Enum):
    """The kinds of refusal. The name is also the first word of a WebSocket error and `code` in OpenAI's errors."""

    INVALID = Form(400, "INVALID_ARGUMENT", "invalid_request_error")
    UNAUTHENTICATED = Form(401, "UNAUTHENTICATED", "authentication_error")
    FORBIDDEN = Form(403, "PERMISSION_DENIED", "permission_error")
    NOT_FOUND = Form(404, "NOT_FOUND", "not_found_error")
    SLOW_BODY = Form(408, "DEADLINE_EXCEEDED", "invalid_request_error")
    CONFLICT = Form(409, "FAILED_PRECONDITION", "invalid_request_error")
    TOO_LARGE = Form(413, "RESOURCE_EXHAUSTED", "invalid_request_error")
    WRONG_TYPE = Form(415, "INVALID_ARGUMENT", "invalid_request_error")
    INTERNAL = Form(500, "INTERNAL", "server_error")
    OVERLOADED = Form(503, "RESOURCE_EXHAUSTED", "overloaded_error")
    UNAVAILABLE = Form(503, "UNAVAILABLE", "unavailable_error")  # starting, restarting or draining
    DEADLINE = Form(504, "DEADLINE_EXCEEDED", "timeout_error")


RETRYABLE = (Code.OVERLOADED, Code.UNAVAILABLE)


class Refusal(Exception):
    """A request that is not answered, with the reason for whoever sent it.

    retry_after_s: when the same request is worth trying again; None if it is not. field, name: the request's field at fault
    and a finer code, for APIs that show them.
    """

    def __init__(
        self, code: Code, message: str, *, retry_after_s: float | None = None, field: str | None = None, name: str | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.message = code, message
        self.field, self.name = field, name or code.name.lower()
        self.retry_after_s = retry_after_s if retry_after_s is not None or code not in RETRYABLE else 1.0

    @classmethod
    def invalid(cls, message: object) -> "Refusal":
        return cls(Code.INVALID, str(message))

    @property
    def line(self) -> str:
        """One line for wires that have only text: "OVERLOADED: ... Retry after 0.050 s."; `parse_line` reads it."""
        text = " ".join(self.message.split())
        after = "" if self.retry_after_s is None else f" Retry after {self.retry_after_s:.3f} s."
        return f"{self.code.name}: {text}{after}"


def parse_line(line: str) -> Refusal:
    """Inverse of `Refusal.line`; a text of another server becomes INTERNAL."""
    name, colon, message = line.partition(": ")
    if not colon or name not in Code.__members__:
        return Refusal(Code.INTERNAL, line)
    text, found, after = message.rpartition(" Retry after ")
    if not found:
        return Refusal(Code[name], message)
    return Refusal(Code[name], text, retry_after_s=float(after.removesuffix(" s.")))
