# SPDX-License-Identifier: Apache-2.0
"""An API key: `xin-<id>-<secret>`, and what is remembered of it. Pure.

The id is public and names the key in lists, logs and usage. Of the whole key only the SHA-256
digest is kept: the secret has 256 bits, so there is nothing to guess and no salt is needed.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from xinference.errors import InvalidRequest

PREFIX = "xin"
ID_BYTES = 6
SECRET_BYTES = 32
MAX_NAME_LEN = 100
MAX_KEY_LEN = 200
MAX_MODELS = 1000
MAX_LIMIT = 10**12


class Scope(StrEnum):
    """What a key is for."""

    INVOKE = "invoke"
    """Ask models, see which there are, and what it has used itself."""
    MONITOR = "monitor"
    """See how the cluster is: nodes, replicas, events, metrics, everybody's usage."""
    ADMIN = "admin"
    """Everything: launch and stop models, manage keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySpec:
    """What a new key is to be."""

    name: str
    scopes: frozenset[Scope] = frozenset({Scope.INVOKE})
    models: frozenset[str] | None = None
    """The uids that it may ask; None: all."""
    expires_ts: int | None = None
    """Unix seconds; None: never."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and answers together."""

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= MAX_NAME_LEN or not self.name.isprintable():
            raise InvalidRequest(
                field="name", problem=f"must be 1 to {MAX_NAME_LEN} printable characters"
            )
        if not self.scopes:
            raise InvalidRequest(field="scopes", problem="must have at least one")
        if self.models is not None and not 0 < len(self.models) <= MAX_MODELS:
            raise InvalidRequest(field="models", problem=f"must be 1 to {MAX_MODELS} uids, or null")
        if self.models is not None and Scope.ADMIN in self.scopes:
            raise InvalidRequest(field="models", problem="cannot limit a key that may do anything")
        for name in ("requests_per_minute", "tokens_per_minute"):
            limit = getattr(self, name)
            if limit is not None and not 0 < limit <= MAX_LIMIT:
                raise InvalidRequest(
                    field=name, problem=f"must be from 1 to {MAX_LIMIT}, got {limit}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key that was made; the secret itself is nowhere."""

    key_id: str
    digest: bytes = field(repr=False)
    spec: KeySpec
    created_ts: int
    revoked_ts: int | None = None

    def may(self, scope: Scope) -> bool:
        """Return whether it opens what needs this scope."""
        return scope in self.spec.scopes or Scope.ADMIN in self.spec.scopes

    def may_use(self, model: str) -> bool:
        """Return whether it may ask this model."""
        return self.spec.models is None or model in self.spec.models

    def state(self, *, now: float) -> str:
        """Return "active", "expired" or "revoked"."""
        if self.revoked_ts is not None:
            return "revoked"
        expires = self.spec.expires_ts
        return "expired" if expires is not None and now >= expires else "active"

    def as_item(self, *, now: float) -> dict[str, Any]:
        """Return what is told of it, as JSON has it; times are Unix seconds."""
        spec = self.spec
        return {
            "id": self.key_id,
            "object": "api_key",
            "name": spec.name,
            "status": self.state(now=now),
            "scopes": sorted(spec.scopes),
            "models": None if spec.models is None else sorted(spec.models),
            "requests_per_minute": spec.requests_per_minute,
            "tokens_per_minute": spec.tokens_per_minute,
            "created_at": self.created_ts,
            "expires_at": spec.expires_ts,
            "revoked_at": self.revoked_ts,
        }

    def is_made_of(self, text: str) -> bool:
        """Return whether `text` is this key. Takes the same time for every text."""
        return hmac.compare_digest(self.digest, digest_of(text))


def new_key(spec: KeySpec, *, now: float) -> tuple[str, ApiKey]:
    """Return the text of a new key, which nobody can find out later, and what is kept of it."""
    key_id = secrets.token_hex(ID_BYTES)
    text = f"{PREFIX}-{key_id}-{secrets.token_urlsafe(SECRET_BYTES)}"
    return text, ApiKey(key_id=key_id, digest=digest_of(text), spec=spec, created_ts=int(now))


def id_in(text: str) -> str | None:
    """Return the id that a key's text names; None if it is no key."""
    prefix, _, rest = text.partition("-")
    key_id, _, secret = rest.partition("-")
    is_key = prefix == PREFIX and key_id and secret and len(text) <= MAX_KEY_LEN
    return key_id if is_key else None


def digest_of(text: str) -> bytes:
    """Return what is kept of a key."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
