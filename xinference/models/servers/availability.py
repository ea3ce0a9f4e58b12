# SPDX-License-Identifier: Apache-2.0
"""Which of the engines that are servers can run on this machine, or what they lack.

Standard library only, and nothing is imported: a worker asks this every now and then.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from xinference.protocol.servers import ServerEngine

GPU_FILES = ("/dev/nvidiactl", "/dev/kfd")
"""There where a driver of NVIDIA or AMD is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Needs:
    module: str
    distribution: str
    gpu: bool


_NEEDS: Mapping[ServerEngine, _Needs] = {
    ServerEngine.LLAMA_CPP: _Needs(module="xllamacpp", distribution="xllamacpp", gpu=False),
    ServerEngine.VLLM: _Needs(module="vllm", distribution="vllm", gpu=True),
    ServerEngine.SGLANG: _Needs(module="sglang", distribution="sglang", gpu=True),
    ServerEngine.TRT_LLM: _Needs(module="tensorrt_llm", distribution="tensorrt-llm", gpu=True),
}


def what_is_missing(engine: ServerEngine, *, on_cpu: bool = False) -> str | None:
    """Say what an engine lacks here; None if nothing.

    Args:
        engine: to run in the environment of this process.
        on_cpu: whether the launch asks for a build of it that needs no GPU.
    """
    needs = _NEEDS[engine]
    if find_spec(needs.module) is None:
        return f"{needs.module} is not installed; run pip install {needs.distribution}"
    if needs.gpu and not on_cpu and not any(Path(one).exists() for one in GPU_FILES):
        return "there is no GPU"
    return None


def engines_here() -> dict[str, str]:
    """Return what each engine lacks on this machine, by its name; empty if nothing."""
    return {str(engine): what_is_missing(engine) or "" for engine in ServerEngine}
