"""The app: routes, the guard in front of them, and what happens when it stops."""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rc_agents import CoupledForCausalLM, __version__
from rc_agents.errors import ConfigError
from rc_agents.service import GenerationService

from . import chat, completions, errors
from .errors import Refused
from .limits import Limits
from .metrics import Metrics
from .serving import Serving

PAGE = Path(__file__).parent / "page.html"
OPEN = ("/", "/health")
"""Paths that need no key."""


def create_app(
    model: str | Path | CoupledForCausalLM | GenerationService,
    *,
    name: str = "rc",
    api_key: str | None = None,
    limits: Limits | None = None,
    processors: Mapping[str, Any] | None = None,
    **options: Any,
) -> FastAPI:
    """Makes an OpenAI-compatible app over an ensemble.

    Args:
        model: a live ensemble, a service over one, or what `rc_agents.service.load` takes.
        name: what the model is called; `NAME:medical+code` is the same with those specialists alone.
        api_key: what clients have to send as a bearer token; None lets everybody in.
        limits: what is let in.
        processors: encoder -> its image processor or feature extractor, where none lies beside the encoder.
        options: for loading: `device_map`, `dtype`, `trust_remote_code`.

    Raises:
        RCError: the ensemble cannot be loaded, or has no tokenizer.
    """
    if api_key is not None and not api_key.strip():
        raise ConfigError("the API key is empty; leave it out, or set one")
    service = GenerationService.of(model, processors=processors, **options)
    serving = Serving(service, name, limits or Limits(), Metrics())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        serving.batcher.start()
        yield
        await run_in_threadpool(serving.batcher.close)

    app = FastAPI(
        title="rc_agents", version=__version__, lifespan=lifespan, responses=errors.RESPONSES
    )
    app.state.serving = serving
    errors.install(app)
    app.add_middleware(Guard, serving=serving, api_key=api_key)
    app.include_router(chat.routes(serving))
    app.include_router(completions.routes(serving))
    _add_plain_routes(app, serving)
    app.openapi_schema = _described(app, api_key is not None)
    return app


def _described(app: FastAPI, keyed: bool) -> dict[str, Any]:
    """The schema as the app behaves: a malformed body is a 400, not FastAPI's 422."""
    schema = app.openapi()
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    if keyed:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    return schema


def _add_plain_routes(app: FastAPI, serving: Serving) -> None:
    @app.get("/v1/models", tags=["models"])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(serving, one) for one in serving.names]}

    @app.get("/v1/models/{model:path}", tags=["models"])
    async def one_model(model: str) -> dict[str, Any]:
        serving.specialists(model)
        return _model(serving, model)

    @app.post("/v1/embeddings", tags=["models"])
    async def embeddings() -> None:
        raise Refused(
            400,
            "an ensemble generates text and has no embeddings; use an embedding model",
            code="unsupported",
        )

    @app.get("/health", tags=["state"])
    async def health() -> dict[str, Any]:
        batcher = serving.batcher
        if not batcher.alive:
            raise Refused(503, "the server answers no requests any more", code="stopping")
        joins = "token" if batcher.refusal is None else "call"
        running = {"waiting": batcher.waiting, "running": batcher.running}
        return {"status": "ok", **running, "joins_at": joins, "why": batcher.refusal}

    @app.get("/metrics", tags=["state"], response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        serving.metrics.waiting.set(serving.batcher.waiting)
        serving.metrics.running.set(serving.batcher.running)
        return PlainTextResponse(serving.metrics.text())

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE, media_type="text/html")


def _model(serving: Serving, name: str) -> dict[str, Any]:
    chosen = serving.specialists(name)
    return {
        "id": name,
        "object": "model",
        "created": serving.started,
        "owned_by": "rc_agents",
        "specialists": serving.service.model.specialists if chosen is None else chosen,
        "input_modalities": serving.service.modalities(chosen),
    }


class Guard:
    """Asks for the key, bounds bodies, and counts requests.

    Args:
        app: behind it.
        serving: limits and metrics.
        api_key: None for no key.
    """

    def __init__(self, app: ASGIApp, serving: Serving, api_key: str | None) -> None:
        self.app, self.serving = app, serving
        self.api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or refuses it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._guarded(scope, receive, counted)
        except Exception as error:
            errors.log(error)
            if status != 499:
                raise
            await errors.respond(errors.refusal(error))(scope, receive, counted)
        finally:
            known = scope.get("route")
            path = getattr(known, "path", "other")
            self.serving.metrics.requests.labels(path, str(status)).inc()

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if not self._may_enter(scope["path"], headers.get(b"authorization", b"")):
            refused = Refused(401, "this server asks for its API key: Authorization: Bearer KEY")
            refused.headers["WWW-Authenticate"] = "Bearer"
            await errors.respond(refused)(scope, receive, send)
            return
        most = self.serving.limits.body_bytes
        too_large = Refused(
            413,
            f"a request's body has at most {most} bytes; the server's --body-bytes sets how many",
        )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            await errors.respond(too_large)(scope, receive, send)
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > most:
                await errors.respond(too_large)(scope, receive, send)
                return
            if message["type"] == "http.disconnect":
                return
            if not message.get("more_body"):
                break
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replayed, send)

    def _may_enter(self, path: str, given: bytes) -> bool:
        if self.api_key is None or path in OPEN:
            return True
        kind, _, key = given.partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.api_key)
