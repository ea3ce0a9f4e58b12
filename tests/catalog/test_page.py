# SPDX-License-Identifier: Apache-2.0
"""`doc/families.md` lists the families that are there; the examples of `doc/catalogue.md` work."""

import re
from pathlib import Path

from xinference.catalog.builtin_families import builtin_families
from xinference.catalog.family import ModelFamily, size_text
from xinference.catalog.matching import parameter_objects
from xinference.catalog.schema import ABILITIES, inherit, parse_family

DOC = Path(__file__).parents[2] / "doc"
PAGE = (DOC / "catalogue.md").read_text(encoding="utf-8")
FAMILIES = (DOC / "families.md").read_text(encoding="utf-8")


def row_of(family: ModelFamily) -> str:
    sizes = dict.fromkeys(size_text(one.size).replace("_", ".") for one in family.variants)
    formats = dict.fromkeys(variant.model_format for variant in family.variants)
    runs = "yes" if isinstance(parameter_objects(family), list) else "no"
    return (
        f"| `{family.model_name}` | {', '.join(sizes)} | {', '.join(formats)} "
        f"| {family.context_length} | {', '.join(family.model_ability)} "
        f"| {family.license} | {runs} |"
    )


def test_the_page_lists_every_family_as_it_is() -> None:
    families = sorted(builtin_families().values(), key=lambda one: one.model_name.casefold())

    listed = re.findall(r"^\| `.*\|$", FAMILIES, re.MULTILINE)

    assert listed == [row_of(one) for one in families]


def test_the_registrations_of_the_page_are_accepted() -> None:
    builtin = builtin_families()
    examples = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)

    assert len(examples) >= 2
    for example in examples:
        inherit(parse_family(example, is_builtin=False), builtin)


def test_the_page_names_every_ability() -> None:
    assert all(f"`{ability}`" in PAGE for ability in ABILITIES)
