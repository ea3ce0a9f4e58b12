# SPDX-License-Identifier: Apache-2.0
"""The web page in a real browser, on a whole platform: the life of a model as its user sees it.

Every test fails on what the browser's console complains of, and on what axe-core finds serious.
"""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright

from tests.debian import need_command
from tests.e2e.platform import Platform, started
from tests.e2e.reciting_model import (
    ANSWER,
    ANSWER_AFTER_THOUGHT,
    CALL,
    RESULT,
    THOUGHT,
    registration,
    save_reciting_model,
)
from tests.e2e.reciting_model import NAME as RECITER
from tests.encoders_tiny import save_cross_encoder
from xinference.cli.models import launch_command

GUIDE = "xinference-guide"
MINILM = "all-MiniLM-L6-v2"
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
RERANKER = "tiny-reranker"
PAGES = ("models", "launch", "playground", "register", "cluster", "logs", "keys")
WAIT_MS = 60_000
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]

expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = need_command("chromium", package="chromium")
    with sync_playwright() as playwright:
        # Why: as root, and in most containers, Chromium has no sandbox of its own.
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with started(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="module")
def models(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """The platform with a reciting model, the guide, an embedding and a rerank model on it."""
    family = registration(save_reciting_model(tmp_path_factory.mktemp(RECITER)))
    reranker = save_cross_encoder(tmp_path_factory.mktemp("reranker"), max_tokens=128)
    url = f"{platform.endpoint}/v1/model_registrations/LLM"
    body = {"model": json.dumps(family), "persist": False}
    httpx.post(url, json=body, timeout=30).raise_for_status()
    for name, kind, engine in (
        (RECITER, "LLM", "transformers"),
        (GUIDE, "LLM", "transformers"),
        (MINILM, "embedding", "sentence_transformers"),
    ):
        words = ("launch", "-en", engine, "-n", name, "-u", name, "-t", kind)
        launched = platform.command(*words)
        assert launched.returncode == 0, launched.stderr
    words = ("launch", "-n", "bge-reranker-base", "-t", "rerank", "-u", RERANKER)
    launched = platform.command(*words, "-mp", str(reranker))
    assert launched.returncode == 0, launched.stderr
    return platform


@contextmanager
def opened(
    browser: Browser, platform: Platform, size: dict[str, int], **options: str
) -> Iterator[Page]:
    """A page of its own, which may complain of nothing."""
    complaints: list[str] = []
    context = browser.new_context(viewport=size, locale="en-GB", **options)  # type: ignore[arg-type]
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.on(
        "console", lambda said: said.type in {"error", "warning"} and complaints.append(said.text)
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(platform.endpoint)
    yield page
    context.close()
    assert complaints == []


def go(page: Page, name: str) -> None:
    page.get_by_role("navigation", name="Pages").get_by_role("link", name=name).click()


def check_access(page: Page) -> None:
    """Nothing on the page may keep somebody from using it."""
    found = Axe().run(page).response["violations"]
    grave = [one for one in found if one["impact"] in {"serious", "critical"}]
    assert grave == [], json.dumps(grave, indent=2)


def check_width(page: Page) -> None:
    """The page is as wide as the window; what is wider scrolls in its own box."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_model_lives_its_whole_life_on_the_page(
    browser: Browser, platform: Platform, guide_copy: Path, size: dict[str, int]
) -> None:
    name = f"mine-{size['width']}"
    with opened(browser, platform, size) as page:
        go(page, "Register")
        page.get_by_label("Name").fill(name)
        page.get_by_label("Directory").fill(str(guide_copy))
        page.get_by_label("Size in billions").fill("0_01")
        page.get_by_label("A fine-tune of").select_option(GUIDE)
        page.get_by_role("button", name="Register").click()
        page.get_by_role("status").get_by_role("link", name="Launch").click()

        page.get_by_label("Model UID").fill(name)
        page.get_by_role("button", name="Launch", exact=True).click()
        expect(page.get_by_role("progressbar", name=f"Progress of {name}")).to_be_visible()
        page.get_by_role("link", name="Use it").click()

        page.get_by_label("Message").fill("What is Xinference?")
        page.keyboard.press("Enter")
        answer = page.get_by_role("article", name="Model")
        expect(answer).to_contain_text("OpenAI-compatible")
        expect(answer).to_contain_text(re.compile(r"First token after \d+ ms · \d+ \+ \d+ tokens"))

        go(page, "Models")
        card = page.get_by_role("article", name=name)
        expect(card).to_contain_text("READY")
        card.get_by_role("button", name="Add a replica").click()
        expect(card.get_by_role("listitem").filter(has_text="READY")).to_have_count(2)
        card.get_by_role("button", name="Remove").last.click()
        page.get_by_role("dialog").get_by_role("button", name="Remove").click()
        expect(card.get_by_role("listitem")).to_have_count(1)
        card.get_by_text("Events").click()
        expect(card.get_by_text("was added")).to_be_visible()
        check_width(page)
        card.get_by_role("button", name="Terminate").click()
        page.get_by_role("dialog").get_by_role("button", name="Terminate").click()
        expect(card).to_have_count(0)

        go(page, "Register")
        page.get_by_role("button", name=re.compile("Remove")).click()
        page.get_by_role("dialog").get_by_role("button", name="Remove").click()
        expect(page.get_by_text("No model of your own is registered.")).to_be_visible()


@pytest.fixture
def guide_copy() -> Path:
    """The files of the guide model, as somebody's own."""
    import xinference.catalog

    return Path(xinference.catalog.__file__).parent / "guide"


def test_an_answer_stops_when_the_button_is_pressed(browser: Browser, models: Platform) -> None:
    def write_on(route: Route, request: Request) -> None:
        body = json.loads(request.post_data or "{}")
        route.continue_(post_data=json.dumps(body | {"ignore_eos": True, "max_tokens": 900}))

    with opened(browser, models, DESKTOP) as page:
        page.route("**/v1/chat/completions", write_on)
        page.goto(f"{models.endpoint}/#/playground?model={GUIDE}")
        page.get_by_label("Message").fill("Tell me everything.")
        page.keyboard.press("Enter")
        answer = page.get_by_role("article", name="Model")
        expect(answer.locator(".prose").last).not_to_be_empty()
        page.get_by_role("button", name="Stop").click()

        expect(answer.get_by_text("Stopped.")).to_be_visible()
        expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_a_chat_calls_a_tool_and_goes_on_with_its_result(
    browser: Browser, models: Platform
) -> None:
    with opened(browser, models, DESKTOP) as page:
        page.goto(f"{models.endpoint}/#/playground?model={RECITER}")
        page.get_by_label("Tools").fill(json.dumps(TOOLS))
        page.get_by_label("Message").fill("Is it sunny?")
        page.keyboard.press("Enter")
        expect(page.get_by_text(f"get_weather({json.dumps(CALL)})")).to_be_visible()
        page.get_by_label("Result of get_weather").fill("sunny")
        page.get_by_role("button", name="Give the results").click()

        expect(page.get_by_role("article", name="Model").last).to_contain_text(RESULT)


def test_thoughts_stand_apart_from_the_answer(browser: Browser, models: Platform) -> None:
    with opened(browser, models, DESKTOP) as page:
        page.goto(f"{models.endpoint}/#/playground?model={RECITER}")
        page.get_by_label("Thinking").select_option("On")
        page.get_by_label("Message").fill("Where?")
        page.keyboard.press("Enter")
        answer = page.get_by_role("article", name="Model")
        expect(answer.get_by_text(ANSWER_AFTER_THOUGHT, exact=True)).to_be_visible()
        expect(answer.get_by_text(THOUGHT)).to_be_hidden()
        answer.get_by_text("Thoughts").click()

        expect(answer.get_by_text(THOUGHT)).to_be_visible()


def test_two_models_answer_side_by_side(browser: Browser, models: Platform) -> None:
    with opened(browser, models, DESKTOP) as page:
        page.goto(f"{models.endpoint}/#/playground?model={RECITER}")
        page.get_by_label("Ask two models side by side").check()
        page.get_by_label("Model", exact=True).last.select_option(GUIDE)
        page.get_by_label("Message").fill("What is Xinference?")
        page.keyboard.press("Enter")

        first, second = (page.get_by_role("article", name="Model").nth(i) for i in (0, 1))
        expect(first).to_contain_text(ANSWER)
        expect(second).to_contain_text("OpenAI-compatible")


def test_a_text_is_gone_on_with(browser: Browser, models: Platform) -> None:
    with opened(browser, models, DESKTOP) as page:
        page.goto(f"{models.endpoint}/#/playground?tab=completion&model={GUIDE}")
        page.get_by_label("Most tokens (max_tokens)").fill("8")
        text = page.get_by_label("Text", exact=True)
        text.fill("Xinference is")
        page.get_by_role("button", name="Go on").click()

        expect(page.get_by_role("status").filter(has_text="First token after")).to_be_visible()
        expect(text).not_to_have_value("Xinference is")


def test_alike_texts_are_shown_as_alike(browser: Browser, models: Platform) -> None:
    with opened(browser, models, DESKTOP) as page:
        page.goto(f"{models.endpoint}/#/playground?model={MINILM}")
        page.get_by_role("button", name="Compare").click()
        cells = page.get_by_role("cell")
        expect(page.get_by_text("3 vectors of 384 numbers")).to_be_visible()
        values = [
            float(text) for text in cells.all_inner_texts() if re.fullmatch(r"-?\d\.\d+", text)
        ]

        assert values[0] == pytest.approx(1.0, abs=0.001)
        assert values[1] > values[2]
        check_access(page)


def test_documents_are_ranked(browser: Browser, models: Platform) -> None:
    with opened(browser, models, DESKTOP) as page:
        page.goto(f"{models.endpoint}/#/playground?model={RERANKER}")
        page.get_by_label("Question").fill("where can I read")
        page.get_by_label("Documents").fill("a library\nof the old harbour\nbread and flour")
        page.get_by_role("button", name="Rerank").click()
        lines = page.get_by_role("main").get_by_role("listitem")
        expect(lines).to_have_count(3)
        scores = [float(line.split()[-1]) for line in lines.all_inner_texts()]

        assert scores == sorted(scores, reverse=True)
        check_access(page)


def test_the_catalogue_is_narrowed_to_what_is_here_and_what_fits(
    browser: Browser, models: Platform
) -> None:
    def names() -> list[str]:
        return page.locator(".family strong").all_inner_texts()

    with opened(browser, models, DESKTOP) as page:
        go(page, "Launch")
        count = page.get_by_role("status").filter(has_text="families")
        expect(count).to_be_visible()
        everything = names()
        page.get_by_label("Needs no download").check()
        expect(count).not_to_have_text(f"{len(everything)} families")
        cached = names()
        page.get_by_label("Needs no download").uncheck()
        page.get_by_label("Fits here now").check()
        expect(count).not_to_have_text(f"{len(everything)} families")
        fitting = names()

        assert {GUIDE, MINILM} <= set(cached)
        assert len(cached) < len(fitting) < len(everything)
        assert "deepseek-v3-0324" in everything
        assert "deepseek-v3-0324" not in fitting


def test_every_option_of_a_launch_is_in_what_is_copied(browser: Browser, models: Platform) -> None:
    with opened(browser, models, DESKTOP) as page:
        page.goto(f"{models.endpoint}/#/launch?name={GUIDE}")
        page.get_by_text("More options").click()
        for label, text in {
            "Model UID": "mine",
            "Worker": "127.0.0.1",
            "GPUs by number": "0, 1",
            "Most replicas": "2",
            "Sleeps after seconds": "60",
            "Packages of its own": "einops\nsome-package>=2",
            "Environment variables": "SOME_NAME = some value",
            "Other options of the engine": "block_size = 32",
        }.items():
            page.get_by_label(label, exact=True).fill(text)
        page.get_by_label("May sleep to make room for others").check()
        command = page.locator(".snippets pre").first.inner_text()
        check_access(page)
        check_width(page)

        words = shlex.split(command.replace("\\\n", " "))
        assert words[:2] == ["xinference", "launch"]
        context = launch_command.make_context("launch", words[2:])
        assert context.params["model_uid"] == "mine"
        assert context.params["worker_ip"] == "127.0.0.1"
        assert context.params["gpu_idx"] == "0,1"
        assert context.params["max_replicas"] == 2
        assert context.params["idle_timeout"] == 60
        assert context.params["virtual_env_packages"] == ("einops", "some-package>=2")
        assert context.params["envs"] == (("SOME_NAME", "some value"),)
        assert context.params["autoload"] is True
        assert "--block_size 32" in command
        # The same body is what would be sent: Python that can be read.
        page.locator(".snippets summary", has_text="Python").click()
        ast.parse(page.locator(".snippets pre").last.inner_text())


def test_a_log_is_followed_searched_paused_and_copied(browser: Browser, models: Platform) -> None:
    log = models.home / "logs" / f"{GUIDE}-rep0.log"

    def write(text: str, level: str = "INFO") -> None:
        now = datetime.now().isoformat(" ", "milliseconds").replace(".", ",")
        with log.open("a") as file:
            file.write(f"{now} {level} xinference.engine: {text}\n")

    with opened(browser, models, DESKTOP) as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.get_by_role("article", name=GUIDE).get_by_role("link", name="Logs").click()
        lines = page.get_by_role("log")
        expect(lines).to_contain_text(f"{GUIDE}-rep0")
        expect(page.get_by_role("list", name="Events")).to_contain_text("ready")
        write("first of three")
        expect(lines).to_contain_text("first of three")

        page.get_by_role("button", name="Pause").click()
        write("second of three")
        expect(page.get_by_text("paused, 1 more came")).to_be_visible()
        expect(lines).not_to_contain_text("second of three")
        page.get_by_role("button", name="Pause").click()
        expect(lines).to_contain_text("second of three")

        write("third of three", level="ERROR")
        page.get_by_label("Level, and graver").select_option("ERROR")
        expect(lines).to_contain_text("third of three")
        expect(lines).not_to_contain_text("first of three")
        page.get_by_label("Level, and graver").select_option("INFO")
        page.get_by_role("searchbox", name="Search").fill("OF THREE")
        expect(lines.locator(".line")).to_have_count(3)
        expect(lines.locator("mark").first).to_have_text("of three")
        check_access(page)
        check_width(page)
        page.get_by_role("button", name="Copy").click()
        copied = page.evaluate("navigator.clipboard.readText()")
        told = [line.rpartition(": ")[2] for line in copied.splitlines()]
        assert told == ["first of three", "second of three", "third of three"]

        page.get_by_role("searchbox", name="Search").fill("")
        page.get_by_label("Log of").select_option("Supervisor")
        expect(lines).to_contain_text("supervisor[")
        page.reload()
        expect(lines).to_contain_text("supervisor[")


def test_a_log_that_may_not_be_read_says_which_key_may(browser: Browser, tmp_path: Path) -> None:
    with started(tmp_path) as platform:
        made = platform.command("keys", "create", "-n", "boss", "-s", "admin", "--json")
        boss = json.loads(made.stdout)["key"]
        words = ("keys", "create", "-n", "eye", "-s", "monitor", "--json", "-ak", boss)
        eye = json.loads(platform.command(*words).stdout)["key"]
        context = browser.new_context(viewport=PHONE, locale="en-GB")
        page = context.new_page()
        page.add_init_script(f"sessionStorage.setItem('xinference.key', '{eye}')")
        page.goto(f"{platform.endpoint}/#/logs")

        expect(page.get_by_role("alert")).to_contain_text("Use one with the scope that is needed")
        check_access(page)
        check_width(page)
        context.close()


def test_charts_move_while_models_work(browser: Browser, models: Platform) -> None:
    with opened(browser, models, DESKTOP) as page:
        line = page.get_by_role("article", name=GUIDE).locator("polyline").first
        expect(line).to_have_attribute("points", re.compile(r"\d"))
        before = line.get_attribute("points")
        body = {"model": GUIDE, "prompt": "Once", "max_tokens": 500, "ignore_eos": True}
        httpx.post(f"{models.endpoint}/v1/completions", json=body, timeout=60).raise_for_status()

        expect(
            page.get_by_role("img", name=re.compile("^Tokens per second .* now [1-9]")).first
        ).to_be_visible()
        assert line.get_attribute("points") != before
        go(page, "Cluster")
        expect(
            page.get_by_role("img", name=re.compile("^Memory over the last hour, now .* %"))
        ).to_be_visible()


@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_page_can_be_used_by_everybody(
    browser: Browser, models: Platform, size: dict[str, int], look: str
) -> None:
    with opened(browser, models, size, color_scheme=look) as page:
        for name in PAGES:
            page.goto(f"{models.endpoint}/#/{name}")
            page.wait_for_load_state("networkidle" if name != "cluster" else "load")
            expect(page.get_by_role("heading", level=1)).to_be_visible()
            check_access(page)
            check_width(page)


def test_the_page_speaks_chinese(browser: Browser, models: Platform) -> None:
    with opened(browser, models, DESKTOP) as page:
        page.get_by_label("Language").select_option("zh")

        expect(page.get_by_role("navigation").get_by_role("link", name="试用")).to_be_visible()
        assert page.evaluate("document.documentElement.lang") == "zh"


def test_the_first_key_is_made_shown_once_and_used(browser: Browser, tmp_path: Path) -> None:
    with started(tmp_path) as platform, opened(browser, platform, DESKTOP) as page:
        go(page, "Keys")
        page.get_by_label("Name").fill("boss")
        page.get_by_label(re.compile("admin")).check()
        page.get_by_role("button", name="Make a key").click()

        expect(page.get_by_role("rowheader", name="boss")).to_be_visible()
        assert page.locator("pre").inner_text().startswith("xin-")
        # The gateway is locked now, and the page goes on with the key.
        assert httpx.get(f"{platform.endpoint}/v1/models").status_code == 401
        check_access(page)
        go(page, "Models")
        expect(page.get_by_text("No model is running yet.")).to_be_visible()
