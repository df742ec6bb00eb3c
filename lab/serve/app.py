"""The application: what generates, and what tells how the server is."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from lab.serve.api import routes
from lab.serve.client import DEAD, Client
from lab.serve.errors import ApiError, documented, handle_errors
from lab.serve.guard import Guard
from lab.view import live_page

try:
    VERSION = version("kvlab")
except PackageNotFoundError:
    VERSION = "not installed"  # but run from its folder
FRESH = {"cache-control": "no-store", "x-accel-buffering": "no"}


def application(client: Client, model: str, policies: dict[str, Any], api_key: str | None = None) -> FastAPI:
    """`policies`: what `/version` tells of the engine, besides."""
    began = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        client.start()
        yield

    app = FastAPI(title="kvlab", version=VERSION, lifespan=lifespan)
    handle_errors(app)
    app.include_router(routes(client, model))
    app.include_router(watching(client, {**policies, "model": model}))
    app.add_middleware(Guard, body=client.limits.body, api_key=api_key)

    def about() -> dict[str, Any]:
        card: dict[str, Any] = {"id": model, "object": "model", "created": began, "owned_by": "kvlab"}
        return card | ({"max_model_len": client.ready.length} if client.ready else {})

    keyed = documented(_401="No valid API key")
    named = keyed | documented(_404="Another model than the one there is")
    well = documented(_503="It is not so")

    @app.get("/v1/models", responses=keyed)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about()]}

    @app.get("/v1/models/{name:path}", responses=named)
    async def one_model(name: str) -> dict[str, Any]:
        if name != model:
            said = f"model {name[:60]!r}: this server has {model!r}"
            raise ApiError(404, said, "not_found_error", param="model", code="model_not_found")
        return about()

    @app.get("/health", responses=well)
    async def health() -> Response:
        """200 while the engine lives, also while it loads its model."""
        if client.died or client.broken:
            return ApiError(503, client.broken or DEAD, "server_error").response()
        return JSONResponse({"status": "ok"})

    @app.get("/ready", responses=well)
    async def ready() -> Response:
        """200 where a request would be taken now."""
        try:
            client.check_serving()
        except ApiError as error:
            return error.response()
        return JSONResponse({"status": "ok"})

    @app.get("/version")
    async def versions() -> dict[str, Any]:
        memory = {} if client.ready is None else client.ready._asdict()
        return {"version": VERSION, "model": model, **policies, **memory}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(client.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    return app


def watching(client: Client, about: dict[str, Any]) -> APIRouter:
    """The page on which one watches, and what it is told. `about`: the model, and the policies it runs under."""
    pages = APIRouter()

    @pages.get("/watch", include_in_schema=False)
    async def watch() -> Response:
        """A page that follows what happens in memory."""
        hardware = client.ready.hardware if client.ready else ""
        page = live_page({**about, "hardware": hardware, "changes": "watch/changes"})
        return HTMLResponse(page, headers=FRESH)

    @pages.get("/watch/changes", include_in_schema=False)
    async def changes() -> Response:
        """What that page is told: server-sent events, without end."""
        client.check_serving()
        client.audience.check_room()
        return StreamingResponse(client.audience.events(client.over), media_type="text/event-stream", headers=FRESH)

    return pages
