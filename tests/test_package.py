# SPDX-License-Identifier: Apache-2.0
"""What is installed: every file below the package, not only its modules."""

import configparser
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_package_brings_every_file_that_is_not_a_module() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    brought = {
        path
        for package, patterns in config["options.package_data"].items()
        for pattern in patterns.split()
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }

    there = {
        path
        for path in (ROOT / "xinference").rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }

    assert {str(path.relative_to(ROOT)) for path in there - brought} == set()
