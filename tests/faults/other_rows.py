# SPDX-License-Identifier: Apache-2.0
"""Rows of the matrix that single tests run with bounds of their own, or that are not run and why.

They are about one part of the cluster, or need no load; `table.py` puts them on the page.
"""

PROVEN_ALONE: tuple[tuple[str, str, str], ...] = (
    (
        "F31",
        "ten times as many requests as a model takes",
        "`tests/e2e/test_overload.py`: a 429 with `Retry-After` from 1 to 60 for each that is"
        " not answered; the replica grows by less than 64 MiB. `benchmarks/overload.py`: five"
        " times too many, for as long as one likes",
    ),
    (
        "F32",
        "a deadline that passes in the queue, or before the first token",
        "`tests/e2e/test_overload.py`, `tests/api/test_patience.py`: a 504, and aborted in "
        "the engine",
    ),
    (
        "F33",
        "out of memory in a step, injected",
        "`tests/engine/test_isolation.py`: halved until it fits; what does not fit alone "
        "fails alone, and all others get the tokens they get alone",
    ),
    (
        "F35",
        "a host without memory",
        "`tests/faults/test_memory.py`: the scores by which the kernel chooses, replicas "
        "first; a kill meanwhile is told as `host_oom`",
    ),
    (
        "F36",
        "GPUs, simulated, that stay held when a replica has ended",
        "`tests/faults/test_devices.py`: in quarantine after 5 s, nothing is placed there, "
        "free again when it is; `tests/cluster/test_device_ledger.py`",
    ),
    (
        "F37",
        "the desired state locked, full, read-only, damaged",
        "`tests/faults/test_desired_state.py`, `tests/cluster/test_store.py`: no request "
        "fails; a 507 for changes; a damaged file is replaced by its copy or refused",
    ),
    (
        "F38",
        "256 descriptors and more callers than that",
        "`tests/e2e/test_descriptors.py` (long), `tests/cli/test_http_server.py`: a 503 for "
        "callers beyond, the others go on, all is well when they have left",
    ),
    (
        "F39",
        "the wall clock is set an hour forward and back",
        "`tests/faults/test_clock.py`: no event. Leases of batches of requests do go by it: "
        "gateway processes share them in a file",
    ),
    (
        "F40",
        "two supervisors, or one of an earlier epoch",
        "`tests/cluster/test_store.py::test_a_store_that_is_in_use_is_refused`, "
        "`tests/cluster/test_worker.py::test_an_older_supervisor_and_an_earlier_life_are_not_obeyed`",
    ),
    (
        "F41",
        "a worker that comes back after it was replaced",
        "`tests/cluster/test_state.py::test_a_worker_that_returns_after_being_replaced_loses_its_surplus`;"
        " in any history, at rest, what runs is what is wanted",
    ),
    (
        "F42",
        "a stranger at the address of a replica",
        "`tests/faults/test_connections.py`: no request fails, it is ejected; "
        "`tests/cluster/dataplane/test_connection.py`: impostors in the handshake",
    ),
    (
        "F44",
        "a data connection is reset inside a frame, ends without END, carries garbage",
        "`tests/faults/test_connections.py`: every answer is whole and right",
    ),
    (
        "F45",
        "remote code raises SystemExit, CancelledError, a class that nobody can import",
        "`tests/contracts/test_control_bus.py`: an error of ours; both processes live",
    ),
    (
        "S01",
        "pickled frames without a key, with a wrong one, and a recorded good one, to every port",
        "`tests/faults/test_strangers.py`: nothing runs, and a call counts once",
    ),
    (
        "S02",
        "half-sent connections to every port: 150 each, long 2000",
        "`tests/faults/test_strangers.py`: 64 of a host are kept, the oldest go; requests "
        "meanwhile are answered",
    ),
    (
        "S03",
        "39 addresses of what others must not reach, in every field for media",
        "`tests/api/test_hostile_paths.py`: a 400, no connection. This version looks at no "
        "address in a request",
    ),
    (
        "S04",
        "60 names that lead elsewhere, in paths and registrations",
        "`tests/api/test_hostile_paths.py`, `tests/api/test_web.py`: refused; nothing made or"
        " read elsewhere. `model_path` may be any, for the scope `admin`",
    ),
    (
        "S05",
        "every route with no key, a wrong one, each scope, a revoked one",
        "`tests/api/test_access.py`: by the table of routes; revoked within a second",
    ),
    (
        "S06",
        "secrets in environment, headers, launches and prompts",
        "`tests/e2e/test_secrets.py`: not in logs at DEBUG, metrics, errors or descriptions",
    ),
)

NOT_RUN: tuple[tuple[str, str, str], ...] = (
    (
        "F34",
        "an engine that cannot recover from being out of memory, started with a lower limit",
        "there is no such state here: a step is halved down to one request, which fails alone"
        " (F33). A device that is lost ends the process (F07), which is started as it was",
    ),
    (
        "F35",
        "a kill by the kernel within a cgroup of its own",
        "needs a cgroup that tests may make, which containers do not have",
    ),
)
