# SPDX-License-Identifier: Apache-2.0
"""The catalogue as the supervisor uses it: list, register, resolve."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xinference.catalog import Catalog, Resolved, directory_of
from xinference.catalog.builtin_families import builtin_families
from xinference.catalog.family import size_text
from xinference.catalog.registry import MAX_SEEN_FILES
from xinference.catalog.runnable import refusal
from xinference.errors import (
    FamilyNotFound,
    InsufficientResources,
    InternalError,
    InvalidRequest,
    ModelAlreadyExists,
    UnsupportedVariant,
    XinferenceError,
)
from xinference.identifiers import ModelUid
from xinference.protocol.deployment import EngineOptions, LaunchSpec

from .registration import outcome_of, spec, text_of

BUILTIN = builtin_families()
LISTED = [(family, variant) for family in BUILTIN.values() for variant in family.variants]


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog.load(tmp_path)


def names(catalog: Catalog) -> list[str]:
    return [family["model_name"] for family in catalog.families("LLM")]


def has(catalog: Catalog, name: str) -> bool:
    return not isinstance(outcome_of(lambda: catalog.family("LLM", name)), FamilyNotFound)


def kept(home: Path) -> list[str]:
    directory = home / "model" / "v2" / "llm"
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def launch(name: str, **given: Any) -> LaunchSpec:
    return LaunchSpec(model_name=name, **given)


def files(directory: Path, **config: Any) -> str:
    """Make a directory with a `config.json`, as a model has."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(directory)


def test_families_are_sorted_by_name_without_letter_case(catalog: Catalog) -> None:
    catalog.register("LLM", text_of(model_name="Aardvark"), persist=False)
    catalog.register("LLM", text_of(model_name="zzz"), persist=False)

    found = names(catalog)

    assert found == sorted(found, key=str.casefold)
    assert found[0] == "Aardvark"
    assert found[-1] == "zzz"


def test_a_family_is_shown_with_one_spec_for_each_hub_and_quantization(catalog: Catalog) -> None:
    family = catalog.family("LLM", "qwen1.5-chat")

    assert family["is_builtin"] is True
    assert {
        "model_format": "gptq",
        "model_size_in_billions": "0_5",
        "activated_size_in_billions": None,
        "quantization": "Int8",
        "model_hub": "modelscope",
        "model_id": "Qwen/Qwen1.5-0.5B-Chat-GPTQ-Int8",
        "model_revision": None,
        "model_uri": None,
        "memory_bytes": 1_349_155_880,
    } in family["model_specs"]


def test_all_that_is_shown_is_json(catalog: Catalog) -> None:
    assert json.loads(json.dumps(catalog.families("LLM"))) == catalog.families("LLM")
    assert json.dumps(catalog.engines("LLM", "qwen3"))


@pytest.mark.parametrize("model_type", ["image", "audio", "video"])
def test_a_type_of_a_later_version_is_listed_empty(catalog: Catalog, model_type: str) -> None:
    assert catalog.families(model_type) == []
    with pytest.raises(FamilyNotFound):
        catalog.family(model_type, "xinference-guide")


def test_an_unknown_type_is_refused_with_the_right_one(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequest, match="did you mean embedding") as caught:
        catalog.families("embeding")

    assert caught.value.field == "model_type"


def test_an_unknown_family_is_refused_with_near_names(catalog: Catalog) -> None:
    with pytest.raises(FamilyNotFound) as caught:
        catalog.family("LLM", "qwen1.5-caht")

    assert "qwen1.5-chat" in caught.value.suggestions

    with pytest.raises(FamilyNotFound, match="`xinference registrations` lists"):
        catalog.family("LLM", "nothing like it")


def test_engines_say_what_they_run_or_why_they_do_not(catalog: Catalog) -> None:
    engines = catalog.engines("LLM", "xinference-guide")

    assert engines["Transformers"] == [
        {
            "model_name": "xinference-guide",
            "model_format": "pytorch",
            "model_size_in_billions": "0_002",
            "quantizations": ["none"],
        }
    ]
    assert engines["vLLM"] == engines["SGLang"] == engines["TRT-LLM"] == engines["Transformers"]
    assert "is not for llama.cpp, which reads ggufv2" in str(engines["llama.cpp"])
    assert isinstance(engines["MLX"], str)


def test_a_registered_family_is_listed_and_can_be_launched(catalog: Catalog) -> None:
    catalog.register("LLM", text_of(), persist=False)

    resolved = catalog.resolve(launch("my-model"))

    assert catalog.family("LLM", "my-model")["is_builtin"] is False
    assert resolved.source.path == "/models/mine"
    assert resolved.source.stop_token_ids == (151643, 151644, 151645)
    assert resolved.abilities == ("chat",)


def test_a_kept_registration_is_there_after_a_restart(tmp_path: Path) -> None:
    Catalog.load(tmp_path).register("LLM", text_of(model_name="模型"), persist=True)

    again = Catalog.load(tmp_path)

    assert again.family("LLM", "模型")["model_specs"][0]["model_uri"] == "/models/mine"
    assert kept(tmp_path) == ["模型.json"]


def test_a_registration_that_is_not_kept_is_gone_after_a_restart(tmp_path: Path) -> None:
    Catalog.load(tmp_path).register("LLM", text_of(), persist=False)

    assert "my-model" not in names(Catalog.load(tmp_path))
    assert kept(tmp_path) == []


def test_unregistering_removes_the_family_and_its_file(tmp_path: Path) -> None:
    catalog = Catalog.load(tmp_path)
    catalog.register("LLM", text_of(), persist=True)
    catalog.register("LLM", text_of(model_name="other"), persist=True)

    catalog.unregister("llm", "my-model")

    assert "my-model" not in names(catalog)
    assert "my-model" not in names(Catalog.load(tmp_path))
    assert kept(tmp_path) == ["other.json"]


def test_a_file_that_is_not_named_after_its_family_is_logged_and_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Catalog.load(tmp_path).register("LLM", text_of(), persist=True)
    directory = tmp_path / "model" / "v2" / "llm"
    (directory / "my-model.json").rename(directory / "other.json")

    assert "my-model" not in names(Catalog.load(tmp_path))
    assert "other.json" in caplog.text
    assert kept(tmp_path) == ["other.json"]


@pytest.mark.parametrize("name", ["qwen3", "QWEN3"])
def test_the_name_of_a_built_in_family_is_taken(catalog: Catalog, name: str) -> None:
    with pytest.raises(ModelAlreadyExists):
        catalog.register("LLM", text_of(model_name=name), persist=True)


def test_the_environment_that_a_family_wants_goes_to_its_launches(catalog: Catalog) -> None:
    environment = {"packages": ["einops"]}

    catalog.register("LLM", text_of(virtualenv=environment), persist=False)

    assert catalog.family("LLM", "my-model")["virtualenv"] == environment
    wanted = catalog.resolve(launch("my-model")).source.virtual_env
    assert wanted is not None
    assert wanted.packages == ("einops",)


def test_an_environment_that_cannot_be_is_refused(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequest, match=r"virtualenv\.packages"):
        catalog.register("LLM", text_of(virtualenv={"packages": ["-r x"]}), persist=False)


def test_the_name_of_a_registered_family_is_taken(tmp_path: Path) -> None:
    catalog = Catalog.load(tmp_path)
    catalog.register("LLM", text_of(), persist=True)

    with pytest.raises(ModelAlreadyExists):
        catalog.register("LLM", text_of(model_name="My-Model", context_length=1), persist=True)

    assert catalog.family("LLM", "my-model")["context_length"] == 4096
    assert kept(tmp_path) == ["my-model.json"]


def test_a_refused_registration_leaves_nothing(tmp_path: Path) -> None:
    catalog = Catalog.load(tmp_path)

    with pytest.raises(InvalidRequest):
        catalog.register("LLM", text_of(stop="</s>"), persist=True)

    assert "my-model" not in names(catalog)
    assert kept(tmp_path) == []


def test_a_registration_that_cannot_be_written_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("in the way")
    catalog = Catalog.load(tmp_path)

    with pytest.raises(InsufficientResources):
        catalog.register("LLM", text_of(), persist=True)

    assert "my-model" not in names(catalog)


def test_a_built_in_family_cannot_be_unregistered(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequest, match="built in"):
        catalog.unregister("LLM", "qwen3")


def test_unregistering_what_is_not_there_says_so(catalog: Catalog) -> None:
    with pytest.raises(FamilyNotFound):
        catalog.unregister("LLM", "my-model")


def test_registering_a_type_of_a_later_version_is_refused_by_its_name(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequest, match="image is not served"):
        catalog.register("image", text_of(), persist=True)


def test_keeping_without_a_home_is_our_mistake() -> None:
    with pytest.raises(InternalError):
        Catalog(BUILTIN).register("LLM", text_of(), persist=True)


@pytest.fixture
def home_with_one_good_file(tmp_path: Path) -> Iterator[Path]:
    Catalog.load(tmp_path).register("LLM", text_of(), persist=True)
    yield tmp_path
    assert "my-model" in names(Catalog.load(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "{", text_of(model_name="a b"), text_of(context_lenght=1), text_of(), "\ud800"]
)
def test_a_broken_file_is_logged_and_left_and_the_others_load(
    home_with_one_good_file: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken = home_with_one_good_file / "model" / "v2" / "llm" / "zz.json"
    broken.write_bytes(text.encode("utf-8", errors="surrogatepass"))

    with caplog.at_level(logging.ERROR):
        catalog = Catalog.load(home_with_one_good_file)

    assert names(catalog).count("my-model") == 1
    assert "zz.json" in caplog.text
    assert broken.exists()


def test_a_registration_goes_before_a_built_in_family_that_came_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "model" / "v2" / "llm"
    directory.mkdir(parents=True)
    (directory / "qwen3.json").write_text(text_of(model_name="qwen3"), encoding="utf-8")

    catalog = Catalog.load(tmp_path)

    assert catalog.resolve(launch("qwen3")).source.path == "/models/mine"
    assert "qwen3" in caplog.text
    catalog.unregister("LLM", "qwen3")
    assert catalog.family("LLM", "qwen3")["is_builtin"] is True


@settings(deadline=None, max_examples=25)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["register", "keep", "unregister", "restart"]),
            st.sampled_from(["a", "b", "A"]),
        ),
        max_size=12,
    )
)
def test_any_history_of_registrations_ends_as_a_dictionary_would(
    steps: list[tuple[str, str]],
) -> None:
    with TemporaryDirectory() as home:
        check_history(Path(home), steps)


def check_history(home: Path, steps: list[tuple[str, str]]) -> None:
    catalog = Catalog.load(home)
    expected: dict[str, bool] = {}
    for action, name in steps:
        if action == "restart":
            catalog = Catalog.load(home)
            expected = {one: True for one, is_kept in expected.items() if is_kept}
        elif action == "unregister" and name in expected:
            catalog.unregister("LLM", name)
            del expected[name]
        elif action == "unregister":
            with pytest.raises(FamilyNotFound):
                catalog.unregister("LLM", name)
        elif name.casefold() in map(str.casefold, expected):
            with pytest.raises(ModelAlreadyExists):
                catalog.register("LLM", text_of(model_name=name), persist=action == "keep")
        else:
            catalog.register("LLM", text_of(model_name=name), persist=action == "keep")
            expected[name] = action == "keep"

        assert {one for one in "abA" if has(catalog, one)} == set(expected)
        assert kept(home) == sorted(f"{one}.json" for one, is_kept in expected.items() if is_kept)


def test_every_listed_variant_resolves_or_says_what_would_have_to_happen() -> None:
    catalog = Catalog(BUILTIN)
    for family, variant in LISTED:
        wanted = launch(
            family.model_name,
            model_engine="transformers",
            model_size_in_billions=str(variant.size),
            model_format=variant.model_format,
            quantization=variant.quantization,
        )

        outcome = outcome_of(partial(catalog.resolve, wanted))

        if isinstance(outcome, UnsupportedVariant):
            assert outcome.problem == refusal(family, variant)
            continue
        assert isinstance(outcome, Resolved)
        download = outcome.source.download
        if download is None:
            assert outcome.source.path == variant.path
        else:
            assert outcome.source.path == ""
            assert (variant.model_hub, variant.model_id) in {
                (source.hub, source.model_id) for source in download.sources
            }


def test_every_engine_says_what_it_runs_of_every_family_or_why_not(catalog: Catalog) -> None:
    for family in BUILTIN.values():
        engines = catalog.engines("LLM", family.model_name)

        assert {"Transformers", "vLLM", "SGLang", "llama.cpp"} <= engines.keys()
        for answer in engines.values():
            assert answer, family.model_name
        runs = {
            (one["model_format"], str(one["model_size_in_billions"]), quantization)
            for one in engines["Transformers"]
            if isinstance(one, dict)
            for quantization in one["quantizations"]
        }
        can = [one for one in family.variants if refusal(family, one) is None]
        assert runs == {(one.model_format, size_text(one.size), one.quantization) for one in can}


@settings(deadline=None)
@given(
    name=st.sampled_from(["qwen3", "xinference-guide", "opt", "", "nope"]),
    model_type=st.sampled_from(["LLM", "llm", "rerank", "x"]),
    engine=st.none() | st.sampled_from(["transformers", "vLLM", "", "x"]),
    size=st.none() | st.text(max_size=3),
    model_format=st.none() | st.sampled_from(["pytorch", "awq", "", "x"]),
    quantization=st.none() | st.text(max_size=4),
    path=st.none() | st.text(max_size=4).map("/nowhere/{}".format) | st.text(max_size=4),
)
def test_any_launch_resolves_or_is_refused_on_purpose(
    name: str,
    model_type: str,
    engine: str | None,
    size: str | None,
    model_format: str | None,
    quantization: str | None,
    path: str | None,
) -> None:
    wanted = launch(
        name,
        model_type=model_type,
        model_engine=engine,
        model_size_in_billions=size,
        model_format=model_format,
        quantization=quantization,
        model_path=path,
    )

    outcome = outcome_of(lambda: Catalog(BUILTIN).resolve(wanted))

    if isinstance(outcome, Resolved):
        is_downloaded = outcome.source.download is not None
        assert outcome.source.path == (path or ("" if is_downloaded else "package:guide"))
    else:
        assert str(outcome)


def test_the_guide_needs_nothing_but_this_package(catalog: Catalog) -> None:
    resolved = catalog.resolve(launch("xinference-guide", model_engine="transformers"))

    assert resolved.source.path == "package:guide"
    assert resolved.description.model_hub == "package"
    assert {"chat", "generate"} <= set(resolved.abilities)
    assert directory_of(resolved.source.path).parent.name == "catalog"


def test_the_launch_of_the_first_seed_says_what_is_downloaded(catalog: Catalog) -> None:
    resolved = catalog.resolve(
        launch(
            "qwen1.5-chat",
            model_engine="transformers",
            model_format="pytorch",
            model_size_in_billions="4",
            quantization="none",
        )
    )

    download = resolved.source.download
    assert download is not None
    assert {str(source) for source in download.sources} == {"Qwen/Qwen1.5-4B-Chat"}
    assert download.model_version == "qwen1.5-chat--4B--pytorch--none"
    assert resolved.description.context_length == 32768


def test_a_hub_can_be_chosen_but_not_for_files_that_are_here(
    catalog: Catalog, tmp_path: Path
) -> None:
    wanted = launch("qwen1.5-chat", model_size_in_billions="4", download_hub="modelscope")

    download = catalog.resolve(wanted).source.download

    assert download is not None
    assert [source.hub for source in download.sources] == ["modelscope"]
    with pytest.raises(InvalidRequest, match="download_hub"):
        catalog.resolve(replace(wanted, model_path=files(tmp_path / "qwen")))


def test_a_directory_with_more_files_than_can_be_looked_at_is_for_the_worker_to_judge(
    catalog: Catalog, tmp_path: Path
) -> None:
    wanted = launch("qwen3", model_engine="llama.cpp", model_path=str(tmp_path))
    (tmp_path / "0.txt").touch()
    with pytest.raises(InvalidRequest, match=r"no \.gguf file"):
        catalog.resolve(wanted)

    for number in range(MAX_SEEN_FILES):
        (tmp_path / f"{number}.txt").touch()

    assert catalog.resolve(wanted).source.path == str(tmp_path)


def test_model_path_is_used_instead_of_the_hub(catalog: Catalog, tmp_path: Path) -> None:
    path = files(tmp_path / "qwen", max_position_embeddings=32768)

    resolved = catalog.resolve(
        launch("qwen1.5-chat", model_path=path, model_size_in_billions="4", replica=2)
    )

    assert resolved.source.path == path
    assert resolved.description.model_name == "qwen1.5-chat"
    assert resolved.description.model_engine == "Transformers"
    assert resolved.description.model_size_in_billions == "4"
    assert resolved.description.quantization == "none"
    assert resolved.description.model_hub == "local"
    assert resolved.description.context_length == 32768
    assert resolved.description.replica == 2


def test_files_that_only_the_worker_sees_are_left_to_it(catalog: Catalog) -> None:
    resolved = catalog.resolve(launch("qwen1.5-chat", model_path="/on/another/host"))

    assert resolved.source.path == "/on/another/host"
    assert resolved.description.context_length == 32768


@pytest.mark.parametrize("path", ["models/qwen", "~/qwen", "", "file:///models", "/a\0b"])
def test_a_path_that_is_not_absolute_is_refused(catalog: Catalog, path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        catalog.resolve(launch("qwen1.5-chat", model_path=path))

    assert caught.value.field == "model_path"


def test_visible_files_that_are_no_model_are_refused(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")

    with pytest.raises(InvalidRequest, match="not a directory"):
        catalog.resolve(launch("qwen1.5-chat", model_path=str(tmp_path / "a.txt")))
    with pytest.raises(InvalidRequest, match=r"no config\.json"):
        catalog.resolve(launch("qwen1.5-chat", model_path=str(tmp_path)))


def test_an_empty_directory_may_be_a_mount_point_of_the_worker(
    catalog: Catalog, tmp_path: Path
) -> None:
    assert catalog.resolve(launch("qwen1.5-chat", model_path=str(tmp_path))).source.path == str(
        tmp_path
    )


@pytest.mark.parametrize(
    ("config", "asked", "context"),
    [
        ({"max_position_embeddings": 512}, None, 512),
        ({"n_positions": 256}, None, 256),
        ({"text_config": {"max_position_embeddings": 128}}, None, 128),
        ({"max_position_embeddings": 512}, 64, 64),
        ({"max_position_embeddings": 512}, 4096, 512),
        ({"max_position_embeddings": True}, None, 2048),
        ({}, None, 2048),
        ({}, 64, 64),
    ],
)
def test_the_context_is_the_least_of_what_is_known(
    catalog: Catalog, tmp_path: Path, config: dict[str, Any], asked: int | None, context: int
) -> None:
    path = files(tmp_path / "files", **config)
    catalog.register("LLM", text_of(context_length=None, model_specs=[spec(model_uri=path)]), False)

    resolved = catalog.resolve(
        launch("my-model", engine_options=EngineOptions(max_model_len=asked))
    )

    assert resolved.description.context_length == context


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000])
def test_a_config_that_cannot_be_read_says_nothing_of_the_context(
    catalog: Catalog, tmp_path: Path, text: str
) -> None:
    path = files(tmp_path / "files")
    Path(path, "config.json").write_text(text)

    resolved = catalog.resolve(launch("qwen1.5-chat", model_path=path))

    assert resolved.description.context_length == 32768


def test_the_uid_is_the_callers_or_named_after_the_family(catalog: Catalog) -> None:
    named = launch("xinference-guide", model_uid=ModelUid("mine"))
    unnamed = launch("xinference-guide")

    assert catalog.resolve(named).description.model_uid == "mine"
    assert catalog.resolve(unnamed).description.model_uid == "xinference-guide"


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"model_name": "qwen1.5-caht"}, FamilyNotFound),
        ({"model_type": "image"}, InvalidRequest),
        ({"model_engine": "MLX"}, InvalidRequest),
        ({"model_size_in_billions": "5"}, UnsupportedVariant),
        ({"model_format": "gptq"}, UnsupportedVariant),
        ({"model_size_in_billions": "4B"}, InvalidRequest),
    ],
)
def test_what_cannot_be_launched_is_refused_even_with_files(
    catalog: Catalog, given: dict[str, Any], error: type[XinferenceError]
) -> None:
    with pytest.raises(error):
        catalog.resolve(LaunchSpec(**{"model_name": "qwen1.5-chat", "model_path": "/x", **given}))


def test_a_launch_carries_how_answers_are_written(catalog: Catalog) -> None:
    source = catalog.resolve(launch("qwen3", model_path="/x")).source

    assert source.tool_parser == "qwen"
    assert (source.reasoning_start_tag, source.reasoning_end_tag) == ("<think>", "</think>")


@pytest.mark.parametrize(
    ("name", "enable", "is_possible"),
    [
        ("qwen3", True, True),
        ("qwen3", False, True),
        ("QwQ-32B", True, True),
        ("QwQ-32B", False, False),
        ("qwen2.5-instruct", True, False),
        ("qwen2.5-instruct", False, True),
    ],
)
def test_only_hybrid_families_let_one_switch_their_thinking(
    catalog: Catalog, name: str, enable: bool, is_possible: bool
) -> None:
    wish = launch(name, model_path="/x", engine_options=EngineOptions(enable_thinking=enable))

    if is_possible:
        catalog.resolve(wish)
    else:
        with pytest.raises(InvalidRequest) as refused:
            catalog.resolve(wish)
        assert refused.value.field == "enable_thinking"
