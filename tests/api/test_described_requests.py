# SPDX-License-Identifier: Apache-2.0
"""Whatever `/openapi.json` allows, and what is near to it: the answer is as the document says.

schemathesis makes the requests of the document, over a socket; half of them are aimed at a model
that runs. Routes that launch, stop or lock something have a gateway of their own.
"""

import asyncio
import collections
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.fakes.cluster import FakeCluster
from tests.fakes.http import serving
from tests.long_runs import RecordLongRun
from xinference.api.app import create_app

CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
OUR_FAULT = {500, 502, 504}
CHANGING = {
    "POST /v1/models",
    "DELETE /v1/models/{model_uid}",
    "POST /v1/models/{model_uid}/cancel",
    "POST /v1/models/{model_uid}/replicas",
    "DELETE /v1/models/{model_uid}/replicas/{replica_id}",
    "POST /v1/model_registrations/{model_type}",
    "DELETE /v1/model_registrations/{model_type}/{model_name}",
    "POST /v1/admin/keys",
    "DELETE /v1/admin/keys/{key_id}",
    "DELETE /v1/clusters",
}
AIMS = {
    "model": "guide",
    "model_uid": "guide",
    "model_type": "LLM",
    "model_name": "xinference-guide",
    "model_engine": "transformers",
}
NUM_CASES, NUM_LONG = 8, 80
"""For each operation."""
SECONDS = 30.0


@contextmanager
def described() -> Iterator[Any]:
    """Give the document of a running gateway, ready to be asked."""
    cluster = asyncio.run(FakeCluster.running())
    with serving(create_app(cluster)) as endpoint:
        document = httpx.get(f"{endpoint}/openapi.json").json()
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=endpoint)
        yield schema


def aimed(case: Any, is_aimed: bool) -> Any:
    """Return a case that names what there is, if it is to; logs are not followed, for an hour."""
    if case.query:
        case.query.pop("follow", None)
    if is_aimed:
        if isinstance(case.body, dict):
            case.body |= {name: AIMS[name] for name in AIMS.keys() & case.body.keys()}
        for name in AIMS.keys() & (case.path_parameters or {}).keys():
            case.path_parameters[name] = AIMS[name]
    return case


@pytest.mark.parametrize("is_changing", [False, True], ids=["others", "launching or destructive"])
@pytest.mark.timeout(900)
def test_every_answer_is_one_that_the_document_describes(
    is_changing: bool, is_long: bool, record_long_run: RecordLongRun
) -> None:
    statuses: collections.Counter[int] = collections.Counter()

    def check_of(operation: Any) -> Callable[[], None]:
        @seed(7)
        @settings(
            max_examples=NUM_LONG if is_long else NUM_CASES,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.builds(aimed, operation.as_strategy(), st.booleans()))
        def check(case: Any) -> None:
            answer = case.call(timeout=SECONDS)
            statuses[answer.status_code] += 1
            assert answer.status_code not in OUR_FAULT, (case.as_curl_command(), answer.text)
            case.validate_response(answer, checks=CHECKS)

        return check

    with described() as schema:
        operations = [result.ok() for result in schema.get_all_operations()]
        chosen = [one for one in operations if (one.label in CHANGING) == is_changing]
        assert {one.label for one in operations} >= CHANGING
        for operation in chosen:
            check_of(operation)()

    assert statuses[200] > 0
    record_long_run(
        "Requests that /openapi.json describes", requests=statuses.total(), answered=statuses[200]
    )
