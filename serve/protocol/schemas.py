"""JSON bodies as pydantic models: they validate requests and are the OpenAPI document."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Name = Annotated[str, Field(min_length=1, max_length=200)]


class _Strict(BaseModel):
    """No coercion ("5" is no integer); unknown fields are ignored, as both protocols allow extensions."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


# ------------------------------------------------------------------------------------------- Open Inference Protocol v2


class InputTensor(_Strict):
    name: Name
    shape: list[Annotated[int, Field(ge=0, le=1 << 40)]] = Field(max_length=8)
    datatype: str = Field(max_length=16)
    parameters: dict[str, Any] | None = None
    data: Any | None = None  # flat or nested values; absent where parameters hold binary_data_size


class RequestedOutput(_Strict):
    name: Name
    parameters: dict[str, Any] | None = None


class InferRequestBody(_Strict):
    id: str | None = Field(default=None, max_length=200)
    parameters: dict[str, Any] | None = None
    inputs: list[InputTensor] = Field(min_length=1, max_length=64)
    outputs: list[RequestedOutput] | None = Field(default=None, max_length=64)


class OutputTensor(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class InferResponse(BaseModel):
    model_config = ConfigDict(protected_namespaces=())
    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


class TensorMetadata(BaseModel):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: dict[str, Any]  # the robot (vla.interface.RobotSpec), the action horizon, the checkpoint


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool
    reason: str = ""


class ModelReady(BaseModel):
    name: str
    ready: bool


class Failure(BaseModel):
    """An error outside /v1."""

    error: str


# ------------------------------------------------------------------------------------------------------------- events


class WatchEvent(_Strict):
    """One moment of a running episode, pushed by `vla eval --watch URL`."""

    kind: Literal["start", "frame", "chunk", "end"]
    run: str = Field(min_length=1, max_length=200)
    task: int = Field(ge=0, le=1_000_000)
    episode: int = Field(ge=0, le=1_000_000_000)
    step: int = Field(default=0, ge=0, le=1_000_000_000)
    instruction: str = Field(default="", max_length=2000)
    image: str = Field(default="", max_length=700_000, pattern=r"^[A-Za-z0-9+/]*={0,2}$")  # base64 of a JPEG or PNG file
    actions: list[list[float]] = Field(default=[], max_length=512)  # [H, D]
    confidence: list[list[float]] = Field(default=[], max_length=512)  # [H, D]
    committed: list[list[int]] = Field(default=[], max_length=512)  # [H, D]
    rounds: int = Field(default=0, ge=0, le=100_000)
    milliseconds: float = Field(default=0.0, ge=0.0)
    success: bool = False


class WatchBody(_Strict):
    events: list[WatchEvent] = Field(min_length=1, max_length=64)


class Accepted(BaseModel):
    accepted: int


# ---------------------------------------------------------------------------------------------------------- operations


class Reloaded(BaseModel):
    checkpoint: str
    previous: str
    seconds: float


class Run(BaseModel):
    name: str
    suite: str
    episodes: int
    films: int


class Runs(BaseModel):
    runs: list[Run]


class Episode(BaseModel):
    task: int
    episode: int
    instruction: str
    success: bool
    steps: int
    error: str | None
    rounds: float | None
    policy_ms: float | None
    video: str | None  # path to ask /runs/NAME/films/ for


class Episodes(BaseModel):
    episodes: list[Episode]


def first_error(error: ValidationError) -> str:
    """The first of pydantic's errors in one sentence: where, what, got."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the body"
    got = repr(first.get("input"))
    return f"{place}: {first['msg']}; got {got if len(got) <= 60 else got[:57] + '...'}."


def body_schema(model: type[BaseModel], *, binary: bool = False) -> dict[str, Any]:
    """`openapi_extra` for a body that the route reads by hand."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    for name in list(schema.get("$defs", {})):
        schema = _inlined(schema, name, schema["$defs"][name])
    schema.pop("$defs", None)
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if binary:
        content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: Any, name: str, definition: dict[str, Any]) -> Any:
    """The schema with references to one definition replaced by it."""
    if isinstance(schema, dict):
        if schema.get("$ref") == f"#/components/schemas/{name}":
            return definition
        return {key: _inlined(value, name, definition) for key, value in schema.items()}
    if isinstance(schema, list):
        return [_inlined(value, name, definition) for value in schema]
    return schema
