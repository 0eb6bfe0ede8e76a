"""The HTTP application: Open Inference Protocol v2, probes, metrics, checkpoint swap; the other routers are put beside it.

Bodies are read by hand (serve/http_body.py) so that every limit holds before anything is parsed; the OpenAPI document
says what they are.
"""

import asyncio
import functools
import logging
import time
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from serve.chat_api import chat_router
from serve.http_body import ClientGone, read_body, while_connected
from serve.http_guard import HttpGuard, refusal_response
from serve.oip_models import find_model
from serve.page_api import page_router
from serve.protocol import oip, oip_json, schemas
from serve.protocol.refusal import Code, Refusal
from serve.services import Services
from serve.websocket_api import websocket_router

TITLE = "Remask"
BIG_BODY = 1 << 19  # bytes; parsed on a thread
logger = logging.getLogger(__name__)
FAILURES: dict[int | str, dict[str, Any]] = {
    400: {"model": schemas.Failure, "description": "The request is wrong; the message says where"},
    401: {"model": schemas.Failure, "description": "A key is needed"},
    403: {"model": schemas.Failure, "description": "Another site's page"},
    404: {"model": schemas.Failure, "description": "No such model, version or file"},
    408: {"model": schemas.Failure, "description": "The body came too slowly"},
    413: {"model": schemas.Failure, "description": "Larger than a limit"},
    415: {"model": schemas.Failure, "description": "A compressed body"},
    503: {"model": schemas.Failure, "description": "Overloaded, restarting or draining; see Retry-After"},
    504: {"model": schemas.Failure, "description": "The deadline passed"},
}


def build_app(services: Services) -> HttpGuard:
    """The ASGI application of one server."""
    app = FastAPI(title=TITLE, version=services.version, docs_url=None, redoc_url=None)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _failed)
    app.include_router(operations_router(services))
    app.include_router(oip_router(services))
    app.include_router(chat_router(services))
    app.include_router(page_router(services))
    app.include_router(websocket_router(services))
    return HttpGuard(app, services)


def operations_router(services: Services) -> APIRouter:
    """Probes, metrics, swap."""
    router = APIRouter(tags=["operations"])

    @router.get("/livez", response_class=PlainTextResponse)
    async def livez() -> str:
        """The process answers."""
        return "ok"

    @router.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """What openpi's server answers."""
        return "OK\n"

    @router.get("/readyz", responses={503: {"model": schemas.Ready}})
    async def readyz(response: Response) -> schemas.Ready:
        """Every model is warm, and the server is not draining."""
        reason = services.not_ready
        response.status_code = 503 if reason else 200
        return schemas.Ready(ready=not reason, reason=reason)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        services.metrics.ready.set(not services.not_ready)
        text, content_type = services.metrics.text()
        return Response(text, media_type=content_type)

    @router.post("/admin/reload", responses=FAILURES | {409: {"model": schemas.Failure}})
    async def reload() -> schemas.Reloaded:
        """Serve the checkpoint that is at the configured path now; requests go on meanwhile."""
        if services.swap is None:
            raise Refusal(Code.NOT_FOUND, "This server has no checkpoint to swap.")
        began = time.monotonic()
        previous, checkpoint = await services.swap()
        return schemas.Reloaded(checkpoint=checkpoint, previous=previous, seconds=time.monotonic() - began)

    return router


def oip_router(services: Services) -> APIRouter:
    """Open Inference Protocol v2 (serve/protocol/oip.py says which tensors mean what)."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"])
    paths = ("/models/{name}", "/models/{name}/versions/{version}")

    @router.get("")
    async def server_metadata() -> schemas.ServerMetadata:
        return schemas.ServerMetadata(name=oip.SERVER_NAME, version=services.version, extensions=list(oip.EXTENSIONS))

    @router.get("/health/live")
    async def server_live() -> schemas.Live:
        return schemas.Live(live=True)

    @router.get("/health/ready", responses={503: {"model": schemas.Ready}})
    async def server_ready(response: Response) -> schemas.Ready:
        reason = services.not_ready
        response.status_code = 503 if reason else 200
        return schemas.Ready(ready=not reason, reason=reason)

    async def model_metadata(name: str, version: str = "") -> schemas.ModelMetadata:
        model = find_model(services, name, version)
        return schemas.ModelMetadata(
            name=name,
            versions=[model.checkpoint],
            platform=oip.PLATFORM,
            inputs=[_tensor(tensor) for tensor in model.inputs],
            outputs=[_tensor(tensor) for tensor in model.outputs],
            parameters=model.facts,
        )

    async def model_ready(name: str, response: Response, version: str = "") -> schemas.ModelReady:
        ready = find_model(services, name, version).ready
        response.status_code = 200 if ready else 503
        return schemas.ModelReady(name=name, ready=ready)

    async def infer(name: str, request: Request, version: str = "") -> Response:
        model = find_model(services, name, version)
        body = await read_body(request, services.limits)
        json_length = request.headers.get(oip_json.JSON_LENGTH_HEADER)
        parse = functools.partial(oip_json.parse, body, json_length, services.limits)
        parsed = parse() if len(body) < BIG_BODY else await asyncio.to_thread(parse)
        answering = model.infer(parsed.inputs, parsed.parameters, parsed.outputs)
        tensors, checkpoint = await while_connected(request, answering)
        content, answer_length = oip_json.response(parsed, name, checkpoint, tensors)
        if answer_length is None:
            return Response(content, media_type="application/json")
        headers = {oip_json.JSON_LENGTH_HEADER: str(answer_length)}
        return Response(content, media_type="application/octet-stream", headers=headers)

    for path in paths:
        router.add_api_route(path, model_metadata, methods=["GET"], response_model=schemas.ModelMetadata, responses=_some(404))
        router.add_api_route(
            f"{path}/ready", model_ready, methods=["GET"], response_model=schemas.ModelReady, responses=_some(404) | {
                503: {"model": schemas.ModelReady}
            }
        )
        router.add_api_route(
            f"{path}/infer",
            infer,
            methods=["POST"],
            response_model=None,
            responses={200: {"model": schemas.InferResponse}} | FAILURES,
            openapi_extra=schemas.body_schema(schemas.InferRequestBody, binary=True),
        )
    return router


def _tensor(tensor: Any) -> schemas.TensorMetadata:
    return schemas.TensorMetadata(name=tensor.name, datatype=tensor.datatype, shape=list(tensor.shape))


def _some(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: FAILURES[code] for code in (400, 401, 403, *codes)}


async def _refused(request: Request, refusal: Refusal) -> Response:
    if isinstance(refusal, ClientGone):
        return Response(status_code=400)
    status, headers, body = refusal_response(request.url.path, refusal)
    response = Response(body, status_code=status)
    response.raw_headers = headers
    return response


async def _http_error(request: Request, error: HTTPException) -> Response:
    """404 and 405 of the router, in the form of the API."""
    code = {404: Code.NOT_FOUND}.get(error.status_code, Code.INVALID)
    text = f"There is no {request.method} {request.url.path[:200]}; /openapi.json lists what there is."
    _, headers, body = refusal_response(request.url.path, Refusal(code, text))
    response = Response(body, status_code=error.status_code)
    response.raw_headers = headers
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return await _refused(request, Refusal.invalid(f"{place}: {first['msg']}."))


async def _failed(request: Request, error: Exception) -> Response:
    """Starlette logs nothing and raises the error again after this answer; HttpGuard writes it to the log."""
    status, _, body = refusal_response(
        request.url.path, Refusal(Code.INTERNAL, "The server failed at this request; its log says where.")
    )
    return JSONResponse(None, status_code=status) if request.method == "HEAD" else Response(
        body, status, media_type="application/json"
    )
