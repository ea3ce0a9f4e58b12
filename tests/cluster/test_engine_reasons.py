# SPDX-License-Identifier: Apache-2.0
"""What an engine could run is told only where some worker has the engine."""

from xinference.cluster.engine_reasons import with_reasons
from xinference.models.servers.availability import engines_here
from xinference.protocol.nodes import NodeResources
from xinference.protocol.servers import ServerEngine

COULD = [{"model_format": "pytorch"}]
ENGINES = {"Transformers": COULD, "vLLM": COULD, "llama.cpp": "there is no ggufv2"}


def node(**engines: str) -> NodeResources:
    return NodeResources(
        cpu_count=1,
        cpu_utilization=0.0,
        memory_total_bytes=1,
        memory_used_bytes=0,
        memory_available_bytes=1,
        engines=engines,
    )


def test_an_engine_that_one_worker_has_is_told_of() -> None:
    nodes = [node(vLLM="is not installed"), node(vLLM="")]

    assert with_reasons(ENGINES, nodes) == ENGINES


def test_an_engine_that_no_worker_has_is_told_with_what_each_lacks() -> None:
    nodes = [node(vLLM="is not installed"), node(vLLM="there is no GPU")]

    told = with_reasons(ENGINES, nodes)

    assert told["vLLM"] == "vLLM cannot run on any worker: is not installed; there is no GPU"
    assert told["Transformers"] == COULD
    assert told["llama.cpp"] == "there is no ggufv2"


def test_without_a_word_of_any_worker_nothing_is_ruled_out() -> None:
    assert with_reasons(ENGINES, []) == ENGINES


def test_a_worker_knows_what_every_engine_lacks_here() -> None:
    here = engines_here()

    assert set(here) == {str(engine) for engine in ServerEngine}
    assert here["llama.cpp"] == ""
    assert here["vLLM"] == "vllm is not installed; run pip install vllm"
