# SPDX-License-Identifier: Apache-2.0
"""What a launch's virtual environment is made of."""

from typing import Any

import pytest

from xinference.errors import InvalidRequest
from xinference.protocol.deployment import LaunchSpec
from xinference.protocol.environments import EnvironmentSpec, FamilyEnvironment, environment_of


def wanted(
    *packages: str, family: dict[str, Any] | None = None, **words: Any
) -> EnvironmentSpec | None:
    given: dict[str, Any] = {"model_engine": "transformers", "is_wanted": None, **words}
    return environment_of(
        model_name="m",
        family=None if family is None else FamilyEnvironment.from_json(family),
        packages=packages,
        **given,
    )


def requirements(*packages: str, **words: Any) -> tuple[str, ...]:
    found = wanted(*packages, **words)
    assert found is not None
    return found.requirements


def test_there_is_none_where_nobody_wants_packages_unless_the_launch_says_so() -> None:
    assert wanted() is None
    assert wanted(family={"packages": []}) is None
    assert requirements(is_wanted=True) == ()


def test_a_launch_may_do_without_but_not_want_both() -> None:
    assert wanted(family={"packages": ["einops"]}, is_wanted=False) is None
    with pytest.raises(InvalidRequest, match="virtual_env_packages"):
        wanted("einops", is_wanted=False)


def test_the_packages_of_a_launch_stand_for_those_of_the_family_with_the_same_name() -> None:
    family = {"packages": ["my_tool>=1", "einops"]}

    assert requirements("My-Tool==2", family=family) == ("einops", "My-Tool==2")


def test_a_condition_on_the_engine_is_decided_and_others_are_left_to_the_installer() -> None:
    family = {
        "packages": [
            'a ; #engine# == "Transformers"',
            "b ; #engine# == 'vllm'",
            'c ; #model_engine# != "vllm" and sys_platform == "linux"',
        ]
    }

    assert requirements(family=family) == (
        "a ; python_version >= '0'",
        "b ; python_version < '0'",
        "c ; python_version >= '0' and sys_platform == \"linux\"",
    )


def test_what_the_system_has_is_held_to_it_and_what_an_engine_needs_is_the_hosts() -> None:
    family = {
        "packages": [
            "#system_torch#",
            "#system_numpy# ; #engine# == 'transformers'",
            "#transformers_dependencies#",
            "#vllm_dependencies# ; #engine# == 'vllm'",
        ]
    }

    found = wanted(family=family)

    assert found is not None
    assert found.of_host == ("torch", "numpy")
    assert found.requirements == (
        "torch",
        "numpy ; python_version >= '0'",
        "vllm ; python_version < '0'",
    )


def test_where_packages_are_looked_for_is_the_familys_word_and_then_the_launchs() -> None:
    family = {
        "packages": ["a"],
        "index_url": "https://example.com/simple",
        "extra_index_url": "https://example.com/more",
        "find_links": ["https://example.com/links"],
        "index_strategy": "unsafe-best-match",
        "inherit_pip_config": False,
        "updated": None,
    }
    del family["updated"]

    found = wanted(family=family, find_links=("/wheels",))

    assert found is not None
    assert found.extra_index_url == ("https://example.com/more",)
    assert found.find_links == ("https://example.com/links", "/wheels")
    assert found.index_strategy == "unsafe-best-match"
    assert not found.inherit_pip_config


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"package": []}, "virtualenv.package"),
        ({"packages": "--index-url=x"}, "virtualenv.packages.0"),
        ({"packages": ["a", ""]}, "virtualenv.packages"),
        ({"packages": [1]}, "virtualenv.packages"),
        ({"no_build_isolation": 1}, "virtualenv.no_build_isolation"),
        ({"index_strategy": "best"}, "virtualenv.index_strategy"),
        ([], "virtualenv"),
    ],
)
def test_what_a_family_cannot_want_is_refused_by_name(given: object, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        FamilyEnvironment.from_json(given)

    assert refused.value.field == field


@pytest.mark.parametrize("package", ["-r other.txt", "a\n--index-url=x", " ", "a" * 2000])
def test_a_launch_cannot_smuggle_options_in(package: str) -> None:
    with pytest.raises(InvalidRequest, match=r"virtual_env_packages\.0"):
        LaunchSpec(model_name="m", virtual_env_packages=(package,))


def test_an_engine_is_compared_in_one_way_only() -> None:
    with pytest.raises(InvalidRequest, match="#engine#"):
        wanted(family={"packages": ["a ; #engine# in 'vllm'"]})
