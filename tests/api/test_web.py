# SPDX-License-Identifier: Apache-2.0
"""The web page: its files are served as what they are, need nothing from elsewhere, and fit."""

import json
import posixpath
import re
from collections.abc import Iterator

import httpx
import pytest

from xinference import __version__
from xinference.api.web import FOLDER

BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
MAX_BYTES = 300_000


def words_of(language: str) -> dict[str, str]:
    words: dict[str, str] = json.loads((FOLDER / "words" / f"{language}.json").read_text())
    return words


def modules() -> Iterator[tuple[str, str]]:
    for path in FILES:
        if path.suffix == ".js":
            yield path.relative_to(FOLDER).as_posix(), path.read_text()


async def test_a_browser_gets_the_page_and_a_program_the_document(http: httpx.AsyncClient) -> None:
    page = await http.get("/", headers=BROWSER)
    for accept in ("*/*", "application/json"):
        document = await http.get("/", headers={"accept": accept})
        assert document.json()["version"] == __version__
        assert document.headers["vary"] == "accept"

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["vary"] == "accept"
    assert page.text.startswith("<!doctype html>")


@pytest.mark.parametrize("path", ["/ui", "/ui/", "/ui/launch_model/llm"])
async def test_bookmarks_of_the_page_of_xinference_lead_to_ours(
    http: httpx.AsyncClient, path: str
) -> None:
    answer = await http.get(path)

    assert (answer.status_code, answer.headers["location"]) == (307, "/")


async def test_all_that_the_page_refers_to_is_served_as_what_it_is(http: httpx.AsyncClient) -> None:
    page = (await http.get("/", headers=BROWSER)).text
    wanted = [f"/{path}" for path in re.findall(r'(?:href|src)="(web/[^"]+)"', page)]
    assert wanted
    seen: set[str] = set()

    while wanted:
        path = wanted.pop()
        if path in seen:
            continue
        seen.add(path)
        answer = await http.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["content-type"].startswith(TYPES[posixpath.splitext(path)[1]]), path
        wanted += [
            posixpath.normpath(posixpath.join(posixpath.dirname(path), module))
            for module in re.findall(r'from "(\.[^"]+)"', answer.text)
        ]

    # Words are chosen by language; everything else is referred to by name.
    served = {f"/web/{path.relative_to(FOLDER).as_posix()}" for path in FILES}
    assert served - seen == {"/web/index.html", "/web/words/en.json", "/web/words/zh.json"}


def test_what_a_module_imports_is_exported_there() -> None:
    exports = {
        path: set(re.findall(r"^export (?:const|class|(?:async )?function\*?) (\w+)", text, re.M))
        for path, text in modules()
    }
    for path, text in modules():
        for names, source in re.findall(r'import \{([^}]+)\} from "([^"]+)"', text):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(path), source))
            missing = {name.strip() for name in names.split(",") if name.strip()} - exports[target]
            assert not missing, f"{path}: {target} has no {missing}"


def test_no_file_names_an_address_elsewhere_and_all_fit_the_size() -> None:
    for path in FILES:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path
    assert sum(path.stat().st_size for path in FILES) <= MAX_BYTES


def test_no_module_makes_markup_of_text() -> None:
    for path, text in modules():
        for hazard in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert hazard not in text, path


def test_both_languages_have_the_same_words_and_gaps() -> None:
    english, chinese = words_of("en"), words_of("zh")

    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", chinese[key])), key


def test_the_modules_use_the_words_that_there_are() -> None:
    text = "".join(text for _, text in modules())
    used = set(re.findall(r'\bt\("(\w+)"', text))
    # Made of a part: the names of pages and tabs, the stages of a launch, the scopes of keys.
    parts = ("page_", "stage_", "tab_", "nothing_", "scope_")
    built = {key for key in words_of("en") if key.startswith(parts)}

    assert used | built == words_of("en").keys()


async def test_the_page_may_load_nothing_but_its_own_files(http: httpx.AsyncClient) -> None:
    page = await http.get("/", headers=BROWSER)

    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    # What the policy forbids is not in the page.
    assert not re.search(r"<script>|<style|style=| on\w+=", page.text)


async def test_a_copy_that_is_the_latest_is_not_sent_again(http: httpx.AsyncClient) -> None:
    first = await http.get("/web/app.js")
    again = await http.get("/web/app.js", headers={"if-none-match": first.headers["etag"]})
    other = await http.get("/web/app.js", headers={"if-none-match": '"another"'})

    assert (again.status_code, again.content) == (304, b"")
    assert other.content == first.content
    assert first.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "path",
    [
        "/web/",
        "/web/pages",
        "/web/missing.js",
        "/web/../api/app.py",
        "/web/%2e%2e/api/app.py",
        "/web/..%2fapi%2fapp.py",
        "/web/pages/../../api/app.py",
        "/web//etc/passwd",
        "/web/%00",
    ],
)
async def test_no_path_leads_out_of_the_folder(http: httpx.AsyncClient, path: str) -> None:
    answer = await http.get(path)

    assert answer.status_code == 404
    assert "create_app" not in answer.text


async def test_the_page_needs_no_key_and_what_it_asks_for_does(http: httpx.AsyncClient) -> None:
    await http.post("/v1/admin/keys", json={"name": "admin", "scopes": ["admin"]})

    assert (await http.get("/", headers=BROWSER)).status_code == 200
    assert (await http.get("/web/app.js")).status_code == 200
    assert (await http.get("/v1/models/instances")).status_code == 401
