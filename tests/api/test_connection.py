# SPDX-License-Identifier: Apache-2.0
"""Work for a client ends when the client leaves, and for no other reason quietly."""

import asyncio

import pytest

from xinference.api.connection import DEPARTURE, Departure, WhileConnected, departure_of
from xinference.api.patience import Patience
from xinference.errors import DeadlinePassed
from xinference.identifiers import ModelUid

DEADLINE_SECONDS = 30.0


class Client:
    """The receiving end of an ASGI connection, of a server that tells who leaves or of another."""

    def __init__(self, *, is_told: bool) -> None:
        self.is_asked = not is_told
        """Whether somebody has to ask for it, which takes a turn of the loop."""
        self._left = asyncio.Event()
        self._told = Departure() if is_told else None
        scope = {DEPARTURE: self._told} if is_told else {}
        self.departure = departure_of(scope, self._receive)

    def leave(self) -> None:
        self._left.set()
        if self._told is not None:
            self._told.happen()

    async def _receive(self) -> dict[str, str]:
        await self._left.wait()
        return {"type": "http.disconnect"}


@pytest.fixture(params=[True, False], ids=["told", "received"])
def client(request: pytest.FixtureRequest) -> Client:
    return Client(is_told=request.param)


async def for_ever() -> None:
    await asyncio.get_running_loop().create_future()


async def test_a_client_that_leaves_ends_the_work_without_an_error(client: Client) -> None:
    asyncio.get_running_loop().call_soon(client.leave)

    async with asyncio.timeout(DEADLINE_SECONDS):
        with WhileConnected(client.departure) as connection:
            await for_ever()

    assert connection.has_left


async def test_work_that_ends_first_is_not_disturbed_by_a_client_that_leaves_later(
    client: Client,
) -> None:
    with WhileConnected(client.departure) as connection:
        await asyncio.sleep(0)
    client.leave()
    for _ in range(5):
        await asyncio.sleep(0)

    assert not connection.has_left


async def test_a_client_that_has_left_before_the_work_begins_ends_it(client: Client) -> None:
    client.leave()

    async with asyncio.timeout(DEADLINE_SECONDS):
        with WhileConnected(client.departure) as connection:
            await for_ever()

    assert connection.has_left


async def test_an_error_of_the_work_comes_through(client: Client) -> None:
    with pytest.raises(LookupError), WhileConnected(client.departure):
        raise LookupError


async def test_somebody_elses_cancelling_comes_through_even_when_the_client_leaves_too(
    client: Client,
) -> None:
    is_inside = asyncio.Event()

    async def work() -> None:
        with WhileConnected(client.departure):
            is_inside.set()
            await for_ever()

    task = asyncio.create_task(work())
    await is_inside.wait()
    client.leave()
    if client.is_asked:
        await asyncio.sleep(0)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_client_that_leaves_before_the_deadline_is_not_told_of_it(client: Client) -> None:
    asyncio.get_running_loop().call_soon(client.leave)

    with WhileConnected(client.departure) as connection:
        async with Patience(whole_seconds=DEADLINE_SECONDS).waiting(ModelUid("guide")):
            await for_ever()

    assert connection.has_left


async def test_a_deadline_ends_the_work_of_a_client_that_stays(client: Client) -> None:
    with pytest.raises(DeadlinePassed), WhileConnected(client.departure):
        async with Patience(begin_seconds=0.01, whole_seconds=60).waiting(ModelUid("guide")):
            await for_ever()


async def test_what_has_begun_may_take_until_the_second_deadline() -> None:
    async def begin_and_wait() -> None:
        patience = Patience(begin_seconds=0.01, whole_seconds=0.1)
        async with patience.waiting(ModelUid("guide")) as wait:
            wait.began()
            await for_ever()

    with pytest.raises(DeadlinePassed) as passed:
        await begin_and_wait()

    assert passed.value.seconds >= 0.1
