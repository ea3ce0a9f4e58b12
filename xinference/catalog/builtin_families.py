# SPDX-License-Identifier: Apache-2.0
"""The families of this package: one JSON file each, read when it is first asked for.

A family is named as its file, so that the names cost one listing of a directory.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

from xinference.errors import InternalError, InvalidRequest

from .encoder_family import EncoderFamily, parse_encoder_family
from .family import ModelFamily
from .schema import parse_family

Parsed = TypeVar("Parsed", ModelFamily, EncoderFamily)

_DATA = Path(__file__).parent / "builtin"


class BuiltinFamilies(Mapping[str, Parsed]):
    """The families of one folder by name. Any thread may look; two may read one at once."""

    def __init__(self, folder: Path, parse: Callable[[str], Parsed]) -> None:
        self._files = {file.stem: file for file in sorted(folder.glob("*.json"))}
        self._parse: Callable[[str], Parsed] = parse
        self._read: dict[str, Parsed] = {}

    def __getitem__(self, name: str) -> Parsed:
        """Return a family.

        Raises:
            KeyError: there is none of this name.
            InternalError: the file is broken, which is a mistake of this package.
        """
        if name not in self._read:
            file = self._files[name]
            try:
                family = self._parse(file.read_text(encoding="utf-8"))
            except InvalidRequest as error:
                raise InternalError(where="catalog", problem=f"{file.name}: {error}") from error
            if family.model_name != name:
                raise InternalError(
                    where="catalog", problem=f"{file.name} is of {family.model_name}"
                )
            self._read[name] = family
        return self._read[name]

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def builtin_families() -> BuiltinFamilies[ModelFamily]:
    """Return the language families of this package."""
    return BuiltinFamilies(_DATA, partial(parse_family, is_builtin=True))


def builtin_encoders(model_type: str) -> BuiltinFamilies[EncoderFamily]:
    """Return the families of this package that embed, or that rerank."""
    parse = partial(parse_encoder_family, model_type=model_type, is_builtin=True)
    return BuiltinFamilies(_DATA / model_type, parse)
