# SPDX-License-Identifier: Apache-2.0
"""C sources become libraries, once for each machine, or there is a reason that says what to do."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from xinference.engine.native.compiled import _openmp_library, compiled

SOURCE = """
#include <omp.h>
int power(int base) {
    int product = 1;
    for (int i = 0; i < EXPONENT; i++) product *= base;
    return product;
}
int team(int wanted) {
    int number = 0;
    #pragma omp parallel num_threads(wanted)
    #pragma omp master
    number = omp_get_num_threads();
    return number;
}
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "power.c"
    path.write_text(SOURCE)
    return path


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache/xinference/kernels").iterdir())


def test_a_source_is_compiled_for_its_constants_and_kept(source: Path, tmp_path: Path) -> None:
    assert compiled(source, (("EXPONENT", 3),)).power(2) == 8
    assert compiled(source, (("EXPONENT", 5),)).power(2) == 32
    assert len(kept(tmp_path)) == 2

    before = kept(tmp_path)
    compiled.cache_clear()
    assert compiled(source, (("EXPONENT", 3),)).power(3) == 27
    assert kept(tmp_path) == before


def test_a_changed_source_is_another_library(source: Path) -> None:
    compiled(source, (("EXPONENT", 2),))
    compiled.cache_clear()
    source.write_text(SOURCE.replace("product *= base", "product += base"))

    assert compiled(source, (("EXPONENT", 2),)).power(10) == 21


def openmp_libraries() -> set[str]:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in maps if "libgomp" in line}


def test_it_runs_on_the_threads_that_pytorch_has(source: Path) -> None:
    torch.ones(2).sum()
    before = openmp_libraries()
    library = compiled(source, (("EXPONENT", 1),))

    assert library.team(2) == 2
    assert openmp_libraries() == before
    assert Path(torch.__file__).parent in _openmp_library().parents


def test_processes_that_compile_at_once_do_not_disturb_each_other(source: Path) -> None:
    program = (
        "import sys, pathlib, torch; from xinference.engine.native.compiled import compiled; "
        "print(compiled(pathlib.Path(sys.argv[1]), (('EXPONENT', 4),)).power(2))"
    )

    def run() -> str:
        command = [sys.executable, "-c", program, str(source)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with ThreadPoolExecutor(4) as pool:
        assert {future.result() for future in [pool.submit(run) for _ in range(4)]} == {"16"}


def test_without_a_compiler_it_says_what_to_install(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")

    with pytest.raises(ValueError, match="no C compiler, 'no-such-compiler'; install one"):
        compiled(source, (("EXPONENT", 6),))


def test_what_the_compiler_does_not_take_is_told(source: Path) -> None:
    source.write_text("int power(int base) { return bsae; }")

    with pytest.raises(ValueError, match="bsae"):
        compiled(source, (("EXPONENT", 7),))


def test_a_cache_that_others_may_write_to_is_not_used(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache/xinference/kernels"
    cache.mkdir(parents=True)
    cache.chmod(0o777)

    with pytest.raises(ValueError, match="others may write"):
        compiled(source, (("EXPONENT", 8),))


def test_a_cache_that_cannot_be_made_is_told(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))

    with pytest.raises(ValueError, match="kernels cannot be kept"):
        compiled(source, (("EXPONENT", 9),))


def test_only_its_owner_can_read_the_cache(source: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        compiled(source, (("EXPONENT", 10),))
    finally:
        os.umask(before)

    assert (tmp_path / "cache/xinference/kernels").stat().st_mode & 0o777 == 0o700
