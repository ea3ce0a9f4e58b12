# SPDX-License-Identifier: Apache-2.0
"""A path that is looked up leads where the framework's search would have led."""

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router

from xinference.api.known_paths import KnownPaths


async def any_model(request: Request) -> Response:
    return PlainTextResponse(f"model {request.path_params['uid']}")


async def running(request: Request) -> Response:
    return PlainTextResponse("running")


async def launch(request: Request) -> Response:
    return PlainTextResponse("launched")


@pytest.mark.parametrize(
    "routes",
    [
        [Route("/models/running", running), Route("/models/{uid}", any_model)],
        [Route("/models/{uid}", any_model), Route("/models/running", running)],
        [Route("/models/running", running), Route("/models/running", launch, methods=["POST"])],
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE"])
@pytest.mark.parametrize("path", ["/models/running", "/models/other", "/models/running/", "/none"])
async def test_it_finds_what_the_search_finds(routes: list[Route], method: str, path: str) -> None:
    router = Router(routes)
    answers = []
    for app in (router, KnownPaths(router)):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            answers.append(await http.request(method, path))

    searched, looked_up = answers
    assert looked_up.status_code == searched.status_code
    assert looked_up.text == searched.text
    assert looked_up.headers == searched.headers
