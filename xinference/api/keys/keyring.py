# SPDX-License-Identifier: Apache-2.0
"""`Keyring`: a gateway process's copy of the keys, who is admitted by them, what they have used.

A request is checked against memory. `run` looks twice a second whether another process changed a
key, and writes down what was used since; a process that is killed takes that half second with it.

The gateway is open until the first key is made, and locked from then on, even if every key has
ended.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from types import MappingProxyType

from xinference.errors import InvalidApiKey, NotAllowed, RateLimitReached, StoreUnavailable
from xinference.protocol.generation import Usage

from .key import ApiKey, KeySpec, Scope, id_in
from .store import KeyStore, UsageOf, Used

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 0.5
SECONDS_OF_A_DAY = 86400
EPOCH = date(1970, 1, 1).toordinal()

HOW_TO = (
    "Send an API key as 'Authorization: Bearer KEY' or 'x-api-key: KEY' "
    "(--api-key and XINFERENCE_API_KEY of the command line)."
)


class Keyring:
    """See the module. Belongs to one event loop."""

    def __init__(self, store: KeyStore, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._generation = -1
        self._keys: Mapping[str, ApiKey] = MappingProxyType({})
        self._used: dict[UsageOf, list[int]] = {}
        """By what it is of: the fields of a `Used`, counted up in place."""
        self._day_number, self._day_text = -1, ""
        self.refresh()

    @property
    def is_locked(self) -> bool:
        """Whether requests need a key."""
        return bool(self._keys)

    def all_keys(self) -> list[ApiKey]:
        """Return every key that was ever made, oldest first."""
        return list(self._keys.values())

    def name_of(self, key_id: str) -> str:
        """Return the name of a key; empty if there is none of this id."""
        return self._keys[key_id].spec.name if key_id in self._keys else ""

    def active(self, key_id: str) -> ApiKey:
        """Return a key that was admitted before.

        Raises:
            InvalidApiKey: it has expired or was revoked since.
        """
        key = self._keys[key_id]
        state = key.state(now=self._clock())
        if state != "active":
            raise InvalidApiKey(problem=f"The API key {key.spec.name} is {state}.")
        return key

    def refresh(self) -> None:
        """Take over what other processes have changed."""
        generation = self._store.generation()
        if generation != self._generation:
            self._keys = {key.key_id: key for key in self._store.all_keys()}
            self._generation = generation

    def create(self, spec: KeySpec) -> tuple[str, ApiKey]:
        """See `KeyStore.create`.

        Raises:
            StoreUnavailable: the file cannot be written now.
        """
        with _stored():
            made = self._store.create(spec)
            self.refresh()
        return made

    def revoke(self, key_id: str) -> ApiKey:
        """See `KeyStore.revoke`.

        Raises:
            StoreUnavailable: the file cannot be written now.
        """
        with _stored():
            revoked = self._store.revoke(key_id)
            self.refresh()
        return revoked

    def authenticate(self, text: str | None) -> ApiKey:
        """Return the key that a caller presents.

        Raises:
            InvalidApiKey: it is none, unknown, expired or revoked.
        """
        if text is None:
            raise InvalidApiKey(problem=f"This gateway needs an API key. {HOW_TO}")
        key = self._keys.get(id_in(text) or "")
        # Why the same answer for all: a caller must not learn which ids there are.
        if key is None or not key.is_made_of(text):
            raise InvalidApiKey(problem=f"This is not an API key of this gateway. {HOW_TO}")
        return self.active(key.key_id)

    def admit(self, text: str | None, scope: Scope) -> ApiKey:
        """Return the key that a caller presents, if it opens what needs this scope.

        Raises:
            InvalidApiKey, NotAllowed
        """
        key = self.authenticate(text)
        if not key.may(scope):
            raise NotAllowed(
                problem=f"The API key {key.spec.name} does not have the scope {scope}, "
                "which this needs."
            )
        return key

    def check_use(self, key: ApiKey, model: str) -> None:
        """Refuse a model that the key is not for.

        Raises:
            NotAllowed
        """
        if not key.may_use(model):
            raise NotAllowed(problem=f"The API key {key.spec.name} is not for the model {model}.")

    def start(self, key: ApiKey, model: str) -> None:
        """Take a request to a model from the key's allowance.

        Raises:
            NotAllowed: the key is not for this model.
            RateLimitReached
        """
        self.check_use(key, model)
        try:
            wait_seconds = self._store.take(key)
        except sqlite3.Error:
            # Why go on: a limit protects capacity, not secrets.
            logger.exception("The limits of the API key %s cannot be kept", key.key_id)
            return
        if wait_seconds:
            raise RateLimitReached(key_name=key.spec.name, retry_after_seconds=wait_seconds)

    def count(self, key: ApiKey | None, model: str, usage: Usage) -> None:
        """Count what a request used that a model had accepted."""
        key_id = "" if key is None else key.key_id
        counts = self._used.setdefault((self._day(), key_id, model), [0, 0, 0, 0, 0])
        counts[0] += 1
        counts[1] += usage.num_prompt_tokens
        counts[2] += usage.num_completion_tokens
        counts[3] += usage.num_cached_tokens
        counts[4] += usage.num_reasoning_tokens
        if key is None or key.spec.tokens_per_minute is None:
            return
        try:
            self._store.charge(key, usage.num_prompt_tokens + usage.num_completion_tokens)
        except sqlite3.Error:
            logger.exception("The limits of the API key %s cannot be kept", key.key_id)

    def usage(
        self, *, since: str, until: str, key_id: str | None = None
    ) -> dict[tuple[str, str], Used]:
        """Return what was used by (key id, model uid), from one day to another, both included.

        Raises:
            StoreUnavailable: the file cannot be used now.
        """
        with _stored():
            self.flush()
            return self._store.usage(since=since, until=until, key_id=key_id)

    def flush(self) -> None:
        """Write down what was used; what cannot be written waits for the next time."""
        if self._used:
            self._store.add_usage({of: Used(*counts) for of, counts in self._used.items()})
            self._used = {}

    def _day(self) -> str:
        number = int(self._clock() // SECONDS_OF_A_DAY)
        if number != self._day_number:
            self._day_number = number
            self._day_text = date.fromordinal(EPOCH + number).isoformat()
        return self._day_text

    async def run(self) -> None:
        """Keep copy and file together until cancelled."""
        try:
            while True:
                await asyncio.sleep(REFRESH_SECONDS)
                self._sync()
        finally:
            self._sync()

    def _sync(self) -> None:
        try:
            self.flush()
            self.refresh()
        except sqlite3.Error:
            logger.exception("The API keys' file cannot be used; tried again soon")

    def close(self) -> None:
        """Write the rest and close the file."""
        self._sync()
        self._store.close()


@contextmanager
def _stored() -> Iterator[None]:
    """Tell the caller of a change that the file cannot be used, where nothing can go on without."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreUnavailable(problem=str(error)) from error
