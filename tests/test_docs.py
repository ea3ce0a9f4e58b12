# SPDX-License-Identifier: Apache-2.0
"""The pages tell the truth: what they list is what the code has; and they make a site."""

import asyncio
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import click
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.cluster import FakeCluster
from tests.pages.blocks import PAGES, ROOT, name_of
from tests.pages.reference import COMMAND, FOLDER, REFERENCE, commands, routes
from xinference.api.access import ACCESS
from xinference.api.app import create_app
from xinference.api.engine_metrics import COUNTERS, DOCUMENTATION
from xinference.api.worker_exporter import worker_families
from xinference.cli.main import COMMANDS
from xinference.identifiers import ModelUid, NodeId, ReplicaUid
from xinference.protocol.histograms import SECONDS, Histogram
from xinference.protocol.nodes import NodeResources
from xinference.protocol.worker_reading import ReplicaReading, WorkerReading
from xinference.settings import OBSOLETE, VARIABLES

DOC = ROOT / "doc"
OF_NOW = [page for page in PAGES if page.name != "changelog.md" and "experiments" not in page.parts]
"""Pages that tell of this version, and not of what has been."""
FETCHING = {"link": "href", "script": "src", "img": "src", "iframe": "src"}
"""What a browser loads by itself."""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [target for target in targets if "://" not in target]

    missing = [target for target in local if not (page.parent / target).exists()]

    assert not missing


def test_the_settings_page_lists_every_variable_and_no_other() -> None:
    page = (DOC / "settings.md").read_text()

    rows = re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE)
    obsolete = re.findall(r"XINFERENCE_[A-Z_]+", page.partition("Obsolete:")[2])
    assert (set(rows), set(obsolete)) == (set(VARIABLES), set(OBSOLETE))
    assert set(re.findall(r"XINFERENCE_[A-Z_]+", page)) <= {*rows, *obsolete}


def test_the_reference_has_every_command_every_option_and_every_route() -> None:
    for name, page in REFERENCE.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == page(), f"write it anew: {COMMAND}"


def test_the_pages_name_no_command_option_or_route_that_there_is_not() -> None:
    options = {
        opt
        for _, command in commands()
        for option in command.params
        if isinstance(option, click.Option)
        for opt in (*option.opts, *option.secondary_opts)
    }
    paths = {re.sub(r"\{[^}]*\}", "{}", row) for row in (*routes(), *ACCESS)}

    page = (DOC / "cli.md").read_text()
    named = set(re.findall(r"^\| (`-.*?) \|", page, re.MULTILINE))
    unknown = {
        word
        for cell in named
        for word in re.findall(r"`(--?[a-z][a-z-]*)", cell)
        if word not in options
    }
    assert not unknown, "options"
    assert set(re.findall(r"`xinference ([a-z-]+)", page)) <= set(COMMANDS)
    for page_of_now in OF_NOW:
        text = page_of_now.read_text()
        for method, path in re.findall(r"`(GET|POST|PUT|DELETE) (/[^`\s]*)`", text):
            row = f"{method} {re.sub(r'[{][^}]*[}]', '{}', path.partition('?')[0])}"
            assert row in paths or "…" in row, f"{name_of(page_of_now)}: {method} {path}"


def test_the_pages_name_every_metric_and_no_other() -> None:
    declared = asyncio.run(declared_metrics())
    told: dict[str, str] = {}
    for page in OF_NOW:
        for name in re.findall(r"xinference:([a-z_]+[a-z])\b(?!_?\*)", page.read_text()):
            told.setdefault(name, name_of(page))

    untold = sorted(declared - set(told))
    invented = sorted(f"{name} in {page}" for name, page in told.items() if name not in declared)
    assert (untold, invented) == ([], [])


async def declared_metrics() -> set[str]:
    """Return the names of what gateways and workers declare, as Prometheus shows them."""
    # Why here: it imports torch.
    from xinference.engine.loop import EngineStats

    cluster = await FakeCluster.running()
    cluster.more_counters = {
        **{name: float(value) for name, value in asdict(EngineStats()).items()},
        **dict.fromkeys((*COUNTERS, "num_waiting_texts"), 0.0),
    }
    for name in DOCUMENTATION.keys() - COUNTERS:
        cluster.more_counters |= Histogram(SECONDS).counters(name)
    transport = httpx.ASGITransport(app=create_app(cluster))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        page = (await http.get("/metrics")).text
    return {
        family.name.removeprefix("xinference:") + ("_total" if family.type == "counter" else "")
        for family in (
            *text_string_to_metric_families(page),
            *worker_families(a_worker(cluster.more_counters)),
        )
        if family.name.startswith("xinference:")
    }


def a_worker(counters: dict[str, float]) -> WorkerReading:
    """Return a reading of a worker with one replica."""
    replica = ReplicaReading(
        replica=ReplicaUid(ModelUid("guide"), 0),
        state="ready",
        model_name="guide",
        model_type="LLM",
        model_engine="transformers",
        model_format="pytorch",
        quantization="none",
        load_seconds=1.0,
        counters=counters,
    )
    host = NodeResources(
        cpu_count=1,
        cpu_utilization=0.0,
        memory_total_bytes=1,
        memory_used_bytes=0,
        memory_available_bytes=1,
    )
    return WorkerReading(
        node=NodeId("127.0.0.1:5001"), has_joined=True, resources=host, replicas=(replica,)
    )


def test_ci_runs_the_commands_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    script = (ROOT / ".ci" / "run").read_text()

    for wanted in ("run", "test"):
        assert re.search(rf"<!-- {wanted} -->\n```bash\n[^`]+```", readme)
        assert f"readme_command {wanted})" in script


def test_the_site_is_built_without_a_warning_and_needs_nothing_from_elsewhere(
    tmp_path: Path,
) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        reader = Fetched()
        reader.feed(page.read_text(encoding="utf-8"))
        assert not [url for url in reader.urls if "//" in url], page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


class Fetched(HTMLParser):
    """Collects the addresses that a browser loads with a page."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        url = given.get(FETCHING.get(tag, ""))
        if url and not (tag == "link" and given.get("rel") in ("canonical", "prev", "next")):
            self.urls.append(url)
