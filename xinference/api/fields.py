# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of request schemas: a closed body, a refused field, a shape in words.

A field is honoured or refused by name, never ignored. `Body` refuses what it does not know and
says what is nearest; `Only` marks a field that is known but not honoured yet, so that the value
that asks for nothing (`n: 1`, `tools: []`) still passes, as real clients send it.
"""

import difflib
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic import ValidationError as PydanticError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_NAME_LEN = 60


class Body(BaseModel):
    """A JSON object whose fields are all known, with their own JSON types, not look-alikes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, given: Any) -> Any:
        # Why not leave it to extra="forbid": that reports every unknown field of a hostile body,
        # and does not know what was meant.
        if cls.model_config.get("extra") != "forbid" or not isinstance(given, dict):
            return given
        known = _names_of(cls)
        if given.keys() <= known:
            return given
        # Why null passes: it asks for nothing, and new clients say it of what is new to them.
        unknown = [key for key in given if key not in known and given[key] is not None]
        if unknown and not _is_of_another_type(cls, given):
            name = unknown[0][:MAX_NAME_LEN]
            near = difflib.get_close_matches(name, known, n=1)
            raise PydanticCustomError(
                "unknown_field",
                "is not a field of this request{hint}",
                {"field": name, "hint": f"; did you mean {near[0]}?" if near else ""},
            )
        return {key: given[key] for key in given if key in known}


@cache
def _names_of(body: type[Body]) -> frozenset[str]:
    """Return what the fields of a body are called in JSON."""
    return frozenset(field.alias or name for name, field in body.model_fields.items())


def _is_of_another_type(body: type[Body], given: dict[str, Any]) -> bool:
    """Return whether the `type` of an object will be refused, which says more than its fields."""
    types = _types_of(body)
    return bool(types) and given.get("type") is not None and given["type"] not in types


@cache
def _types_of(body: type[Body]) -> tuple[object, ...]:
    """Return what may be in the field `type` of a body, if that is one of a few words."""
    field = body.model_fields.get("type")
    branches = () if field is None else (field.annotation, *get_args(field.annotation))
    return tuple(word for one in branches if get_origin(one) is Literal for word in get_args(one))


class Answer(BaseModel):
    """A JSON object that is sent; the schema is for readers, nothing is checked."""


def _same(given: object, neutral: object) -> bool:
    if isinstance(given, bool) or isinstance(neutral, bool):
        return given is neutral
    return given == neutral


@dataclass(frozen=True, slots=True, eq=False)
class Only:
    """Marks a field that this version refuses, except null and the values that ask for nothing.

    Used as `n: Annotated[object, Only(1)] = None`.

    Hazard: two marks must not be equal. `typing` keeps one of equal annotations, and to Python
    Only(0) and Only(False) would be.
    """

    neutral: tuple[object, ...]

    def __init__(self, *neutral: object) -> None:
        object.__setattr__(self, "neutral", neutral)

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": [*self.neutral, None]}

    def _check(self, given: object) -> object:
        if given is None or any(_same(given, neutral) for neutral in self.neutral):
            return given
        allowed = "".join(f" or give {orjson.dumps(value).decode()}" for value in self.neutral[:1])
        raise PydanticCustomError(
            "unsupported", "is not supported by this version; leave it out{hint}", {"hint": allowed}
        )


@dataclass(frozen=True, slots=True)
class Shaped:
    """Replaces the findings of each branch of a union by one sentence."""

    words: str

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._check, handler(source))

    def _check(self, given: object, inner: core_schema.ValidatorFunctionWrapHandler) -> object:
        try:
            return inner(given)
        except PydanticError as error:
            raise PydanticCustomError("shape", "must be {words}", {"words": self.words}) from error
