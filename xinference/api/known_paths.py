# SPDX-License-Identifier: Apache-2.0
"""Routes that are looked up instead of searched for."""

from starlette.routing import BaseRoute, Route, Router
from starlette.types import Receive, Scope, Send

from .access import is_plain


class KnownPaths:
    """A router that knows the routes whose path is always the same; the framework's has the rest.

    Why: the framework asks one route after the other, of which there are a hundred, and what it
    does around those that it has found is for functions that want more than the request.
    """

    def __init__(self, router: Router) -> None:
        """Take a router that has all its routes."""
        self._router = router
        self._routes: dict[tuple[str, str], Route] = {}
        for route in router.routes:
            assert isinstance(route, Route), f"{route} is no route of a function"
            if "{" not in route.path and is_plain(route):
                for method in route.methods or ():
                    if _first(router.routes, method, route.path) is route:
                        self._routes[method, route.path] = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to its route."""
        route = None
        if scope["type"] == "http" and not scope.get("root_path"):
            route = self._routes.get((scope["method"], scope["path"]))
        if route is None:
            await self._router(scope, receive, send)
            return
        scope["route"], scope["endpoint"], scope["path_params"] = route, route.endpoint, {}
        scope["router"] = self._router
        await route.app(scope, receive, send)


def _first(routes: list[BaseRoute], method: str, path: str) -> BaseRoute | None:
    """Return the route that the framework would find."""
    for route in routes:
        assert isinstance(route, Route), f"{route} is no route of a function"
        if method in (route.methods or ()) and route.path_regex.match(path):
            return route
    return None
