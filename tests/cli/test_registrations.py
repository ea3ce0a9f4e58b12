# SPDX-License-Identifier: Apache-2.0
"""`registrations`, `register`, `unregister`, `engine`: what is sent and what is printed."""

import json
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from tests.cli.conftest import Run
from tests.fakes.http import Reply, Script

FAMILY = {
    "model_name": "qwen1.5-chat",
    "model_lang": ["en", "zh"],
    "model_ability": ["chat", "tools"],
    "is_builtin": True,
}
VARIANTS = [
    {
        "model_name": "qwen1.5-chat",
        "model_format": "pytorch",
        "model_size_in_billions": 4,
        "quantizations": ["none"],
    },
    {
        "model_name": "qwen1.5-chat",
        "model_format": "gptq",
        "model_size_in_billions": "1_8",
        "quantizations": ["Int4", "Int8"],
    },
]
ENGINES = {"Transformers": VARIANTS, "vLLM": "it is not installed"}


def test_the_catalogue_can_be_searched(script: Script, run: Run) -> None:
    script.replies["GET /v1/model_registrations/LLM"] = Reply(json=[FAMILY])

    run("registrations", "-q", "small", "-a", "chat", "-a", "tools", "--max-size", "3",
        "--fits", "--cached")  # fmt: skip

    (sent,) = (one for one in script.asked if one.path == "/v1/model_registrations/LLM")
    assert parse_qs(sent.query) == {
        "detailed": ["true"], "query": ["small"], "ability": ["chat", "tools"],
        "max_size": ["3.0"], "fits": ["true"], "cached": ["true"],
    }  # fmt: skip


def test_models_that_embed_are_shown_with_their_language_and_dimensions(
    script: Script, run: Run
) -> None:
    family = {"model_name": "bge-m3", "language": ["multilingual"], "model_ability": ["embed"]}
    told = [{**family, "dimensions": 1024, "is_builtin": True}]
    script.replies["GET /v1/model_registrations/embedding"] = Reply(json=told)

    table = run("registrations", "-t", "embedding")

    for shown in ("Dimensions", "bge-m3", "multilingual", "1024"):
        assert shown in table.stdout


def test_the_catalogue_is_a_table_or_json(script: Script, run: Run) -> None:
    script.replies["GET /v1/model_registrations/LLM"] = Reply(json=[FAMILY])

    table = run("registrations", "-t", "LLM")
    as_json = run("registrations", "--json")

    assert table.exit_code == 0
    for shown in ("Is-built-in", "qwen1.5-chat", "en, zh", "chat, tools", "True"):
        assert shown in table.stdout
    assert json.loads(as_json.stdout) == [FAMILY]
    assert len(script.asked) == 2


def test_a_file_is_registered_as_it_is(script: Script, run: Run, tmp_path: Path) -> None:
    script.replies["POST /v1/model_registrations/LLM"] = Reply(json=None)
    path = tmp_path / "model.json"
    path.write_text('{"model_name": "meins-für-mich"}', encoding="utf-8")

    done = run("register", "--file", str(path), "--persist", "-w", "10.0.0.1")

    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    assert script.asked[0].body == {
        "model": path.read_text(encoding="utf-8"),
        "persist": True,
        "worker_ip": "10.0.0.1",
    }


def test_a_file_that_cannot_be_read_is_named(script: Script, run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_bytes(b"\xff")

    missing = run("register", "--file", str(tmp_path / "none.json"))
    unreadable = run("register", "--file", str(tmp_path / "model.json"))

    assert missing.exit_code == 2
    assert unreadable.exit_code == 1
    assert "model.json" in unreadable.stderr
    assert script.asked == []


def test_a_registered_model_is_unregistered(script: Script, run: Run) -> None:
    script.replies["DELETE /v1/model_registrations/LLM/mine"] = Reply(json=None)

    assert run("unregister", "-n", "mine").exit_code == 0


def test_engines_are_a_table_with_the_reasons_beside_it(script: Script, run: Run) -> None:
    script.replies["GET /v1/engines/LLM/qwen1.5-chat"] = Reply(json=ENGINES)

    done = run("engine", "-n", "qwen1.5-chat")

    assert done.exit_code == 0
    for shown in ("Transformers", "pytorch", "1_8", "Int4, Int8"):
        assert shown in done.stdout
    assert "vLLM: it is not installed" in done.stderr


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["-en", "transformers"], {"Transformers": VARIANTS}),
        (["-f", "gptq"], {"Transformers": VARIANTS[1:], "vLLM": "it is not installed"}),
        (["-s", "1.8", "-q", "int8", "-en", "transformers"], {"Transformers": VARIANTS[1:]}),
        (["-s", "72", "-en", "transformers"], {"Transformers": []}),
    ],
)
def test_engines_are_narrowed_down(
    script: Script, run: Run, words: list[str], found: object
) -> None:
    script.replies["GET /v1/engines/LLM/qwen1.5-chat"] = Reply(json=ENGINES)

    done = run("engine", "-n", "qwen1.5-chat", *words, "--json")

    assert json.loads(done.stdout) == found


def test_what_vllm_can_run_is_listed(script: Script, run: Run) -> None:
    told = {"chat": ["qwen1.5-chat"], "generate": ["opt"]}
    script.replies["GET /v1/models/vllm-supported"] = Reply(json=told)

    lists, as_json = run("vllm-models"), run("vllm-models", "--json")

    for shown in ("chat", "qwen1.5-chat", "generate", "opt"):
        assert shown in lists.stdout
    assert json.loads(as_json.stdout) == told
