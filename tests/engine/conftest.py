# SPDX-License-Identifier: Apache-2.0
"""What several files of tests of the engine need."""

from collections.abc import Iterator

import pytest

from xinference.engine.native import compiled, layers, linear, sampling

_CACHED = (
    *(compiled.compiled, layers.layer_kernels, linear.is_native, linear._kernel),
    sampling._kernel,
)


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that has no C compiler, and nothing that was compiled before."""
    monkeypatch.setenv("CC", "no-such-compiler")
    for cached in _CACHED:
        cached.cache_clear()
    yield
    for cached in _CACHED:
        cached.cache_clear()
