# SPDX-License-Identifier: Apache-2.0
"""Virtual environments of models: what a family and a launch want in one, and which there are.

`environment_of` puts a family's list and a launch's together. Families write two things into their
lists that pip does not know: conditions on the engine (`vllm>=0.11 ; #engine# == "vllm"`) and names
in marks (`#system_numpy#`: as the host has it; `#vllm_dependencies#`: what that engine needs).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from xinference.errors import InvalidRequest

MAX_PACKAGES = 100
MAX_PACKAGE_LEN = 1000
INDEX_STRATEGIES = ("first-index", "unsafe-first-match", "unsafe-best-match")

_ENGINE_CONDITION = re.compile(r"""#(?:model_)?engine#\s*(==|!=)\s*(["'])([^"'#]*)\2""")
_SYSTEM = re.compile(r"#system_([A-Za-z0-9._-]+)#")
_DEPENDENCIES = re.compile(r"#([A-Za-z0-9._-]+)_dependencies#")
_ALWAYS, _NEVER = "python_version >= '0'", "python_version < '0'"
_NOT_OF_HOST = frozenset({"vllm", "sglang"})
"""Engines that are packages of their own; what the others need, the host has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyEnvironment:
    """What a family wants: its `virtualenv`."""

    packages: tuple[str, ...] = ()
    inherit_pip_config: bool = True
    """Look for packages where the host's pip looks, too."""
    index_url: str | None = None
    extra_index_url: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    trusted_host: tuple[str, ...] = ()
    index_strategy: str | None = None
    """One of `INDEX_STRATEGIES`; None: the installer's own."""
    no_build_isolation: bool = False

    @classmethod
    def from_json(cls, given: object) -> "FamilyEnvironment":
        """Read a family's `virtualenv`.

        Raises:
            InvalidRequest: naming the field that is unknown or malformed.
        """
        if not isinstance(given, Mapping):
            raise InvalidRequest(field="virtualenv", problem="must be an object")
        known = {field.name for field in fields(cls)}
        read: dict[str, Any] = {}
        for name, value in given.items():
            where = f"virtualenv.{name}"
            if name not in known:
                raise InvalidRequest(
                    field=where, problem=f"is not known; {', '.join(sorted(known))} are"
                )
            if value is None:
                continue
            if name in ("inherit_pip_config", "no_build_isolation"):
                if not isinstance(value, bool):
                    raise InvalidRequest(field=where, problem="must be true or false")
                read[name] = value
            elif name in ("index_url", "index_strategy"):
                read[name] = _texts(where, [value])[0]
            else:
                read[name] = _texts(where, [value] if isinstance(value, str) else value)
        if read.get("index_strategy", INDEX_STRATEGIES[0]) not in INDEX_STRATEGIES:
            raise InvalidRequest(
                field="virtualenv.index_strategy",
                problem=f"must be one of {', '.join(INDEX_STRATEGIES)}",
            )
        check_packages("virtualenv.packages", read.get("packages", ()))
        return cls(**read)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentSpec:
    """What an environment is to be. Two that are equal are one."""

    model_name: str
    model_engine: str
    requirements: tuple[str, ...] = ()
    """As pip reads them."""
    of_host: tuple[str, ...] = ()
    """Names of what must be as the host has it, beside torch."""
    find_links: tuple[str, ...] = ()
    """Directories of the worker, and pages, with packages."""
    inherit_pip_config: bool = True
    index_url: str | None = None
    extra_index_url: tuple[str, ...] = ()
    trusted_host: tuple[str, ...] = ()
    index_strategy: str | None = None
    no_build_isolation: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualEnvironment:
    """One that there is."""

    model_name: str
    model_engine: str
    path: str
    real_path: str
    python_version: str
    """As "3.11"."""
    packages: dict[str, str]
    """Versions of what is installed in it, by name."""
    worker_ip: str
    users: tuple[str, ...] = ()
    """Replicas whose processes run in it."""


def check_packages(field: str, packages: Sequence[str]) -> None:
    """Refuse what could be read as anything but one requirement each.

    Raises:
        InvalidRequest
    """
    if len(packages) > MAX_PACKAGES:
        raise InvalidRequest(field=field, problem=f"has more than {MAX_PACKAGES} entries")
    for index, package in enumerate(packages):
        problem = None
        if not package.strip():
            problem = "must not be empty"
        elif len(package) > MAX_PACKAGE_LEN:
            problem = f"has more than {MAX_PACKAGE_LEN} characters"
        elif package.lstrip().startswith("-"):
            problem = f"{package[:60]!r} is an option of an installer, not a package"
        elif not package.isprintable():
            problem = "must be one line"
        if problem is not None:
            raise InvalidRequest(field=f"{field}.{index}", problem=problem)


def environment_of(
    *,
    model_name: str,
    model_engine: str,
    family: FamilyEnvironment | None,
    is_wanted: bool | None,
    packages: Sequence[str] = (),
    find_links: Sequence[str] = (),
) -> EnvironmentSpec | None:
    """Return the environment of a launch; None: it runs in the host's.

    Args:
        is_wanted: what the launch says; None: where there are packages.
        packages: the launch's. Why after the family's: the last word is the launch's, and of two
            requirements for one name the installer takes both or refuses.

    Raises:
        InvalidRequest: what is given contradicts itself, or cannot be read.
    """
    check_packages("virtual_env_packages", packages)
    if is_wanted is False:
        for field, given in (
            ("virtual_env_packages", packages),
            ("virtual_env_find_links", find_links),
        ):
            if given:
                raise InvalidRequest(
                    field=field,
                    problem="means nothing where virtual environments are off, by "
                    "enable_virtual_env or XINFERENCE_ENABLE_VIRTUAL_ENV",
                )
        return None
    wanted = family or FamilyEnvironment()
    if is_wanted is None and not wanted.packages and not packages:
        return None
    named = {_name_of(package) for package in packages}
    kept = [one for one in wanted.packages if _name_of(one) not in named]
    requirements: dict[str, None] = {}
    of_host: dict[str, None] = {}
    for package in (*kept, *packages):
        requirement = _for_engine(package, model_engine)
        for name in _SYSTEM.findall(requirement):
            of_host[name] = None
        requirement = _SYSTEM.sub(r"\1", requirement)
        engine = _DEPENDENCIES.match(requirement)
        if engine is not None and engine[1] not in _NOT_OF_HOST:
            continue
        requirements[_DEPENDENCIES.sub(r"\1", requirement)] = None
    return EnvironmentSpec(
        model_name=model_name,
        model_engine=model_engine,
        requirements=tuple(requirements),
        of_host=tuple(of_host),
        find_links=(*wanted.find_links, *find_links),
        inherit_pip_config=wanted.inherit_pip_config,
        index_url=wanted.index_url,
        extra_index_url=wanted.extra_index_url,
        trusted_host=wanted.trusted_host,
        index_strategy=wanted.index_strategy,
        no_build_isolation=wanted.no_build_isolation,
    )


def _for_engine(package: str, engine: str) -> str:
    """Return a requirement whose conditions on the engine are decided."""

    def decided(found: re.Match[str]) -> str:
        is_same = found[3].casefold() == engine.casefold()
        return _ALWAYS if is_same == (found[1] == "==") else _NEVER

    requirement = _ENGINE_CONDITION.sub(decided, package)
    if "engine#" in requirement:
        raise InvalidRequest(
            field="virtualenv.packages",
            problem=f'{package[:120]!r}: the engine is compared as #engine# == "name" alone',
        )
    return requirement


def _name_of(package: str) -> str:
    """Return what a requirement is about, written as any index would; else itself."""
    found = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", package.strip())
    return package if found is None else re.sub(r"[-_.]+", "-", found[0]).casefold()


def _texts(where: str, given: object) -> tuple[str, ...]:
    if not isinstance(given, list | tuple) or not all(
        isinstance(one, str) and one.strip() for one in given
    ):
        raise InvalidRequest(field=where, problem="must be texts that are not empty")
    return tuple(given)
