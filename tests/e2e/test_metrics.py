# SPDX-License-Identifier: Apache-2.0
"""The pages of a gateway and of a worker under load say what clients counted; what is made of them.

`deploy/monitoring/` is checked with Prometheus' own tool, and asks for no metric that is not there.
"""

import asyncio
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.debian import need_command
from tests.e2e.conftest import GUIDE
from tests.e2e.platform import Platform, free_port, started, wait_until

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
NUM_REQUESTS = 40
METRIC = re.compile(r"xinference:\w+")
WITHOUT_A_GPU = {
    "xinference:worker_gpu_memory_used_bytes",
    "xinference:worker_gpu_quarantined",
    "xinference:worker_gpu_utilization_percent",
}
"""Their families are on the page, without a sample where there is no GPU."""


@pytest.fixture(scope="module")
def promtool() -> str:
    return need_command("promtool", package="prometheus")


@pytest.fixture(scope="module")
def worker_page() -> str:
    """Where the worker has a page of its own."""
    return f"http://127.0.0.1:{free_port()}/metrics"


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, worker_page: str) -> Iterator[Platform]:
    port = str(httpx.URL(worker_page).port)
    with started(tmp_path_factory.mktemp("home"), "-mp", port) as running:
        yield running


def scraped(platform: Platform) -> str:
    return page_at(f"{platform.endpoint}/metrics")


def page_at(url: str) -> str:
    answer = httpx.get(url, timeout=30)
    assert answer.status_code == 200
    return answer.text


def sums(page: str) -> Counter[str]:
    """Return the sum of each sample of the guide model, over its other labels."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.labels.get("model_uid") == GUIDE:
                found[sample.name.removeprefix("xinference:")] += int(sample.value)
    return found


async def ask(http: httpx.AsyncClient, number: int, counted: Counter[str]) -> None:
    """One client: every fourth leaves after the first text; half of the others stream."""
    leaves, stream = number % 4 == 3, number % 2 == 1
    body = {
        "model": GUIDE,
        "messages": [{"role": "user", "content": f"What is Xinference? {number}"}],
        "max_tokens": 400 if leaves else 16 + number % 5,
        "ignore_eos": True,
        "stream": stream,
    }
    counted["model_request_total"] += 1
    if not stream:
        usage = (await http.post("/v1/chat/completions", json=body)).json()["usage"]
        counted["generate_tokens_total"] += usage["completion_tokens"]
        return
    body["stream_options"] = {"include_usage": True}
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if chunk.get("usage"):
                counted["generate_tokens_total"] += chunk["usage"]["completion_tokens"]
            if leaves and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                counted["model_request_disconnects_total"] += 1
                return


async def load(platform: Platform) -> Counter[str]:
    counted: Counter[str] = Counter()
    async with httpx.AsyncClient(base_url=platform.endpoint, timeout=120) as http:
        await asyncio.gather(*(ask(http, number, counted) for number in range(NUM_REQUESTS)))
    return counted


def test_the_page_counts_what_the_clients_counted(guide: Platform) -> None:
    before = sums(scraped(guide))
    counted = asyncio.run(load(guide))
    left = counted["model_request_disconnects_total"]
    assert left == NUM_REQUESTS // 4

    def grown() -> Counter[str]:
        after = sums(scraped(guide))
        return Counter({name: after[name] - before[name] for name in after})

    def is_settled() -> Counter[str] | None:
        now = grown()
        # What an engine says is asked for once a second.
        counts = {
            "model_request_disconnects_total": left,
            "engine_aborts_total": left,
            "engine_decode_seconds_count": NUM_REQUESTS,
        }
        return now if all(now[name] >= least for name, least in counts.items()) else None

    told = wait_until("those that left are counted", is_settled, timeout_seconds=30)
    assert told["model_request_total"] == NUM_REQUESTS
    assert told["model_request_disconnects_total"] == left
    assert told["model_request_aborts_total"] == left
    assert told["engine_queue_seconds_count"] == NUM_REQUESTS
    assert told["engine_prefill_seconds_count"] == NUM_REQUESTS
    assert told["engine_decode_seconds_count"] == NUM_REQUESTS
    assert told["engine_admissions_total"] - told["engine_preemptions_total"] == NUM_REQUESTS
    assert told["engine_batch_size_count"] == told["engine_steps_total"]
    assert told["model_request_duration_seconds_count"] == NUM_REQUESTS
    assert told["engine_aborts_total"] == left
    assert told["model_request_errors_total"] == 0
    # What those that left were sent counts, too: at least the text that they saw.
    assert told["generate_tokens_total"] >= counted["generate_tokens_total"] + left
    assert told["generate_tokens_total"] <= told["engine_generated_tokens_total"]
    assert sums(scraped(guide))["model_serve_count"] == 0


def test_the_workers_own_page_counts_what_the_clients_counted(
    guide: Platform, worker_page: str
) -> None:
    def all_are_counted() -> bool:
        # What a replica says is asked for once a second.
        pages = (page_at(worker_page), scraped(guide))
        ours, theirs = (sums(page)["model_request_total"] for page in pages)
        return ours == theirs

    wait_until("what was before is counted", all_are_counted, timeout_seconds=30)
    before = sums(page_at(worker_page))
    counted = asyncio.run(load(guide))

    def grown() -> Counter[str]:
        after = sums(page_at(worker_page))
        return Counter({name: after[name] - before[name] for name in after})

    def is_settled() -> Counter[str] | None:
        now = grown()
        return now if now["model_request_total"] >= NUM_REQUESTS else None

    told = wait_until("all requests are counted", is_settled, timeout_seconds=30)
    assert told["model_request_total"] == NUM_REQUESTS
    assert told["model_request_duration_seconds_count"] == NUM_REQUESTS
    assert told["time_to_first_token_seconds_count"] == NUM_REQUESTS
    assert told["model_request_errors_total"] == 0
    assert told["engine_aborts_total"] == counted["model_request_disconnects_total"]
    assert told["generate_tokens_total"] == told["output_tokens_total_counter"]
    assert told["generate_tokens_total"] > counted["generate_tokens_total"]
    assert sums(page_at(worker_page))["model_serve_count"] == 0


def test_the_workers_own_page_outlives_the_supervisor_and_the_worker(
    tmp_path: Path, worker_page: str
) -> None:
    url = f"http://127.0.0.1:{free_port()}/metrics"
    joined = re.compile(r"^xinference:worker_has_joined\{[^}]*\} (\S+)$", re.M)

    def has_joined() -> str | None:
        try:
            found = joined.search(page_at(url))
        except httpx.HTTPError:
            return None
        return None if found is None else found[1]

    with started(tmp_path, "-mp", str(httpx.URL(url).port)) as platform:
        wait_until("it has joined", lambda: has_joined() == "1.0", timeout_seconds=30)
        supervisor = platform.control("supervisor")
        supervisor.suspend()
        wait_until("it says that it is alone", lambda: has_joined() == "0.0", timeout_seconds=60)
        supervisor.resume()
        wait_until("it is back", lambda: has_joined() == "1.0", timeout_seconds=60)
        platform.control("worker").kill()
        wait_until("another one has the port", lambda: has_joined() == "1.0", timeout_seconds=60)


@pytest.mark.parametrize("whose", ["gateway", "worker"])
def test_prometheus_can_read_the_page(
    guide: Platform, promtool: str, worker_page: str, whose: str
) -> None:
    checked = subprocess.run(
        [promtool, "check", "metrics"],
        input=scraped(guide) if whose == "gateway" else page_at(worker_page),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # It dislikes names that Xinference's dashboards have always known, and finds nothing else.
    complaints = [
        line
        for line in checked.stderr.splitlines()
        if "should not contain ':'" not in line
        and not re.match(
            r"xinference:(workers|models_loaded|api_keys_\w+|model_serve)_(total|count) .* suffix",
            line,
        )
        and not re.match(r"xinference:\w+_total_counter .* 'counter'", line)
    ]
    assert complaints == []
    assert checked.returncode in {0, 3}


def test_prometheus_takes_the_scrape_configuration_and_the_alerts(promtool: str) -> None:
    checked = subprocess.run(
        [promtool, "check", "config", str(MONITORING / "prometheus.yml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert checked.returncode == 0, checked.stderr
    assert "rules found" in checked.stdout


@pytest.mark.parametrize("name", ["alerts.yml", "grafana-dashboard.json", "grafana-workers.json"])
def test_alerts_and_dashboards_ask_for_metrics_that_there_are(
    guide: Platform, worker_page: str, name: str
) -> None:
    # A family is on the page from its first sample on: each kind of request is made once.
    asyncio.run(load(guide))
    httpx.post(f"{guide.endpoint}/v1/completions", json={"model": GUIDE, "prompt": "x" * 90_000})
    known = {
        sample.name
        for page in (scraped(guide), page_at(worker_page))
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    } | WITHOUT_A_GPU
    asked = set(METRIC.findall((MONITORING / name).read_text()))

    assert asked
    assert asked <= known
