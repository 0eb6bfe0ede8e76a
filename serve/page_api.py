"""What the page at `/` reads and evaluations write: static files, the event stream, run folders."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from pydantic import ValidationError

from serve.events import sse
from serve.http_body import read_body
from serve.protocol.oip_json import load_json
from serve.protocol.refusal import Code, Refusal
from serve.protocol.schemas import Accepted, Episodes, Failure, Runs, WatchBody, body_schema, first_error
from serve.recordings import film, list_episodes, list_runs
from serve.services import Services

PAGE = Path(__file__).parent / "page"
FILES = {"index.html": "text/html", "app.js": "text/javascript", "chunk.js": "text/javascript", "style.css": "text/css"}
MISSING = {404: {"model": Failure}}


def page_router(services: Services) -> APIRouter:
    """The page and its data."""
    router = APIRouter(tags=["page"])

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        return FileResponse(PAGE / "index.html", media_type="text/html")

    @router.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in FILES:
            raise Refusal(Code.NOT_FOUND, f"The page has no file {name!r:.60}.")
        return FileResponse(PAGE / name, media_type=FILES[name], headers={"cache-control": "no-cache"})

    @router.get("/events", response_class=StreamingResponse, include_in_schema=False)
    async def events() -> StreamingResponse:
        """Server-sent events: starts, frames, chunks and ends of running episodes; a served request now and then."""
        services.gate.check_stream()

        async def lines() -> AsyncIterator[bytes]:
            with services.gate.stream("events"):
                async for event in services.events.subscribe(services.gate.closed):
                    yield sse(event)

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"cache-control": "no-store"})

    @router.post("/watch", responses={400: {"model": Failure}, 413: {"model": Failure}}, openapi_extra=body_schema(WatchBody))
    async def watch(request: Request) -> Accepted:
        """Moments of a running evaluation (`vla eval --watch URL`), handed on to whoever looks."""
        body = await read_body(request, services.limits, max_bytes=services.limits.json_bytes)
        try:
            parsed = WatchBody.model_validate(load_json(body))
        except ValidationError as error:
            raise Refusal.invalid(first_error(error)) from error
        for event in parsed.events:
            services.events.publish(event.model_dump())
        return Accepted(accepted=len(parsed.events))

    @router.get("/runs")
    async def runs() -> Runs:
        """Evaluations that can be replayed: the folders below --runs."""
        return Runs(runs=await asyncio.to_thread(list_runs, services.runs) if services.runs else [])

    @router.get("/runs/{name}/episodes", responses=MISSING)
    async def episodes(name: str) -> Episodes:
        return Episodes(episodes=await asyncio.to_thread(list_episodes, _root(), name))

    @router.get("/runs/{name}/films/{path:path}", responses=MISSING, response_class=FileResponse)
    async def films(name: str, path: str) -> FileResponse:
        return FileResponse(film(_root(), name, path))

    def _root() -> Path:
        if services.runs is None:
            raise Refusal(Code.NOT_FOUND, "This server replays nothing; start it with --runs=FOLDER.")
        return services.runs

    return router
