"""OpenAI's chat completions as pydantic models: what this server reads of a request, and the shape of its answers.

Names and meanings are those of OpenAI's API reference; what is not listed is ignored, except tools, which are refused.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


LogitBias = Annotated[  # OpenAI's limit of entries
    dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100.0, le=100.0)]], Field(max_length=300)
]


class _Read(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class TextPart(_Read):
    type: Literal["text"]
    text: str


class ImageUrl(_Read):
    url: str  # data:image/png;base64,... or image/jpeg; nothing is fetched
    detail: str | None = None


class ImagePart(_Read):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(_Read):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None


class StreamOptions(_Read):
    include_usage: bool | None = None


class ChatBody(_Read):
    model: str = Field(max_length=200)
    messages: list[Message] = Field(min_length=1, max_length=64)
    max_tokens: int | None = Field(default=None, ge=1, le=100_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=100_000)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)  # default 0, the most likely token
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    n: int | None = Field(default=None, ge=1, le=8)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)  # default: another for each request
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    logit_bias: LogitBias | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    remask: "SpeculationOptions | None" = None  # this server's own


class SpeculationOptions(_Read):
    speculate: bool = True  # False: plain decoding, for comparisons; the answer is the same


class TopToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopToken):
    top_logprobs: list[TopToken]


class Logprobs(BaseModel):
    content: list[TokenLogprob]


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int
    message: Answer
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class Speculation(BaseModel):
    """How the engine got there."""

    rounds: int
    drafted_tokens: int
    accepted_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    remask: Speculation


class Completion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class OpenAiError(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAiFailure(BaseModel):
    error: OpenAiError
