# SPDX-License-Identifier: Apache-2.0
"""Which families of the catalogue are as asked. Pure, over the JSON that registrations are."""

from dataclasses import dataclass
from typing import Any

Family = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyFilter:
    """What is asked of a family and its specs; what is None or empty is not asked."""

    words: tuple[str, ...] = ()
    """Each in the name or the description, letter case aside."""
    abilities: frozenset[str] = frozenset()
    languages: frozenset[str] = frozenset()
    model_format: str | None = None
    min_size: float | None = None
    """Billions of parameters, as `max_size`."""
    max_size: float | None = None
    room_bytes: int | None = None
    """What a spec may take."""
    is_cached: bool = False
    """Only specs whose `cache_status` says that their files are here."""

    def applied_to(self, families: list[Family]) -> list[Family]:
        """Return the families that are as asked, each with the specs that are, in their order."""
        found = []
        for family in families:
            if not self._takes(family):
                continue
            if not self._asks_of_specs:
                found.append(family)
                continue
            specs = [spec for spec in family.get("model_specs", ()) if self._takes_spec(spec)]
            if specs:
                found.append({**family, "model_specs": specs})
        return found

    @property
    def _asks_of_specs(self) -> bool:
        asked = (self.model_format, self.min_size, self.max_size, self.room_bytes)
        return self.is_cached or any(one is not None for one in asked)

    def _takes(self, family: Family) -> bool:
        text = f"{family['model_name']} {family.get('model_description', '')}".casefold()
        languages = family.get("model_lang") or family.get("language") or ()
        return (
            all(word in text for word in self.words)
            and self.abilities <= set(family.get("model_ability", ()))
            and self.languages <= set(languages)
        )

    def _takes_spec(self, spec: dict[str, Any]) -> bool:
        if self.model_format not in (None, spec.get("model_format")):
            return False
        if self.is_cached and not spec.get("cache_status"):
            return False
        if self.min_size is not None or self.max_size is not None:
            size = _billions(spec.get("model_size_in_billions"))
            if not (self.min_size or 0) <= size <= (self.max_size or float("inf")):
                return False
        return self.room_bytes is None or 0 < spec.get("memory_bytes", 0) <= self.room_bytes


def _billions(size: int | str | None) -> float:
    """Read a size as registrations spell it: 7, "0_5"; 0 if there is none."""
    return float(str(size or 0).replace("_", "."))
