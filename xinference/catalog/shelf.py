# SPDX-License-Identifier: Apache-2.0
"""`Shelf`: the families of one model type, those of this package and those that users register."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from xinference.errors import (
    FamilyNotFound,
    InternalError,
    InvalidRequest,
    ModelAlreadyExists,
    XinferenceError,
)
from xinference.protocol.environments import FamilyEnvironment

from .registrations import Registrations
from .schema import near_names

logger = logging.getLogger(__name__)


class Family(Protocol):
    """What a shelf needs to know of a family."""

    @property
    def model_name(self) -> str:
        """Unique on its shelf."""
        ...

    @property
    def is_builtin(self) -> bool:
        """Whether it came with this package."""
        ...

    @property
    def carried(self) -> Mapping[str, Any]:
        """Fields that are kept and shown only."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the whole family as registrations show it."""
        ...


SomeFamily = TypeVar("SomeFamily", bound=Family)


def virtual_env_of(carried: Mapping[str, Any]) -> FamilyEnvironment | None:
    """Return the virtual environment that a family wants, of the fields that it carries.

    Raises:
        InvalidRequest: it is malformed.
    """
    given = carried.get("virtualenv")
    return FamilyEnvironment.from_json(given) if given else None


class Shelf(Generic[SomeFamily]):
    """The families of a type. It belongs to one thread; any may look families up.

    Invariant: `_registered` is replaced, never changed, so that who looks sees it as it was.
    `_kept` is the part of it that has files, each named after it.
    """

    def __init__(
        self,
        builtin: Mapping[str, SomeFamily],
        parse: Callable[[str], SomeFamily],
        registrations: Registrations | None,
    ) -> None:
        """Hold what is built in.

        Args:
            parse: reads a registration, or raises `InvalidRequest`.
            registrations: where those that are kept are; None: nothing can be kept.
        """
        self._builtin = builtin
        self._parse = parse
        self._registrations = registrations
        self._registered: dict[str, SomeFamily] = {}
        self._kept: set[str] = set()

    def restore(self) -> None:
        """Read the kept registrations again.

        One that is broken, or whose file is not named after it, is logged and skipped; the file
        stays.
        """
        if self._registrations is not None:
            for name, text in self._registrations.load():
                self._restore(self._registrations.path_of(name), name, text)

    def names(self) -> set[str]:
        """Return the name of every family."""
        return {*self._builtin, *self._registered}

    def family(self, name: str) -> SomeFamily:
        """Return one family.

        Raises:
            FamilyNotFound: with near names.
        """
        # Why registered first: a release that ships a family of a name that a user took must not
        # change what that user's launches mean.
        registered = self._registered.get(name)
        if registered is not None:
            return registered
        if name not in self._builtin:
            raise FamilyNotFound(family=name, suggestions=near_names(name, self.names()))
        return self._builtin[name]

    def register(self, text: str, persist: bool) -> None:
        """Add a family given as JSON text; with `persist` it is there after a restart too.

        Raises:
            InvalidRequest: the text is not a family of this type.
            ModelAlreadyExists: a family has this name, whatever its letter case.
            InsufficientResources: it cannot be written; nothing was registered.
        """
        family = self._parse(text)
        name = family.model_name
        taken = {one.casefold(): one for one in self.names()}
        if name.casefold() in taken:
            raise ModelAlreadyExists(name=taken[name.casefold()])
        virtual_env_of(family.carried)
        if persist:
            if self._registrations is None:
                raise InternalError(where="catalog", problem="there is nowhere to keep families")
            self._registrations.save(name, text)
            self._kept.add(name)
        self._registered = {**self._registered, name: family}

    def unregister(self, name: str) -> None:
        """Remove a registered family, and its file if it was kept.

        Raises:
            InvalidRequest: it is built in. FamilyNotFound: there is none.
            InsufficientResources: its file cannot be removed; it stays registered.
        """
        if self.family(name).is_builtin:
            raise InvalidRequest(
                field="model_name", problem=f"{name} is built in and cannot be unregistered"
            )
        if self._registrations is not None and name in self._kept:
            self._registrations.remove(name)
            self._kept.remove(name)
        self._registered = {one: self._registered[one] for one in self._registered if one != name}

    def _restore(self, path: Path, name: str, text: str) -> None:
        try:
            family = self._parse(text)
        except XinferenceError as error:
            logger.error("Registration %s is skipped: %s", path, error)
            return
        if family.model_name != name:
            logger.error("Registration %s is skipped: it is of %s", path, family.model_name)
            return
        if name.casefold() in map(str.casefold, self._registered):
            logger.error("Registration %s is skipped: that name is taken", path)
            return
        if name in self._builtin:
            logger.warning("Registration %s hides the built-in model %s", path, name)
        self._registered = {**self._registered, name: family}
        self._kept.add(name)
