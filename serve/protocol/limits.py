"""How much one client may ask for. Every limit answers with its own number and what to do instead."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a server; a request beyond one of them is refused before anything is computed."""

    body_bytes: int = 16 << 20  # an HTTP body, a gRPC message, a WebSocket message
    json_bytes: int = 4 << 20  # JSON in it; tensors beyond that go as binary
    batch: int = 64  # observations in one request
    images: int = 128  # images in one request
    pixels: int = 1 << 22  # width x height of one image
    concurrency: int = 256  # requests being handled, all protocols together
    streams: int = 128  # open WebSockets, gRPC sessions and event streams
    pipelined: int = 8  # unanswered messages of one WebSocket; reading stops there
    timeout_s: float = 10.0  # deadline of a request that names none
    max_timeout_s: float = 60.0
    chat_timeout_s: float = 120.0  # deadline of a whole chat completion
    header_s: float = 10.0  # from a connection to its complete HTTP headers
    body_s: float = 20.0  # from the headers to the complete body
    idle_s: float = 600.0  # a stream without a message is closed
    instruction_chars: int = 2000
    prompt_chars: int = 64_000

    def __post_init__(self) -> None:
        wrong = [name for name, value in vars(self).items() if value <= 0]
        if wrong:
            raise ValueError(f"Limits.{wrong[0]} is {getattr(self, wrong[0])}; it must be positive.")
