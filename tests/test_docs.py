# SPDX-License-Identifier: Apache-2.0
"""The pages tell the truth: what they list is what the code has."""

import re
from pathlib import Path

import pytest

from xinference.settings import OBSOLETE, VARIABLES

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "doc").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [target for target in targets if "://" not in target]

    missing = [target for target in local if not (page.parent / target).exists()]

    assert not missing


def test_the_settings_page_lists_every_variable_and_no_other() -> None:
    page = (ROOT / "doc" / "settings.md").read_text()

    rows = re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE)
    obsolete = re.findall(r"XINFERENCE_[A-Z_]+", page.partition("Obsolete:")[2])
    assert (set(rows), set(obsolete)) == (set(VARIABLES), set(OBSOLETE))
    assert set(re.findall(r"XINFERENCE_[A-Z_]+", page)) <= {*rows, *obsolete}


def test_ci_runs_the_commands_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    script = (ROOT / ".ci" / "run").read_text()

    for wanted in ("run", "test"):
        assert re.search(rf"<!-- {wanted} -->\n```bash\n[^`]+```", readme)
        assert f"readme_command {wanted})" in script
