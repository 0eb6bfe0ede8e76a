"""OpenAI's API on the speculative engine: /v1/models and /v1/chat/completions, whole or streamed."""

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from serve.chat import ChatBackend, ChatEnd, ChatPiece, ChatRequest, TokenProbability
from serve.errors import TooManyImages
from serve.http_body import read_body, while_connected
from serve.http_guard import openai_error
from serve.protocol import chat_schemas as api
from serve.protocol.images import decode_data_url
from serve.protocol.limits import Limits
from serve.protocol.oip_json import load_json
from serve.protocol.refusal import Code, Refusal
from serve.protocol.schemas import body_schema, first_error
from serve.services import Services

STARTED = 0  # `created` of a model: unknown, and nobody's business
FAILURES = {code: {"model": api.OpenAiFailure} for code in (400, 401, 403, 404, 408, 413, 415, 503, 504)}


def chat_router(services: Services) -> APIRouter:
    """The routes under /v1."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    def models() -> list[api.Model]:
        chat = services.chat
        return [] if chat is None else [api.Model(id=chat.name, created=STARTED, owned_by="remask")]

    @router.get("/models")
    async def list_models() -> api.Models:
        return api.Models(data=models())

    @router.get("/models/{model}", responses={404: {"model": api.OpenAiFailure}})
    async def get_model(model: str) -> api.Model:
        found = [entry for entry in models() if entry.id == model]
        if not found:
            raise _no_model(model, services.chat)
        return found[0]

    @router.post(
        "/chat/completions",
        response_model=None,
        responses={200: {"model": api.Completion, "content": {"text/event-stream": {}}}} | FAILURES,
        openapi_extra=body_schema(api.ChatBody),
    )
    async def complete(request: Request) -> Response:
        """One answer, or its pieces as server-sent events; `remask` in a piece says how many tokens one round brought."""
        body = await read_body(request, services.limits)
        asked = parse(body, services.limits)
        chat = services.need_chat()
        if asked.model != chat.name:
            raise _no_model(asked.model, chat)
        questions = await asyncio.to_thread(requests_of, asked, services.limits, chat.max_images)
        answer = _Answer(asked, chat, services.limits)
        if not asked.stream:
            return Response(
                (await while_connected(request, answer.whole(questions))).model_dump_json(), media_type="application/json"
            )
        pieces = answer.pieces(questions)
        first = await while_connected(request, anext(pieces))  # what is wrong with the request is an error status, not an event
        return StreamingResponse(_events(first, pieces), media_type="text/event-stream", headers={"cache-control": "no-store"})

    return router


def parse(body: bytes, limits: Limits) -> api.ChatBody:
    """Raises Refusal naming the field that is wrong."""
    try:
        asked = api.ChatBody.model_validate(load_json(body))
    except ValidationError as error:
        field_name = ".".join(str(part) for part in error.errors()[0]["loc"]) or None
        raise Refusal(Code.INVALID, first_error(error), field=field_name, name="invalid_request") from error
    if asked.tools or asked.functions:
        raise Refusal(Code.INVALID, "Tools are not supported; ask in words.", field="tools", name="unsupported")
    if asked.response_format and asked.response_format.get("type", "text") != "text":
        raise Refusal(
            Code.INVALID, "Only response_format {type: text} is supported.", field="response_format", name="unsupported"
        )
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Refusal(Code.INVALID, "top_logprobs needs logprobs: true.", field="top_logprobs", name="invalid_request")
    return asked


def requests_of(asked: api.ChatBody, limits: Limits, max_images: int | None = None) -> list[ChatRequest]:
    """One request per choice; they differ in the seed. Decodes the images, unless the model has no place for as many. Raises Refusal."""
    messages, images = _conversation(asked, limits, max_images)
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    for text in stop:
        _check_unicode(text, "stop")
    seed = secrets.randbits(62) if asked.seed is None else asked.seed % (1 << 63)
    request = ChatRequest(
        messages=messages,
        images=images,
        max_tokens=asked.max_completion_tokens or asked.max_tokens,
        temperature=asked.temperature or 0.0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        stop=tuple(stop),
        top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (asked.logit_bias or {}).items()},
        speculate=asked.remask is None or asked.remask.speculate,
    )
    return [replace(request, seed=(seed + index) % (1 << 63)) for index in range(asked.n or 1)]


def _conversation(asked: api.ChatBody, limits: Limits, max_images: int | None) -> tuple[tuple[tuple[str, str], ...], tuple[Any, ...]]:
    """Texts by turn, and the images of all turns in order."""
    messages, urls = [], []
    for message in asked.messages:
        content = message.content if message.content is not None else ""
        parts = [api.TextPart(type="text", text=content)] if isinstance(content, str) else content
        messages.append((message.role, "\n".join(part.text for part in parts if isinstance(part, api.TextPart))))
        urls += [part.image_url.url for part in parts if isinstance(part, api.ImagePart)]
    count = sum(len(text) for _, text in messages)
    if count > limits.prompt_chars:
        raise Refusal(
            Code.TOO_LARGE, f"The messages have {count} characters; {limits.prompt_chars} are the limit.", field="messages"
        )
    if len(urls) > limits.images:
        raise Refusal(
            Code.TOO_LARGE, f"The messages have {len(urls)} images; at most {limits.images} are accepted.", field="messages"
        )
    try:
        TooManyImages.check(len(urls), limits.images if max_images is None else max_images)
    except TooManyImages as error:
        raise Refusal(Code.INVALID, str(error), field=error.field, name=error.code) from error
    for _, text in messages:
        _check_unicode(text, "messages")
    images = [decode_data_url(url, max_bytes=limits.body_bytes, max_pixels=limits.pixels) for url in urls]
    return tuple(messages), tuple(images)


def _check_unicode(text: str, field_name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(Code.INVALID, f"A text of {field_name} is not Unicode: {error}", field=field_name) from error


@dataclass
class _Collected:
    """One choice as it grows."""

    text: str = ""
    logprobs: list[TokenProbability] = field(default_factory=list)
    end: ChatEnd | None = None


class _Answer:
    """The choices of one request, whole or in pieces."""

    def __init__(self, asked: api.ChatBody, chat: ChatBackend, limits: Limits) -> None:
        self.asked, self.chat, self.limits = asked, chat, limits
        self.id, self.created, self.checkpoint = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), chat.checkpoint

    async def whole(self, questions: list[ChatRequest]) -> api.Completion:
        choices = [_Collected() for _ in questions]
        async for index, event in self._merged(questions):
            choice = choices[index]
            if isinstance(event, ChatEnd):
                choice.end = event
            else:
                choice.text += event.text
                choice.logprobs += event.logprobs or ()
        return api.Completion(
            id=self.id,
            created=self.created,
            model=self.chat.name,
            system_fingerprint=self.checkpoint,
            choices=[
                api.Choice(
                    index=index,
                    message=api.Answer(content=choice.text),
                    logprobs=_logprobs(choice.logprobs) if self.asked.logprobs else None,
                    finish_reason=choice.end.reason,
                )
                for index, choice in enumerate(choices)
            ],
            usage=_usage([choice.end for choice in choices]),
        )

    async def pieces(self, questions: list[ChatRequest]) -> AsyncIterator[dict[str, Any]]:
        """Chunks in OpenAI's form. The first comes when the engine has begun; `remask` says what a round brought."""
        ends: list[ChatEnd] = []
        rounds = [0] * len(questions)
        greeted: set[int] = set()
        async for index, event in self._merged(questions):
            delta: dict[str, Any] = {} if index in greeted else {"role": "assistant", "content": ""}
            greeted.add(index)
            if isinstance(event, ChatEnd):
                ends.append(event)
                yield self._chunk(index, delta, finish_reason=event.reason)
                continue
            rounds[index] += 1
            told = {"round": rounds[index], "tokens": event.num_tokens, "accepted": event.num_accepted}
            logprobs = _logprobs(event.logprobs).model_dump() if event.logprobs is not None else None
            yield self._chunk(index, delta | {"content": event.text}, logprobs=logprobs) | {"remask": told}
        if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
            yield self._head() | {"choices": [], "usage": _usage(ends).model_dump()}

    async def _merged(self, questions: list[ChatRequest]) -> AsyncIterator[tuple[int, ChatPiece | ChatEnd]]:
        """Events of all choices as they come. Raises Refusal of the first that fails, and DEADLINE after the longest time."""
        events: asyncio.Queue[tuple[int, ChatPiece | ChatEnd | Refusal | Exception]] = asyncio.Queue()

        async def follow(index: int, question: ChatRequest) -> None:
            try:
                async for event in self.chat.stream(question):
                    events.put_nowait((index, event))
            except Exception as error:  # raised again below, in the request's own task
                events.put_nowait((index, error))

        tasks = [asyncio.ensure_future(follow(index, question)) for index, question in enumerate(questions)]
        until = time.monotonic() + self.limits.chat_timeout_s
        try:
            left = len(questions)
            while left:
                try:
                    async with asyncio.timeout(max(0.0, until - time.monotonic())):
                        index, event = await events.get()
                except TimeoutError:
                    raise Refusal(
                        Code.DEADLINE, f"The answer took longer than {self.limits.chat_timeout_s:.0f} s; lower max_tokens."
                    ) from None
                if isinstance(event, Exception):
                    raise event
                left -= isinstance(event, ChatEnd)
                yield index, event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.chat.name,
            "system_fingerprint": self.checkpoint,
        }

    def _chunk(
        self, index: int, delta: dict[str, Any], *, logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        return self._head() | {
            "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]
        }


async def _events(first: dict[str, Any], pieces: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Server-sent events; an error in the middle is the last of them, as OpenAI's clients expect."""
    try:
        yield _line(first)
        async for piece in pieces:
            yield _line(piece)
        yield b"data: [DONE]\n\n"
    except Refusal as refusal:
        yield _line({"error": openai_error(refusal)})
    finally:
        await pieces.aclose()


def _line(piece: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(piece)}\n\n".encode()


def _logprobs(tokens: Any) -> api.Logprobs:
    def entry(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": max(logprob, -9999.0), "bytes": list(token.encode())}

    return api.Logprobs(
        content=[
            api.TokenLogprob(
                **entry(token.token, token.logprob), top_logprobs=[api.TopToken(**entry(*other)) for other in token.top]
            )
            for token in tokens
        ]
    )


def _usage(ends: list[ChatEnd]) -> api.Usage:
    """Of all choices together; the prompt is one for all."""

    def total(name: str) -> int:
        return sum(int(end.usage[name]) for end in ends)

    prompt, completion = int(ends[0].usage["prompt_tokens"]), total("completion_tokens")
    return api.Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        remask=api.Speculation(
            rounds=total("rounds"), drafted_tokens=total("drafted_tokens"), accepted_tokens=total("accepted_tokens")
        ),
    )


def _no_model(model: str, chat: ChatBackend | None) -> Refusal:
    there = f"there is {chat.name!r}" if chat is not None else "this server has no language model (--vlm.path=FOLDER)"
    return Refusal(Code.NOT_FOUND, f"There is no model {model!r:.80}; {there}.", field="model", name="model_not_found")
