"""The server's endpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from deepseek_v3 import __version__
from deepseek_v3.inference.server.api_errors import ApiError, invalid_body
from deepseek_v3.inference.server.engine_thread import RequestGroup
from deepseek_v3.inference.server.event_stream import ClientLeftError, EventStream, unless_client_leaves
from deepseek_v3.inference.server.http_guard import GuardRules, HttpGuard
from deepseek_v3.inference.server.replies import ChatReply, CompletionReply, Reply
from deepseek_v3.inference.server.request_bodies import ChatBody, CompletionBody
from deepseek_v3.inference.server.service import Service
from deepseek_v3.utils.errors import UserError

_PAGE = Path(__file__).parent / "page"
_ASSETS = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}
_CLIENT_LEFT = 499  # nginx's status for a client that did not wait for its answer


def create_app(service: Service, key: str | None, only_loopback: bool) -> HttpGuard:
    """The ASGI application: the endpoints of a service, behind the guard."""
    app = FastAPI(
        title="deepseek_v3",
        version=__version__,
        docs_url=None,  # its page loads scripts from elsewhere, and so does the other one
        redoc_url=None,
        redirect_slashes=False,
        responses={"4XX": {"description": "OpenAI's error object"}},
    )
    _add_api(app, service)
    _add_operation(app, service)
    _add_page(app)
    _add_errors(app)
    limits = service.limits
    return HttpGuard(app, GuardRules(key, limits.max_body, limits.max_open, only_loopback), service.metrics)


def _add_api(app: FastAPI, service: Service) -> None:
    """The endpoints of OpenAI's API."""

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [_model_card(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return _json(_model_card(service))

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        group = await service.begin_completion(body)
        return await _answer(service, request, group, partial(CompletionReply, service.model, body))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        group = await service.begin_chat(body)
        return await _answer(service, request, group, partial(ChatReply, service.model, body))


async def _answer(
    service: Service, request: Request, group: RequestGroup, new_reply: Callable[[RequestGroup], Reply]
) -> Response:
    """The answer, whole or as a stream. The requests of its group end with it, or when the client leaves."""
    is_left_to_stream = False
    try:
        reply = new_reply(group)
        if reply.is_stream:
            is_left_to_stream = True
            return EventStream(reply.chunks(), partial(service.end, group), service.limits.write_seconds)
        await unless_client_leaves(request.receive, group.finish())
        return _json(reply.whole())
    except ClientLeftError:
        return Response(status_code=_CLIENT_LEFT)
    finally:
        if not is_left_to_stream:
            service.end(group)


def _model_card(service: Service) -> dict[str, Any]:
    """A model as OpenAI's API lists it, with its context as in vLLM, and whether it takes chats."""
    return {
        "id": service.model.name,
        "object": "model",
        "created": service.created,
        "owned_by": "deepseek_v3",
        "max_model_len": service.limits.context,
        "has_chat_template": service.model.template is not None,
    }


def _add_operation(app: FastAPI, service: Service) -> None:
    """What those who operate the server ask."""

    @app.get("/health")
    async def health() -> Response:
        service.require_readiness()
        return _json({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics_text(), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI) -> None:
    """The page in which a browser can try prompts, without any file from elsewhere."""
    files = {path: (_PAGE / (path.lstrip("/") or "index.html")).read_bytes() for path in _ASSETS}

    async def page(request: Request) -> Response:
        path = request.url.path
        return Response(files[path], media_type=_ASSETS[path], headers={"Cache-Control": "no-cache"})

    for path in _ASSETS:
        app.add_api_route(path, page, include_in_schema=False)


def _add_errors(app: FastAPI) -> None:
    """Every error is an error object of OpenAI's API."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return _json(error.body, error.status, error.headers)

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: UserError) -> Response:
        return _json(ApiError(400, str(error)).body, 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _json(invalid_body(error.errors()).body, 400)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        if error.status_code == HTTPStatus.BAD_REQUEST:  # such as a body that is not UTF-8, or nested too deeply
            return _json(ApiError(400, "the body is not JSON that can be read", code="invalid_json").body, 400)
        reason = f"{request.method} {request.url.path}: {error.detail}"
        return _json(ApiError(error.status_code, reason).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def defect(_request: Request, _error: Exception) -> Response:
        return _json(ApiError(500, HTTPStatus.INTERNAL_SERVER_ERROR.phrase).body, 500)


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, "application/json")
