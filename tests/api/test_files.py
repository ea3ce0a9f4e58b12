# SPDX-License-Identifier: Apache-2.0
"""Files: what goes in comes out, in lists and by name, within bounds."""

import os
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.fakes.cluster import FakeCluster
from xinference.api.app import create_app
from xinference.api.store.limits import StoreLimits
from xinference.api.store.store import Store

from .test_clients import with_openai

FILES = "/v1/files"
MIB = 2**20


async def upload(
    http: httpx.AsyncClient, content: bytes = b"x", *, name: str = "in.jsonl", **fields: str
) -> httpx.Response:
    return await http.post(
        FILES, files={"file": (name, content)}, data={"purpose": "batch", **fields}
    )


async def test_what_goes_in_comes_out(http: httpx.AsyncClient) -> None:
    for content in (b"", b"x", os.urandom(3 * MIB + 17)):
        file = (await upload(http, content)).json()

        found = await http.get(f"{FILES}/{file['id']}")
        back = await http.get(f"{FILES}/{file['id']}/content")

        assert found.json() == file
        assert back.content == content
        assert file["bytes"] == len(content)


async def test_a_file_is_described_in_openais_form(http: httpx.AsyncClient) -> None:
    file = (await upload(http, name="é.jsonl")).json()
    stays = (await upload(http, purpose="user_data")).json()
    hour = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    goes = (await upload(http, **hour)).json()

    assert file.pop("id").startswith("file-")
    assert file.pop("expires_at") == file.pop("created_at") + 30 * 86400
    assert file == {
        "object": "file",
        "bytes": 1,
        "filename": "é.jsonl",
        "purpose": "batch",
        "status": "processed",
        "status_details": None,
    }
    assert stays["expires_at"] is None
    assert goes["expires_at"] == goes["created_at"] + 3600


async def test_files_are_listed_by_purpose_a_page_at_a_time(http: httpx.AsyncClient) -> None:
    first, second = [(await upload(http)).json()["id"] for _ in range(2)]
    other = (await upload(http, purpose="user_data")).json()["id"]

    async def listed(**query: Any) -> list[str]:
        return [file["id"] for file in (await http.get(FILES, params=query)).json()["data"]]

    assert await listed() == [other, second, first]
    assert await listed(order="asc", purpose="batch") == [first, second]
    assert await listed(order="asc", limit=1, after=first) == [second]


async def test_a_deleted_file_is_gone(http: httpx.AsyncClient) -> None:
    file = (await upload(http)).json()["id"]

    deleted = await http.delete(f"{FILES}/{file}")

    assert deleted.json() == {"id": file, "object": "file", "deleted": True}
    for answer in (
        await http.get(f"{FILES}/{file}"),
        await http.get(f"{FILES}/{file}/content"),
        await http.delete(f"{FILES}/{file}"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "object_not_found")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"purpose": "fine-tune"}, "purpose"),
        ({"purpose": ""}, "purpose"),
        ({"colour": "red"}, "colour"),
        ({"expires_after[anchor]": "created_at"}, "expires_after.seconds"),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"},
            "expires_after.seconds",
        ),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "soon"},
            "expires_after.seconds",
        ),
    ],
)
async def test_a_bad_field_is_refused_by_name(
    http: httpx.AsyncClient, fields: dict[str, str], named: str
) -> None:
    answer = await upload(http, **fields)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == named
    assert (await http.get(FILES)).json()["data"] == []


async def test_what_is_no_upload_is_refused(http: httpx.AsyncClient) -> None:
    bare = await http.post(FILES, data={"purpose": "batch"})
    text = await http.post(FILES, data={"purpose": "batch", "file": "x"})
    two = await http.post(FILES, files=[("file", b"x"), ("file", b"y")], data={"purpose": "batch"})
    torn = await http.post(
        FILES, content=b"--x\r\n", headers={"content-type": "multipart/form-data; boundary=x"}
    )
    json = await http.post(FILES, json={"purpose": "batch"})

    for answer in (bare, text, two, torn, json):
        assert answer.status_code == 400, answer.text


async def test_the_size_of_files_is_bounded(tmp_path: Path) -> None:
    limits = StoreLimits(max_file_bytes=2 * MIB, max_files_bytes=3 * MIB)
    store = Store(tmp_path / "store.db", limits)
    transport = httpx.ASGITransport(app=create_app(await FakeCluster.running(), store=store))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:

        async def streamed() -> Any:
            about = b'Content-Disposition: form-data; name="file"; filename="a"'
            yield b"--x\r\n" + about + b"\r\n\r\n"
            for _ in range(5):
                yield b"x" * MIB

        first = await upload(http, b"x" * (2 * MIB))
        large = await upload(http, b"x" * (2 * MIB + 1))
        huge = await upload(http, b"x" * (5 * MIB))
        endless = await http.post(
            FILES,
            content=streamed(),
            headers={"content-type": "multipart/form-data; boundary=x"},
        )
        full = await upload(http, b"x" * (2 * MIB))
        await http.delete(f"{FILES}/{first.json()['id']}")
        again = await upload(http, b"x" * (2 * MIB))
        names = [file["id"] for file in (await http.get(FILES)).json()["data"]]
    await store.aclose()

    assert (large.status_code, large.json()["error"]["param"]) == (400, "file")
    assert huge.status_code == endless.status_code == 413
    assert (full.status_code, full.json()["error"]["param"]) == (400, "file")
    assert names == [again.json()["id"]]


async def test_openais_client_works_with_files(port: int) -> None:
    def use(client: openai.OpenAI) -> None:
        file = client.files.create(
            file=("in.jsonl", b"{}\n"),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        assert client.files.retrieve(file.id) == file
        assert [one.id for one in client.files.list()] == [file.id]
        assert client.files.content(file.id).read() == b"{}\n"
        assert client.files.wait_for_processing(file.id).status == "processed"
        assert client.files.delete(file.id).deleted

    await with_openai(port, use)
