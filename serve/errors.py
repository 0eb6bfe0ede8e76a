"""What can be wrong with a request: each refused before any compute, with the field at fault and a code for every protocol."""


class RequestError(ValueError):
    """A request that the engine does not take. `field` names what to change, `code` is stable across versions."""

    code = "invalid_request"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class InvalidRequest(RequestError):
    """A value out of range or of the wrong type."""


class PromptTooLong(RequestError):
    """Prompt, images and answer do not fit into the context."""

    code = "context_length_exceeded"


class TooManyImages(RequestError):
    """More images than the model has places for."""

    code = "too_many_images"

    @classmethod
    def check(cls, count: int, most: int) -> None:
        if count > most:
            raise cls("images", f"{count} images; this model takes at most {most}.")


class InvalidImage(RequestError):
    """Not uint8 [H, W, 3], too large, or smaller than what the model crops."""

    code = "invalid_image"


class QueueFull(RequestError):
    """Overload: nothing is wrong with the request, only with the moment."""

    code = "queue_full"

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(
            "queue", f"{waiting} requests are waiting already, which is the limit; try again in {retry_after:.1f} s."
        )
        self.retry_after = retry_after  # seconds
