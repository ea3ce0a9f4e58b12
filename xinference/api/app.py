# SPDX-License-Identifier: Apache-2.0
"""`create_app`: a cluster in, the HTTP application out. Wiring, readable in one minute.

The caller makes the cluster and runs the server:

    cluster = await connect(...)
    app = create_app(cluster, on_shutdown=cluster.aclose)
    await uvicorn.Server(uvicorn.Config(app, ...)).serve()

`on_shutdown` is awaited by the application's lifespan, after the server has let the running
requests end; without a lifespan (as in tests) the caller closes the cluster itself. The
application keeps no other state than its counters and a copy of the API keys, so any number of
them may serve one cluster: what callers asked to keep is in a `Store`, which they share.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp

from xinference import __version__
from xinference.cluster.interface import Cluster
from xinference.tracing import Tracer

from .access import guarded
from .admin import autostart, environments, registrations
from .admin import cache as cache_routes
from .admin import cluster as cluster_routes
from .admin import keys as key_routes
from .admin import logs as log_routes
from .admin import models as model_routes
from .answers import json_answer
from .anthropic import messages
from .edge import Edge
from .gateway import Gateway, gateway_of, install_gateway
from .history import History
from .keys.keyring import Keyring
from .keys.store import KeyStore
from .known_paths import KnownPaths
from .metrics import Metrics, metrics_page
from .ollama import embed as ollama_embeddings
from .ollama import generate as ollama_answers
from .ollama import models as ollama_models
from .openai import chat, completions, files, stored_chats
from .openai.batches import routes as batches
from .openai.batches.endpoints import ENDPOINTS
from .openai.batches.runner import BatchRunner
from .openai.responses import routes as responses
from .openapi import document_of, page_of
from .request_log import RequestLog
from .store.store import Store
from .vectors import embeddings, rerank
from .web import INDEX, wants_page, web_answer, web_file

ROUTES = (
    chat,
    stored_chats,
    completions,
    responses,
    files,
    batches,
    messages,
    ollama_answers,
    ollama_embeddings,
    ollama_models,
    embeddings,
    rerank,
    model_routes,
    autostart,
    registrations,
    cache_routes,
    cluster_routes,
    environments,
    log_routes,
    key_routes,
)
KEEP_ALIVE_SECONDS = 15.0
"""Proxies and clients close what is silent for a minute, some for half of one."""
TRACES_SECONDS = 2.0
"""For the last spans to be sent."""
TEXT_OF_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def create_app(
    cluster: Cluster,
    *,
    key_store: KeyStore | None = None,
    store: Store | None = None,
    disable_metrics: bool = False,
    metrics_directory: Path | None = None,
    keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
    answer_timeout_seconds: float | None = None,
    log_requests: str = "none",
    tracer: Tracer | None = None,
    on_shutdown: Callable[[], Awaitable[None]] | None = None,
) -> FastAPI:
    """Return the application that serves `cluster` over HTTP.

    Args:
        key_store: where API keys are kept and usage is counted; closed when the server ends.
            None: in memory.
        store: what callers asked to keep; closed when the server ends. None: in memory.
        disable_metrics: there is no `/metrics`.
        metrics_directory: where the processes of a gateway keep their numbers, which `/metrics`
            adds up; `PROMETHEUS_MULTIPROC_DIR` must have named it before this module was imported.
        keep_alive_seconds: a stream that has had nothing to say for so long says that it lives.
        answer_timeout_seconds: how long a request may wait for the beginning of its answer, where
            its caller does not say. None: for ever.
        log_requests: what is logged of each request: none, summary or prompts.
        tracer: makes the spans of requests; closed when the server ends. None: there are none.
        on_shutdown: awaited once when the server ends.
    """
    kept = store or Store()

    keyring = Keyring(key_store or KeyStore.in_memory())
    history = History()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        keeping = asyncio.create_task(keyring.run(), name="keep API keys")
        purge = asyncio.create_task(kept.keep_within_limits(), name="keep the store small")
        running = asyncio.create_task(BatchRunner(gateway, ENDPOINTS).run(), name="run batches")
        looking = asyncio.create_task(history.run(cluster), name="keep the last hour")
        yield
        for task in (keeping, purge, running, looking):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if on_shutdown is not None:
            await on_shutdown()
        await kept.aclose()
        keyring.close()
        if tracer is not None:
            await asyncio.to_thread(tracer.close, TRACES_SECONDS)

    metrics = Metrics(directory=metrics_directory)
    app = _Application(
        metrics=metrics,
        request_log=RequestLog(log_requests),
        tracer=tracer,
        routes=[route for routes in ROUTES for route in routes.router.routes],
        title="Xinference",
        version=__version__,
        summary="Open models behind one OpenAI-compatible endpoint.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    gateway = Gateway(
        cluster=cluster,
        metrics=metrics,
        keyring=keyring,
        store=kept,
        history=history,
        keep_alive_seconds=keep_alive_seconds,
        answer_timeout_seconds=answer_timeout_seconds,
    )
    install_gateway(app, gateway)
    for path, page in PAGES.items():
        app.add_api_route(path, page, include_in_schema=False)
    if not disable_metrics:
        app.add_api_route("/metrics", _metrics, include_in_schema=False)
    app.router.routes[:] = guarded(app.router.routes, keyring)
    return app


class _Application(FastAPI):
    """The framework's, with one layer around its router instead of seven."""

    def __init__(
        self,
        *,
        metrics: Metrics,
        request_log: RequestLog,
        tracer: Tracer | None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._metrics = metrics
        self._request_log = request_log
        self._tracer = tracer

    def build_middleware_stack(self) -> ASGIApp:
        """Return what every request goes through.

        Why so few: each layer costs every request and every token; `Edge` answers what a route
        raises, and the routes that need an exit stack have one of their own.
        """
        return Edge(
            KnownPaths(self.router),
            metrics=self._metrics,
            request_log=self._request_log,
            tracer=self._tracer,
        )


async def _root(request: Request) -> Response:
    if wants_page(request):
        return web_answer(request, INDEX)
    links = {"docs": "/docs", "openapi": "/openapi.json", "models": "/v1/models"}
    answer = json_answer({"name": "xinference", "version": __version__, **links})
    answer.headers["vary"] = "accept"
    return answer


async def _old_page(request: Request) -> Response:
    return RedirectResponse("/")


async def _docs(request: Request) -> Response:
    return HTMLResponse(page_of(document_of(request.app), base_url=str(request.base_url)))


async def _document(request: Request) -> Response:
    return json_answer(document_of(request.app))


async def _metrics(request: Request) -> Response:
    gateway = gateway_of(request)
    keys = gateway.keyring.all_keys()
    page = await metrics_page(gateway.metrics, gateway.cluster, keys)
    return Response(page, media_type=TEXT_OF_PROMETHEUS)


PAGES = {
    "/": _root,
    "/ui": _old_page,
    "/ui/{path:path}": _old_page,
    "/docs": _docs,
    "/openapi.json": _document,
    "/web/{path:path}": web_file,
}
