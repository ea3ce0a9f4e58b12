# SPDX-License-Identifier: Apache-2.0
"""A replica whose model costs nothing, for benchmarks of what is before it.

`python -m benchmarks.free_model` is what a worker starts instead of a real replica: the tests' fake
behind the real data plane, without a pause between its tokens and with room for thousands of
requests.
"""

import asyncio
import sys

from tests.fakes.replica import FakeReplica
from xinference.cluster.replica import main
from xinference.identifiers import ModelUid

MAX_REQUESTS = 4096


class FreeModel(FakeReplica):
    """Counts, as fast as it is listened to."""

    def __init__(self, model: ModelUid, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            model, loop, max_num_seqs=MAX_REQUESTS, max_queue_size=MAX_REQUESTS, step_seconds=0.0
        )


if __name__ == "__main__":
    sys.exit(main(FreeModel))
