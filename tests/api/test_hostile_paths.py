# SPDX-License-Identifier: Apache-2.0
"""Names that lead elsewhere, and addresses of what others must not reach: nothing looks at them."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from tests.catalog.registration import text_of
from tests.fakes.cluster import FakeCluster
from xinference.api.app import create_app
from xinference.api.store.store import Store
from xinference.catalog import Catalog
from xinference.errors import XinferenceError

NAMES = [
    *("..", "../x", "../../etc/passwd", "a/../../b", "/etc/passwd", "//etc/passwd", "./x"),
    *("..\\x", "C:\\x", "\\\\host\\share", "a\\..\\b"),
    *("%2e%2e", "%2e%2e%2fetc", "..%2f..%2fetc", "%252e%252e%252f", "..%c0%afetc"),
    *("x\0", "x\0.json", "\0", "a\nb", "a\rb", "a\tb", " ", "\u202e", "．．／etc"),
    *("~root", "~/x", "$HOME", "${HOME}", "`id`", "$(id)", "a;b", "a|b", "a&b", "*", "?"),
    *("-rf", "--help", "con", "x" * 300, "x" * 5000, "é" * 200, "file:///etc/passwd"),
    *("http://x/y", "a#b", "a?b=c", "a%00b", ".hidden", "..hidden", "a//b"),
]
ROUTES = [
    ("GET", "/v1/models/{}"),
    ("DELETE", "/v1/models/{}"),
    ("GET", "/v1/models/{}/events"),
    ("GET", "/v1/models/{}/replicas"),
    ("GET", "/v1/model_registrations/LLM/{}"),
    ("DELETE", "/v1/model_registrations/LLM/{}"),
    ("GET", "/v1/model_registrations/{}"),
    ("GET", "/v1/engines/{}"),
    ("GET", "/v1/files/{}"),
    ("GET", "/v1/files/{}/content"),
    ("DELETE", "/v1/files/{}"),
    ("GET", "/v1/batches/{}"),
    ("GET", "/v1/responses/{}"),
    ("GET", "/web/{}"),
    ("DELETE", "/v1/admin/keys/{}"),
]


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
async def test_s04_no_name_in_a_path_leads_out_of_where_it_belongs(
    route: tuple[str, str], cluster: FakeCluster, tmp_path: Path
) -> None:
    method, path = route
    (tmp_path / "inside").mkdir()
    store = Store(tmp_path / "inside" / "store.db")
    transport = httpx.ASGITransport(app=create_app(cluster, store=store))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        for name in NAMES:
            for written in {quote(name, safe=""), quote(name)}:
                answer = await http.request(method, path.format(written))
                is_list = not name.strip("./") and answer.status_code == 200
                assert answer.status_code in {400, 404, 405} or is_list, (name, answer.text[:200])
                assert "root:" not in answer.text
    await store.aclose()
    assert os.listdir(tmp_path) == ["inside"]  # noqa: PTH208
    assert await cluster.models()


def test_s04_no_registered_name_makes_a_file_elsewhere(tmp_path: Path) -> None:
    home = tmp_path / "outer" / "home"
    home.mkdir(parents=True)
    catalog = Catalog.load(home)
    for name in NAMES:
        try:
            catalog.register("LLM", text_of(model_name=name), persist=True)
            catalog.unregister("LLM", name)
        except XinferenceError:
            continue
    assert [one.name for one in (tmp_path / "outer").iterdir()] == ["home"]
    assert [one.name for one in tmp_path.iterdir()] == ["outer"]


@pytest.fixture
def inner_service() -> Iterator[socket.socket]:
    """What only this machine reaches."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


def addresses(port: int) -> list[str]:
    hosts = [
        *(
            "127.0.0.1",
            "localhost",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "0.0.0.0",
            "127.1",
            "2130706433",
        ),
        *("0x7f000001", "0177.0.0.1", "127.0.0.1.nip.io", "user@127.0.0.1", "127.0.0.1%00.x"),
    ]
    urls = [f"{scheme}://{host}:{port}/x.png" for host in hosts for scheme in ("http", "https")]
    return [
        *urls,
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "ftp://127.0.0.1/x",
        f"gopher://127.0.0.1:{port}/_x",
        f"dict://127.0.0.1:{port}/x",
        "jar:http://127.0.0.1!/x",
        "http://169.254.169.254/latest/meta-data/",
        "http://[fd00:ec2::254]/latest/meta-data/",
        "http://metadata.google.internal/computeMetadata/v1/",
        "//127.0.0.1/x",
        "/etc/passwd",
        "data:text/html,<script>",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
        "unix:///var/run/docker.sock",
    ]


def requests_with(url: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield what asks to have an address looked at: in every field of media there is."""
    text = {"type": "text", "text": "look"}
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": url}},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "file", "file": {"file_data": url}},
    ):
        messages = [{"role": "user", "content": [text, part]}]
        yield "/v1/chat/completions", {"model": "guide", "messages": messages}
    for source in (
        {"type": "image", "source": {"type": "url", "url": url}},
        {"type": "document", "source": {"type": "url", "url": url}},
    ):
        messages = [{"role": "user", "content": [text, source]}]
        yield "/v1/messages", {"model": "guide", "max_tokens": 5, "messages": messages}
    for item in (
        {"type": "input_image", "image_url": url},
        {"type": "input_file", "file_url": url},
    ):
        asked = [{"role": "user", "content": [item]}]
        yield "/v1/responses", {"model": "guide", "input": asked}
    message = {"role": "user", "content": "look", "images": [url]}
    yield "/api/chat", {"model": "guide", "messages": [message]}
    yield "/api/generate", {"model": "guide", "prompt": "look", "images": [url]}


async def test_s03_no_address_in_a_request_is_looked_at(
    http: httpx.AsyncClient, inner_service: socket.socket
) -> None:
    urls = addresses(inner_service.getsockname()[1])
    assert len(urls) >= 39
    for url in urls:
        for path, body in requests_with(url):
            answer = await http.post(path, json=body)
            assert answer.status_code == 400, (path, body, answer.text)
            assert "root:" not in answer.text

    with pytest.raises(BlockingIOError):
        inner_service.accept()
