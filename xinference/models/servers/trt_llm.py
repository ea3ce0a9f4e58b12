# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM: its server, from the wheel `tensorrt_llm`. It asks its callers for no key."""

import sys
from pathlib import Path
from typing import Any

from xinference.errors import InvalidRequest
from xinference.protocol.deployment import ReplicaSpec
from xinference.protocol.generation import Grammar
from xinference.protocol.servers import ServerEngine

from .dialect import Started
from .flags import own_flags, shared_flags
from .openai_server import OpenAiServer

_FLAGS = {
    "max_num_seqs": "--max_batch_size",
    "max_model_len": "--max_seq_len",
    "max_num_batched_tokens": "--max_num_tokens",
    "trust_remote_code": "--trust_remote_code",
}


class TrtLlm(OpenAiServer):
    """A `Dialect`."""

    engine = ServerEngine.TRT_LLM

    def start(self, spec: ReplicaSpec, path: Path, *, port: int, key: str) -> Started:
        """Return how to start it; see `Dialect.start`."""
        assert spec.server_options is not None, "it is launched as a server"
        if spec.engine_options.device == "cpu":
            raise InvalidRequest(field="device", problem="of TRT-LLM is a GPU; it has no CPU")
        return Started(
            command=[
                *(sys.executable, "-m", "tensorrt_llm.commands.serve", "serve", str(path)),
                *("--host", "127.0.0.1", "--port", str(port)),
                *shared_flags(spec.engine_options, spec.server_options.given, _FLAGS),
                *own_flags(spec.server_options, dash="_", denial=None),
            ]
        )

    def constraint(self, grammar: Grammar) -> dict[str, Any]:
        """Refuse it: what a server follows depends on how it was built."""
        raise InvalidRequest(field=grammar.field, problem="is not passed on to TRT-LLM")
