# SPDX-License-Identifier: Apache-2.0
"""Errors survive every boundary they cross: pickling, the wire, and a reader."""

import dataclasses
import pickle

import pytest

from xinference.errors import InternalError, XinferenceError, concrete_errors, from_wire

ERRORS = list(concrete_errors())
EXAMPLES = {"float": 1.5, "str": "some text", "int": 7, "list[str]": ["one", "two"]}


def example(cls: type[XinferenceError]) -> XinferenceError:
    named = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        kind = field.type if isinstance(field.type, str) else str(field.type)
        kind = kind.removeprefix("<class '").removesuffix("'>")
        named[field.name] = EXAMPLES[kind]
    return cls(**named)


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_an_error_survives_pickling(cls: type[XinferenceError]) -> None:
    error = example(cls)

    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is cls
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_an_error_survives_the_wire(cls: type[XinferenceError]) -> None:
    error = example(cls)

    copy = from_wire(error.to_wire())

    assert type(copy) is cls
    assert copy.to_wire() == error.to_wire()


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_no_field_has_a_default_that_a_wrapper_could_hide(cls: type[XinferenceError]) -> None:
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        assert field.default is dataclasses.MISSING
        assert field.default_factory is dataclasses.MISSING


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in ERRORS]

    assert len(codes) == len(set(codes))


def test_the_tree_in_the_docstring_names_every_error() -> None:
    import xinference.errors

    drawn = set(xinference.errors.__doc__.split())  # type: ignore[union-attr]

    assert {cls.__name__ for cls in ERRORS} <= drawn


def test_an_unknown_error_from_a_newer_peer_keeps_its_text() -> None:
    error = from_wire({"code": "from_the_future", "fields": {"speed": 88}})

    assert isinstance(error, InternalError)
    assert "from_the_future" in str(error)
    assert "88" in str(error)
