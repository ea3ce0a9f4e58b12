# SPDX-License-Identifier: Apache-2.0
"""Which replica serves the next request. Pure: a routing table and what is known of the replicas
in, a route or an error out; the time is an argument.

A request goes where the least work is outstanding, counted in tokens: what was sent there and has
not come back, and the request itself less the beginning of its prompt that the replica has seen
lately and likely still has in its cache. Replicas that fail or fall far behind the others are
ejected for a while and let back in one request at a time; the last one is never ejected.
"""

import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from xinference.errors import LoadFailed, ModelNotFound, ModelNotReady
from xinference.identifiers import InstanceId, ModelUid
from xinference.protocol.deployment import ModelState
from xinference.protocol.generation import ChatPrompt, TextPrompt
from xinference.protocol.vectors import EmbeddingRequest, ModelRequest, RerankRequest

from .messages import Route, RoutesUpdate, RoutingTable

PREFIX_BLOCK_CHARS = 256
MAX_PREFIX_BLOCKS = 32
CHARS_PER_TOKEN = 4
MAX_CHAR_BYTES = 4
"""In UTF-8."""
DEFAULT_ANSWER_TOKENS = 128
"""Of a request that does not say how much it wants, and the most that a wish counts for: most
answers end long before their limit."""
MAX_REMEMBERED_PREFIXES = 65536
MAX_COMPARED = 16
"""Of more replicas, a few are compared: the one that knows the prompt, and some in turn."""
SOFT_FAILURES = 3
"""So many in a row eject a replica; the loss of its connection does at once."""
EJECTION_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
SLOW_FACTOR = 5.0
SLOW_STEP_SECONDS = 1.0
"""A replica is slow if a step takes longer than this, and so many times what it takes others."""
STALL_SECONDS = 10.0
"""One that has work and finishes no step for so long gets nothing more."""


def updated(table: RoutingTable, update: RoutesUpdate) -> RoutingTable:
    """Return the table that an update, asked for with this one's version, makes of it."""
    models = {} if update.is_whole else dict(table.models)
    for uid in update.removed:
        models.pop(uid, None)
    return RoutingTable(version=update.version, models=models | update.models)


def routes_of(table: RoutingTable, model: ModelUid) -> tuple[Route, ...]:
    """Return every ready replica of a model; none if it is known but not ready.

    Raises:
        ModelNotFound
    """
    if model not in table.models:
        raise ModelNotFound(model=model, running=ready_models(table))
    return table.models[model].routes


def ready_routes(table: RoutingTable, model: ModelUid) -> tuple[Route, ...]:
    """Return the replicas that may serve a request; at least one.

    Raises:
        ModelNotFound: the table has no such model.
        ModelNotReady: it is being started, restarted or stopped.
        LoadFailed: it was given up; asking again changes nothing.
    """
    routes = routes_of(table, model)
    if routes:
        return routes
    entry = table.models[model]
    if entry.state is ModelState.ERROR:
        raise LoadFailed(model=model, problem=entry.problem)
    raise ModelNotReady(
        model=model,
        state=entry.state.value.lower(),
        retry_after_seconds=entry.retry_after_seconds,
    )


def ready_models(table: RoutingTable) -> list[str]:
    """Return the uids that have a route, sorted."""
    return sorted(uid for uid, entry in table.models.items() if entry.routes)


@dataclass(frozen=True, slots=True)
class RequestCost:
    """What a request will be to a replica, as far as one can tell without its tokenizer."""

    prompt_tokens: int
    answer_tokens: int
    prefix: tuple[int, ...]
    """Names of the prompt's beginnings, each a block longer than the one before."""


def cost_of(model: ModelUid, request: ModelRequest) -> RequestCost:
    """Return the cost of a request. Takes microseconds, however long the prompt is."""
    match request:
        case EmbeddingRequest(inputs=inputs):
            return RequestCost(sum(map(len, inputs)) // CHARS_PER_TOKEN + 1, 0, ())
        case RerankRequest(query=query, documents=documents):
            num_chars = len(query) * len(documents) + sum(map(len, documents))
            return RequestCost(num_chars // CHARS_PER_TOKEN + 1, 0, ())
    prompt = request.prompt
    if isinstance(prompt, TextPrompt):
        num_chars, beginning = len(prompt.text), prompt.text
    elif isinstance(prompt, ChatPrompt):
        num_chars, beginning = _chat_text(prompt)
    else:
        num_chars = CHARS_PER_TOKEN * len(prompt.token_ids)
        beginning = str(prompt.token_ids[: MAX_PREFIX_BLOCKS * PREFIX_BLOCK_CHARS // 8])
    for other in request.more_prompts:
        if isinstance(other, TextPrompt):
            num_chars += len(other.text)
        else:
            num_chars += CHARS_PER_TOKEN * len(other.token_ids)
    wanted = request.sampling.max_tokens or DEFAULT_ANSWER_TOKENS
    return RequestCost(
        num_chars // CHARS_PER_TOKEN + 1,
        min(wanted, DEFAULT_ANSWER_TOKENS) * request.num_made,
        _prefix_names(f"{model} {request.cache_salt} ", beginning),
    )


def _chat_text(prompt: ChatPrompt) -> tuple[int, str]:
    """Return how long a conversation is, and how it begins."""
    parts: list[str] = []
    num_chars, room = 0, MAX_PREFIX_BLOCKS * PREFIX_BLOCK_CHARS
    for message in prompt.messages:
        content = message.content or ""
        num_chars += len(content)
        if room > 0:
            parts += (message.role, "\0", content[:room], "\0")
            room -= len(content) + len(message.role) + 2
    return num_chars, "".join(parts)


def _prefix_names(salt: str, text: str) -> tuple[int, ...]:
    if len(text) * MAX_CHAR_BYTES < PREFIX_BLOCK_CHARS:
        return ()
    name = zlib.crc32(salt.encode())
    encoded = text[: MAX_PREFIX_BLOCKS * PREFIX_BLOCK_CHARS].encode(errors="replace")
    names = []
    for end in range(PREFIX_BLOCK_CHARS, len(encoded) + 1, PREFIX_BLOCK_CHARS):
        name = zlib.crc32(encoded[end - PREFIX_BLOCK_CHARS : end], name)
        names.append(name)
    return tuple(names)


@dataclass(slots=True, eq=False)
class Lease:
    """A request's share of what is outstanding on a replica. Ended by `Balancer.end`."""

    instance: InstanceId
    prompt_tokens: int
    answer_tokens: int


@dataclass(slots=True, eq=False)
class _Replica:
    """What a gateway knows of one instance."""

    outstanding_tokens: int = 0
    num_requests: int = 0
    num_elsewhere: int = 0
    """Requests of other gateways, as it last said."""
    failures: int = 0
    """In a row."""
    ejections: int = 0
    """Since it last served well."""
    ejected_until: float | None = None
    is_on_trial: bool = False
    """It was ejected, has shown life since, and gets one request at a time."""
    steps: float = 0.0
    stepped_at: float | None = None
    """When its engine last finished a step, or had nothing to do."""
    read_at: float | None = None
    step_seconds: float | None = None

    @property
    def is_closed(self) -> bool:
        """Whether it gets no request now."""
        return self.ejected_until is not None or (self.is_on_trial and self.num_requests > 0)


class Balancer:
    """What one gateway knows of the replicas it sends to. Not shared between threads."""

    def __init__(self) -> None:
        self._replicas: dict[InstanceId, _Replica] = {}
        self._prefixes: OrderedDict[int, InstanceId] = OrderedDict()
        self._turn = 0
        self.num_ejections = 0
        """How often a replica was ejected."""

    def choose(
        self, routes: Sequence[Route], cost: RequestCost, *, excluded: Collection[InstanceId] = ()
    ) -> Route | None:
        """Return the replica that a request should go to; None if all are excluded."""
        known, num_known_tokens = self._knows(cost)
        best: Route | None = None
        lowest = (True, 0)
        for route in self._some(routes, known):
            instance = route.instance
            if excluded and instance in excluded:
                continue
            replica = self._replicas.get(instance)
            tokens = 0
            is_closed = False
            if replica is not None:
                tokens = replica.outstanding_tokens
                tokens += replica.num_elsewhere * DEFAULT_ANSWER_TOKENS
                is_closed = replica.is_closed
            if instance == known:
                tokens -= num_known_tokens
            # Why closed ones at all: when all are, the least bad one serves.
            if best is None or (is_closed, tokens) < lowest:
                best, lowest = route, (is_closed, tokens)
        if best is None and len(routes) > MAX_COMPARED:
            return next((route for route in routes if route.instance not in excluded), None)
        return best

    def begin(self, route: Route, cost: RequestCost) -> Lease:
        """Note that a request was sent to a replica."""
        instance = route.instance
        replica = self._replicas.get(instance)
        if replica is None:
            replica = self._replicas[instance] = _Replica()
        replica.num_requests += 1
        replica.outstanding_tokens += cost.prompt_tokens + cost.answer_tokens
        for name in cost.prefix:
            self._prefixes[name] = instance
            self._prefixes.move_to_end(name)
        while len(self._prefixes) > MAX_REMEMBERED_PREFIXES:
            self._prefixes.popitem(last=False)
        return Lease(instance, cost.prompt_tokens, cost.answer_tokens)

    def progress(self, lease: Lease, num_tokens: int) -> None:
        """Note that so many tokens of an answer have come: its prompt is done with, too."""
        replica = self._replicas.get(lease.instance)
        done = lease.prompt_tokens + min(num_tokens, lease.answer_tokens)
        lease.prompt_tokens = 0
        lease.answer_tokens = max(0, lease.answer_tokens - num_tokens)
        if replica is not None:
            replica.outstanding_tokens -= done

    def end(self, lease: Lease, *, is_good: bool = False) -> None:
        """Note that a request is over. Good: the replica did its work; it is trusted again."""
        replica = self._replicas.get(lease.instance)
        if replica is None:
            return
        replica.outstanding_tokens -= lease.prompt_tokens + lease.answer_tokens
        replica.num_requests -= 1
        lease.prompt_tokens = lease.answer_tokens = 0
        if is_good:
            replica.failures = replica.ejections = 0
            replica.is_on_trial = False

    def failed(self, instance: InstanceId, *, now: float, is_lost: bool) -> None:
        """Note that a replica failed a request, by its own fault; lost: it cannot be reached."""
        replica = self._replicas.setdefault(instance, _Replica())
        replica.failures += 1
        if is_lost or replica.is_on_trial or replica.failures >= SOFT_FAILURES:
            self._eject(replica, now)

    def to_probe(self, routes: Iterable[Route], *, now: float) -> list[Route]:
        """Return the replicas whose state is worth asking for now.

        Those that work for this gateway, and those whose ejection is over.
        """
        found = []
        for route in routes:
            replica = self._replicas.get(route.instance)
            if replica is None:
                continue
            is_due = replica.ejected_until is not None and now >= replica.ejected_until
            if is_due or (replica.ejected_until is None and replica.num_requests > 0):
                found.append(route)
        return found

    def silent(self, instance: InstanceId, *, now: float) -> None:
        """Note that a replica did not answer a question in time."""
        replica = self._replicas.get(instance)
        if replica is not None and (replica.ejected_until is None or now >= replica.ejected_until):
            self._eject(replica, now)

    def observe(self, instance: InstanceId, counters: Mapping[str, float], *, now: float) -> None:
        """Take in what a replica says of itself: it lives, and this is how far it is."""
        replica = self._replicas.get(instance)
        if replica is None:
            return
        num_live = counters.get("num_running", 0.0) + counters.get("num_waiting", 0.0)
        replica.num_elsewhere = max(0, int(num_live) - replica.num_requests)
        steps = counters.get("progress", 0.0)
        if not num_live:
            replica.step_seconds, replica.stepped_at = None, now
        elif replica.read_at is not None and steps > replica.steps:
            replica.step_seconds = (now - replica.read_at) / (steps - replica.steps)
            replica.stepped_at = now
        elif replica.stepped_at is None:
            replica.stepped_at = now
        replica.steps, replica.read_at = steps, now
        is_stalled = replica.stepped_at is not None and now - replica.stepped_at > STALL_SECONDS
        if replica.ejected_until is not None and now >= replica.ejected_until and not is_stalled:
            replica.ejected_until = None
            replica.is_on_trial = True
        elif is_stalled and (replica.ejected_until is None or now >= replica.ejected_until):
            self._eject(replica, now)

    def eject_slow(self, routes: Sequence[Route], *, now: float) -> list[Route]:
        """Eject what is far slower than the other replicas of its model; return those."""
        readings = {
            route.instance: replica.step_seconds
            for route in routes
            if (replica := self._replicas.get(route.instance)) is not None
            and replica.step_seconds is not None
        }
        ejected = []
        for route in routes:
            mine = readings.get(route.instance)
            others = [one for instance, one in readings.items() if instance != route.instance]
            if mine is None or mine < SLOW_STEP_SECONDS or not others:
                continue
            replica = self._replicas[route.instance]
            if mine > SLOW_FACTOR * median(others) and replica.ejected_until is None:
                self._eject(replica, now)
                ejected.append(route)
        return ejected

    def is_ejected(self, instance: InstanceId) -> bool:
        """Return whether a replica is kept from requests, or gets them one at a time."""
        replica = self._replicas.get(instance)
        return replica is not None and (replica.ejected_until is not None or replica.is_on_trial)

    def keep(self, instances: Collection[InstanceId]) -> None:
        """Forget every replica but these and those that still work."""
        for instance, replica in list(self._replicas.items()):
            if instance not in instances and not replica.num_requests:
                del self._replicas[instance]

    def _eject(self, replica: _Replica, now: float) -> None:
        step = min(replica.ejections, len(EJECTION_SECONDS) - 1)
        replica.ejected_until = now + EJECTION_SECONDS[step]
        replica.ejections += 1
        self.num_ejections += 1
        replica.is_on_trial = False
        replica.failures = 0
        replica.step_seconds = None

    def _knows(self, cost: RequestCost) -> tuple[InstanceId | None, int]:
        """Return the replica that has last seen most of a prompt, and how many tokens of it."""
        prefix = cost.prefix
        for index in range(len(prefix) - 1, -1, -1):
            instance = self._prefixes.get(prefix[index])
            if instance is not None:
                num_tokens = (index + 1) * PREFIX_BLOCK_CHARS // CHARS_PER_TOKEN
                return instance, min(num_tokens, cost.prompt_tokens)
        return None, 0

    def _some(self, routes: Sequence[Route], known: InstanceId | None) -> Iterable[Route]:
        """Return the routes to compare, another one first each time: so equals take turns."""
        self._turn += 1
        count = len(routes)
        if count <= MAX_COMPARED:
            first = self._turn % count if count else 0
            return (*routes[first:], *routes[:first])
        chosen = [routes[(self._turn * 7919 + step * 104729) % count] for step in range(8)]
        if known is not None:
            chosen += [route for route in routes if route.instance == known]
        return chosen


class RetryBudget:
    """How many requests may be sent a second time: a tenth of all, and some at once.

    Why: when much fails at once, retries must not double the load on what is left.
    """

    BURST = 256.0
    PER_SECOND = 10.0
    PER_REQUEST = 0.1

    def __init__(self, *, now: float) -> None:
        self._left = self.BURST
        self._at = now

    def note_request(self) -> None:
        """Count a new request."""
        self._left = min(self.BURST, self._left + self.PER_REQUEST)

    def take(self, *, now: float) -> bool:
        """Return whether one more may be sent again, and count it."""
        self._left = min(self.BURST, self._left + (now - self._at) * self.PER_SECOND)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
