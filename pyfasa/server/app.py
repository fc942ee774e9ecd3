"""The application: llama-cpp-python's routes, /health and /metrics, and the page."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import llama_cpp.server.app as upstream
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware import Middleware
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette_context.middleware import RawContextMiddleware
from starlette_context.plugins import RequestIdPlugin

from pyfasa.machine import pyfasa_version
from pyfasa.server import pages
from pyfasa.server.clients import OPEN_PATHS, Gate
from pyfasa.server.errors import respond
from pyfasa.server.metrics import Metrics
from pyfasa.server.models import Models
from pyfasa.server.settings import ModelSettings, ServerSettings, read


def create_app(server: ServerSettings, models: list[ModelSettings]) -> FastAPI:
    """The application with its first model loaded; closing the application frees it.

    One per process: llama-cpp-python's routes find settings and models in variables of their module.
    """
    metrics = Metrics()
    proxy = Models(models, metrics)
    open_paths = OPEN_PATHS | (pages.FILES.keys() if server.page else set())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        proxy.free()  # type: ignore[no-untyped-call]

    app = FastAPI(
        title="pyfasa",
        version=pyfasa_version(),
        root_path=server.root_path,
        lifespan=lifespan,
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origins=["*"],
                allow_credentials=True,
                allow_methods=["*"],
                allow_headers=["*"],
            ),
            Middleware(RawContextMiddleware, plugins=(RequestIdPlugin(),)),
            Middleware(Gate, api_key=server.api_key, metrics=metrics, open_paths=open_paths),
        ],
    )
    app.state.models = proxy
    app.add_exception_handler(HTTPException, respond)
    app.add_exception_handler(RequestValidationError, respond)
    # upstream's create_app would read CONFIG_FILE again, without our settings, and load llama_cpp.Llama
    upstream.set_server_settings(server)
    upstream._llama_proxy = proxy
    upstream.set_ping_message_factory(bytes if server.disable_ping_events else None)  # type: ignore[arg-type]
    _add_routes(app)
    _add_own_routes(app, proxy, metrics)
    if server.page:
        pages.add_page(app)
    return app


def _add_routes(app: FastAPI) -> None:
    """llama-cpp-python's routes without its route class, which answers bad JSON with a status of 500."""
    for route in upstream.router.routes:
        if not isinstance(route, APIRoute) or route.endpoint is upstream.get_models:
            continue  # ours takes no turn in the queue
        app.add_api_route(
            route.path,
            route.endpoint,
            methods=sorted(route.methods or ()),
            dependencies=[*route.dependencies, Depends(_one_prompt)],
            response_model=route.response_model,
            responses=route.responses,
            summary=route.summary,
            tags=route.tags,
            include_in_schema=route.include_in_schema,
        )


async def _one_prompt(request: Request) -> None:
    """Refuses a list of prompts, on which upstream's route fails without a sentence."""
    body = await request.json()
    prompt = body.get("prompt") if isinstance(body, dict) else None
    if isinstance(prompt, list) and len(prompt) > 1:
        raise HTTPException(
            400, f"prompt is a list of {len(prompt)}; send one text in each request."
        )


def _n_queued() -> int:
    """Requests that wait for their turn: one for the model, the others behind it."""
    locks = (upstream.llama_inner_lock, upstream.llama_outer_lock)
    return sum(lock.statistics().tasks_waiting for lock in locks)


def _add_own_routes(app: FastAPI, proxy: Models, metrics: Metrics) -> None:
    """Routes that answer at once, also while a request is being decoded."""

    @app.get("/v1/models", tags=["OpenAI V1"])
    async def models() -> Any:
        return await upstream.get_models(proxy)

    @app.get("/health", tags=["pyfasa"])
    async def health() -> dict[str, Any]:
        llm = proxy.loaded
        reason = "No model is loaded." if llm is None else llm.fasa.reason
        return {
            "status": "ok",
            "model": proxy.loaded_alias,
            "fasa": {"active": reason is None, "reason": reason},
        }

    @app.get("/metrics", tags=["pyfasa"], response_class=PlainTextResponse)
    async def metrics_text() -> PlainTextResponse:
        text = metrics.text(proxy.state(), _n_queued())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def serve(arguments: Sequence[str]) -> None:
    """Serves until interrupted."""
    import uvicorn

    server, models = read(arguments)
    # the page asks twice a second while a request runs, which would push all else out of sight
    logging.getLogger("uvicorn.access").addFilter(
        lambda record: "/metrics " not in record.getMessage()
    )
    uvicorn.run(
        create_app(server, models),
        host=server.host,
        port=server.port,
        ssl_keyfile=server.ssl_keyfile,
        ssl_certfile=server.ssl_certfile,
    )
