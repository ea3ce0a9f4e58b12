# SPDX-License-Identifier: Apache-2.0
"""The architecture as a test: who may import whom, and where each dependency lives."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(p.relative_to(ROOT) for p in (ROOT / "xinference").rglob("*.py"))

# Reads as the architecture: each unit, then all it may know about. Lowest first.
# "cluster.interface" opens that one module, not the whole unit.
BASE = {"__version__", "errors", "identifiers", "protocol"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "identifiers": {"errors"},
    "protocol": {"errors", "identifiers"},
    "settings": {"errors"},
    # What both ends of the data plane tell of a request, by a library that need not be there.
    "tracing": BASE,
    "catalog": BASE | {"settings"},
    "engine": BASE,
    "models": BASE | {"catalog", "engine"},
    "cluster": BASE | {"settings", "tracing", "catalog", "models"},
    "api": BASE | {"settings", "tracing", "cluster.interface"},
    "client": BASE,
    "cli": BASE | {"settings", "tracing", "catalog", "cluster", "api", "client"},
    "__main__": {"cli"},
    "__init__": {"client"},
}

# A heavy dependency has one home, so everything else imports without it.
HOMES = {
    "torch": {"engine", "models"},
    "transformers": {"engine", "models"},
    "triton": {"engine"},
    "xoscar": {"cluster"},
    "msgspec": {"cluster"},
    "cryptography": {"cluster"},
    "fastapi": {"api"},
    "starlette": {"api"},
    "pydantic": {"api"},
    "prometheus_client": {"api"},
    "opentelemetry": {"tracing"},
    "uvicorn": {"cli"},
    "httpx": {"catalog", "client", "cli", "models"},
    "click": {"cli"},
    "rich": {"cli"},
}


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, module) for each import at any depth, typing-only ones too."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.ImportFrom) and node.level > 1:
            yield node.lineno, "."  # climbs out of its folder


def complaint(here: str, module: str) -> str | None:
    """Say why unit `here` may not import `module`, or None if it may."""
    top, _, inner = module.partition(".")
    there = inner.partition(".")[0]
    if module == ".":
        return "a relative import stays inside its folder; write the absolute name"
    if top in HOMES and here not in HOMES[top]:
        return f"{top} lives in {sorted(HOMES[top])}, not in {here}"
    if top != "xinference" or there == here:
        return None
    allowed = MAY_IMPORT[here]
    if any(inner == name or inner.startswith(f"{name}.") for name in allowed):
        return None
    return f"{here} may import {sorted(allowed)}, not {inner}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_follow_the_architecture(path: Path) -> None:
    here = path.parts[1].removesuffix(".py")
    assert here in MAY_IMPORT, f"add {here!r} to MAY_IMPORT: what may it know about?"

    found = [
        f"{path}:{line}: {why}"
        for line, module in imports_of(path)
        if (why := complaint(here, module))
    ]

    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("here", "module", "why"),
    [
        ("engine", "xinference.cluster.state", "engine may import"),
        ("api", "xinference.cluster.remote", "api may import"),
        ("client", "torch", "torch lives in"),
        ("models", ".", "a relative import"),
    ],
)
def test_the_guard_refuses_what_it_should(here: str, module: str, why: str) -> None:
    assert why in (complaint(here, module) or "")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("xinference", ["torch", "xoscar", "fastapi", "httpx", "click"]),
        ("xinference.client", ["torch", "xoscar", "fastapi", "pydantic"]),
        ("xinference.cli.main", ["torch", "xoscar", "fastapi", "httpx", "rich"]),
        ("xinference.cluster.guardian", ["torch", "xoscar", "msgspec", "fastapi", "pandas"]),
        ("xinference.catalog", ["torch", "transformers", "httpx"]),
        ("xinference.tracing", ["opentelemetry"]),
        ("xinference.cluster.replica", ["torch", "opentelemetry"]),
        ("xinference.api.app", ["torch", "xoscar", "transformers", "opentelemetry.sdk"]),
        ("xinference.engine", ["xoscar", "fastapi", "msgspec", "psutil", "httpx"]),
        ("xinference.engine.engine", ["llguidance", "xoscar", "msgspec"]),
    ],
)
def test_a_part_loads_without_what_it_does_not_use(module: str, absent: list[str]) -> None:
    program = (
        f"import sys, {module}; found = [m for m in {absent!r} if m in sys.modules]; "
        "sys.exit(', '.join(found) or 0)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )

    assert done.returncode == 0, f"import {module} also loads: {done.stderr}"
