# SPDX-License-Identifier: Apache-2.0
"""Runs batches: in each gateway a few workers, each with one batch at a time.

A worker takes the lease of a batch, and does what its status says comes next: read and check the
input, ask for the answers, write the results into files. Each step can be done again by another
worker, in another process, which goes on with the lines that have no outcome yet.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import orjson

from xinference.api.gateway import Gateway
from xinference.api.store.batches import BatchStatus, Lease, LeaseLostError
from xinference.errors import (
    CapacityError,
    ClusterError,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    ObjectNotFound,
    StoreUnavailable,
    XinferenceError,
)
from xinference.identifiers import RequestId, new_request_id

from .lines import answered, batch_error, check_lines, given_up, parse_line, refused, split_lines
from .schema import MAX_LIFETIME_SECONDS

logger = logging.getLogger(__name__)

NUM_WORKERS = 4
"""Batches that one gateway works on at once."""
NUM_REQUESTS = 8
"""Requests of one batch that run at once."""
LOOK_SECONDS = 2.0
"""How often a worker without a batch looks for one, and one with a batch for its cancellation."""
MAX_WAIT_SECONDS = 30.0
"""Between two attempts at a line that the cluster cannot answer now."""

Answer = Callable[[Gateway, dict[str, Any], RequestId], Awaitable[bytes]]
"""What an endpoint answers to a body. Raises as the endpoint does."""


class BatchRunner:
    """The workers of one gateway."""

    def __init__(self, gateway: Gateway, endpoints: Mapping[str, Answer]) -> None:
        self._gateway = gateway
        self._endpoints = endpoints
        self._batches = gateway.store.batches

    async def run(self) -> None:
        """Work until cancelled; then others may take the batches over at once."""
        async with asyncio.TaskGroup() as workers:
            for _ in range(NUM_WORKERS):
                workers.create_task(self._work())

    async def _work(self) -> None:
        while True:
            try:
                lease = await self._batches.claim()
                if lease is not None:
                    await self._hold(lease)
                    continue
            except LeaseLostError:
                logger.warning("A batch was taken over by another gateway")
                continue
            except StoreUnavailable as error:
                logger.warning("%s", error)
            except Exception:
                # Why: a worker that ends would leave the batches to nobody.
                logger.exception("A batch failed; it is tried again")
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._batches.created.wait()
            self._batches.created.clear()

    async def _hold(self, lease: Lease) -> None:
        """Work on a batch while keeping its lease and looking whether it is still wanted."""
        job = _Job(self._gateway, self._endpoints, lease)
        working = asyncio.create_task(job.run())
        try:
            while not working.done():
                await asyncio.wait({working}, timeout=LOOK_SECONDS)
                if working.done():
                    break
                document = await self._batches.renew(lease)
                if document["status"] == BatchStatus.CANCELLING:
                    await _stopped(working)
                    await job.give_up(BatchStatus.CANCELLED)
                    return
                if document["expires_at"] < time.time():
                    await _stopped(working)
                    await job.give_up(BatchStatus.EXPIRED)
                    return
            await working
        finally:
            await _stopped(working)
            with suppress(StoreUnavailable):
                await self._batches.release(lease)


async def _stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Job:
    """One batch in the hands of its worker."""

    gateway: Gateway
    endpoints: Mapping[str, Answer]
    lease: Lease

    async def run(self) -> None:
        """Do what is left to do.

        Raises:
            LeaseLostError, StoreUnavailable
        """
        document = await self.gateway.store.batches.renew(self.lease)
        try:
            if document["status"] == BatchStatus.VALIDATING:
                document = await self._validate(document)
            if document["status"] == BatchStatus.IN_PROGRESS:
                await self._answer_all(document)
                document = await self._advance(BatchStatus.FINALIZING)
            if document["status"] == BatchStatus.FINALIZING:
                await self._finish(BatchStatus.COMPLETED)
            elif document["status"] == BatchStatus.CANCELLING:
                await self.give_up(BatchStatus.CANCELLED)
        except (ObjectNotFound, InvalidApiKey) as error:
            # The input file was deleted, or the key has ended that the batch was made with.
            await self._fail([batch_error(error)])

    async def give_up(self, status: BatchStatus) -> None:
        """End the batch without the lines that have no outcome; they are told as errors.

        Raises:
            LeaseLostError, StoreUnavailable
        """
        batches = self.gateway.store.batches
        message = f"The batch is {status}; nobody came to this request."
        try:
            async for position, custom_id, _ in self._lines_left(await batches.renew(self.lease)):
                line = given_up(custom_id, code=f"batch_{status}", message=message)
                await batches.save_line(self.lease, position, line, is_error=True)
        except (ObjectNotFound, InvalidRequest) as error:
            # It was deleted, or given up before anybody had checked it.
            logger.info("The input of a batch that is %s cannot be read: %s", status, error)
        await self._finish(status)

    async def _validate(self, document: dict[str, Any]) -> dict[str, Any]:
        pieces = self.gateway.store.files.pieces(self.lease.owner, document["input_file_id"])
        found = await check_lines(pieces, endpoint=document["endpoint"])
        if found.errors:
            await self._fail(found.errors)
            return {**document, "status": BatchStatus.FAILED}
        counts = {"total": found.num_lines, "completed": 0, "failed": 0}
        return await self._advance(BatchStatus.IN_PROGRESS, request_counts=counts)

    async def _advance(self, status: BatchStatus, **fields: Any) -> dict[str, Any]:
        """Go on to a status, unless the batch is being cancelled; return the batch."""
        now = {"status": status, f"{status}_at": int(time.time())}
        return await self.gateway.store.batches.change(self.lease, {**now, **fields})

    async def _fail(self, errors: list[dict[str, Any]]) -> None:
        now = {"status": BatchStatus.FAILED, "failed_at": int(time.time())}
        told = {"errors": {"object": "list", "data": errors}}
        await self.gateway.store.batches.end(self.lease, {**now, **told})

    async def _lines_left(
        self, document: Mapping[str, Any]
    ) -> AsyncIterator[tuple[int, str, dict[str, Any]]]:
        """Yield position, custom id and body of each line that has no outcome yet."""
        done = await self.gateway.store.batches.positions_done(self.lease)
        pieces = self.gateway.store.files.pieces(self.lease.owner, document["input_file_id"])
        position = -1
        async for raw in split_lines(pieces):
            position += 1
            if raw.strip() and position not in done:
                line = parse_line(raw, endpoint=document["endpoint"])
                yield position, line.custom_id, line.body

    async def _answer_all(self, document: dict[str, Any]) -> None:
        endpoint = self.endpoints[document["endpoint"]]
        slots = asyncio.Semaphore(NUM_REQUESTS)

        async def answer(position: int, custom_id: str, body: dict[str, Any]) -> None:
            try:
                await self._answer(endpoint, position, custom_id, body)
            finally:
                slots.release()

        try:
            async with asyncio.TaskGroup() as requests:
                async for position, custom_id, body in self._lines_left(document):
                    await slots.acquire()
                    requests.create_task(answer(position, custom_id, body))
        except BaseExceptionGroup as group:
            # Why the first: the others are cancelled, or failed at the same thing.
            raise _first(group) from None

    async def _answer(
        self, endpoint: Answer, position: int, custom_id: str, body: dict[str, Any]
    ) -> None:
        """Get an outcome for a line; wait for what passes by itself."""
        wait_seconds = 1.0
        while True:
            request_id = new_request_id()
            gateway = self.gateway.for_owner(self.lease.owner)
            try:
                whole = await endpoint(gateway, body, request_id)
                line, is_error = answered(custom_id, request_id, whole), False
            except StoreUnavailable:
                raise
            except (CapacityError, ClusterError) as error:
                wait_seconds = min(2 * wait_seconds, MAX_WAIT_SECONDS)
                at_least = getattr(error, "retry_after_seconds", 0)
                await asyncio.sleep(max(min(at_least, MAX_WAIT_SECONDS), wait_seconds / 2))
                continue
            except XinferenceError as error:
                line, is_error = refused(custom_id, request_id, error), True
            except Exception:
                logger.exception("A line of a batch failed [%s]", request_id)
                problem = f"the log has more under the request id {request_id}"
                broken = InternalError(where="the gateway", problem=problem)
                line, is_error = refused(custom_id, request_id, broken), True
            await self.gateway.store.batches.save_line(
                self.lease, position, line, is_error=is_error
            )
            return

    async def _finish(self, status: BatchStatus) -> None:
        """Write the outcomes into files, and end the batch."""
        store = self.gateway.store
        document = await store.batches.renew(self.lease)
        usage = _Usage()
        made: dict[str, str] = {}
        try:
            for name, is_error in (("output", False), ("error", True)):
                lines = self._outcomes(is_error, usage)
                file_id = await self._stored(document, name, lines)
                if file_id is not None:
                    made[f"{name}_file_id"] = file_id
            now = {"status": status, f"{status}_at": int(time.time())}
            await store.batches.end(self.lease, {**now, **made, "usage": usage.told()})
        except BaseException:
            for file_id in made.values():
                with suppress(ObjectNotFound):
                    await store.files.delete(self.lease.owner, file_id)
            raise

    async def _stored(
        self, document: Mapping[str, Any], name: str, lines: AsyncIterator[bytes]
    ) -> str | None:
        first = await anext(lines, None)
        if first is None:
            return None

        async def pieces() -> AsyncIterator[bytes]:
            yield first
            async for line in lines:
                yield line

        expires_after = document["output_expires_after"]
        file = await self.gateway.store.files.create(
            self.lease.owner,
            pieces(),
            filename=f"{document['id']}_{name}.jsonl",
            purpose="batch_output",
            lifetime_seconds=expires_after["seconds"] if expires_after else MAX_LIFETIME_SECONDS,
            is_bounded=False,
        )
        return file.id

    async def _outcomes(self, is_error: bool, usage: "_Usage") -> AsyncIterator[bytes]:
        """Yield pieces of a file of outcomes, in the order of the input."""
        batches = self.gateway.store.batches
        position = -1
        while lines := await batches.next_lines(self.lease, is_error=is_error, after=position):
            position = lines[-1][0]
            for _, line in lines:
                usage.add(line)
            yield b"".join(line + b"\n" for _, line in lines)
            await batches.renew(self.lease)


class _Usage:
    """The tokens of all answers of a batch."""

    def __init__(self) -> None:
        self._num_input = self._num_output = self._num_cached = self._num_reasoning = 0

    def add(self, outcome: bytes) -> None:
        """Count what an outcome says of its tokens."""
        response = orjson.loads(outcome)["response"] or {}
        usage = response.get("body", {}).get("usage") or {}
        given = usage.get("input_tokens_details") or usage.get("prompt_tokens_details") or {}
        made = usage.get("output_tokens_details") or usage.get("completion_tokens_details") or {}
        self._num_input += usage.get("input_tokens", usage.get("prompt_tokens", 0))
        self._num_output += usage.get("output_tokens", usage.get("completion_tokens", 0))
        self._num_cached += given.get("cached_tokens", 0)
        self._num_reasoning += made.get("reasoning_tokens", 0)

    def told(self) -> dict[str, Any]:
        """Return them as a batch tells them."""
        return {
            "input_tokens": self._num_input,
            "input_tokens_details": {"cached_tokens": self._num_cached},
            "output_tokens": self._num_output,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning},
            "total_tokens": self._num_input + self._num_output,
        }


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
