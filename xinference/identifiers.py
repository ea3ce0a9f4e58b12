# SPDX-License-Identifier: Apache-2.0
"""The names of things: how each is spelled, checked and printed, once.

A *model* is what runs under a uid; a *replica* is one of its copies; a *node* is a machine.
Nothing else in the package builds or takes apart these texts.
"""

import ipaddress
import re
import secrets
from dataclasses import dataclass
from typing import NewType, Self

from xinference.errors import InvalidRequest

ModelUid = NewType("ModelUid", str)
"""A running model, unique in the cluster. Made by `model_uid` or `new_model_uid`."""

RequestId = NewType("RequestId", str)
"""One request of a caller, unique among the live ones of a model."""

NodeId = NewType("NodeId", str)
"""A machine of the cluster: the address of its worker actor, "host:port"."""

InstanceId = NewType("InstanceId", str)
"""One start of one replica's process; a restart gets a new one. It fences what is stale."""

MAX_UID_LEN = 100
_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REPLICA = re.compile(r"(?P<model>.+)-rep(?P<index>\d+)")
_FAMILY = re.compile(r"[^+\\/?%#&=\s]+")


def model_uid(text: str) -> ModelUid:
    """Return `text` as a model uid.

    Raises:
        InvalidRequest: it is empty, longer than 100 characters, has characters other than
            letters, digits, ".", "_" and "-", or ends like a replica's uid.
    """
    if not _UID.fullmatch(text) or len(text) > MAX_UID_LEN:
        raise InvalidRequest(
            field="model_uid",
            problem=f"{text[:MAX_UID_LEN]!r} is not a name of 1 to {MAX_UID_LEN} letters, digits, "
            "'.', '_' and '-' that starts with a letter or a digit",
        )
    if _REPLICA.fullmatch(text):
        raise InvalidRequest(field="model_uid", problem="must not end in -rep and a number")
    return ModelUid(text)


def new_model_uid(family: str, *, taken: set[ModelUid]) -> ModelUid:
    """Return the family's name, or with eight random characters behind it if that is taken."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", family).lstrip("._-")[:MAX_UID_LEN] or "model"
    while plain in taken:
        plain = f"{plain[: MAX_UID_LEN - 9]}-{secrets.token_hex(4)}"
    return model_uid(plain)


def family_name(text: str) -> str:
    """Return `text` if it can name a family.

    Raises:
        InvalidRequest: it is empty, "." or "..", or has white space or one of + \\ / ? % # & =.
    """
    if not _FAMILY.fullmatch(text) or text in {".", ".."}:
        raise InvalidRequest(
            field="model_name",
            problem=f"{text!r} must not be empty, '.' or '..', nor contain white space "
            "or any of + \\ / ? % # & =",
        )
    return text


def new_request_id() -> RequestId:
    """Return an id for a request whose caller gave none."""
    return RequestId(secrets.token_hex(12))


def new_instance_id() -> InstanceId:
    """Return an id for one start of a replica's process."""
    return InstanceId(secrets.token_hex(8))


@dataclass(frozen=True, slots=True, order=True)
class ReplicaUid:
    """One copy of a model. Prints as users know it: `<model uid>-rep<index>`."""

    model: ModelUid
    index: int

    def __str__(self) -> str:
        return f"{self.model}-rep{self.index}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` printed.

        Raises:
            InvalidRequest: it is not the uid of a replica.
        """
        found = _REPLICA.fullmatch(text)
        if found is None:
            raise InvalidRequest(
                field="replica", problem=f"{text!r} is not <model uid>-rep<number>"
            )
        return cls(ModelUid(found["model"]), int(found["index"]))


def is_wildcard(host: str) -> bool:
    """Return whether `host` means every address of this machine, so that others cannot use it."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == ""


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address, "host:port". An IPv6 host is written in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "host:port".

        Raises:
            InvalidRequest: there is no port, or it is not a number from 0 to 65535.
        """
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise InvalidRequest(field="address", problem=f"{text!r} is not host:port")
        return cls(host.removeprefix("[").removesuffix("]"), int(port))
