# SPDX-License-Identifier: Apache-2.0
"""The web page: static files of the package, read once; below `/web/`, and for browsers at `/`.

Nothing is looked up on the disk by what a request says, so no path leads out of the folder. The
page itself needs no key; what it calls does.
"""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parents[1] / "web"
INDEX = "index.html"

MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
"""Why not `mimetypes`: it believes the machine's files, which may call a module plain text."""

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WebFile:
    """One file of the page, as it is sent."""

    content: bytes
    media_type: str
    etag: str


@functools.cache
def web_files() -> dict[str, WebFile]:
    """Return the files of the page by their path below the folder; read once by a process."""
    return {
        path.relative_to(FOLDER).as_posix(): _read(path)
        for path in sorted(FOLDER.rglob("*"))
        if path.suffix in MEDIA_TYPES
    }


def _read(path: Path) -> WebFile:
    content = path.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return WebFile(content=content, media_type=MEDIA_TYPES[path.suffix], etag=etag)


def wants_page(request: Request) -> bool:
    """Say whether who asks is a browser: programs do not ask for HTML by name."""
    return "text/html" in request.headers.get("accept", "")


async def web_file(request: Request) -> Response:
    """Answer `/web/{path}`."""
    return web_answer(request, request.path_params["path"])


def web_answer(request: Request, path: str) -> Response:
    """Return a file of the page, or that the browser's copy of it is the latest.

    Raises:
        HTTPException: 404, there is no such file.
    """
    file = web_files().get(path)
    if file is None:
        raise HTTPException(404)
    headers = {
        # Why no-cache: an upgrade shows at once, and asking costs 304s without a body.
        "cache-control": "no-cache",
        "etag": file.etag,
        "vary": "accept",
        "content-security-policy": CONTENT_SECURITY_POLICY,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    known = request.headers.get("if-none-match", "")
    if file.etag in (etag.strip().removeprefix("W/") for etag in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
