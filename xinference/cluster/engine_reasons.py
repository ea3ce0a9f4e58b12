# SPDX-License-Identifier: Apache-2.0
"""Which engines of those that could run a family are there on some worker. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from xinference.protocol.nodes import NodeResources


def with_reasons(engines: Mapping[str, Any], nodes: Sequence[NodeResources]) -> dict[str, Any]:
    """Return what the engines run, and in place of it why none of the nodes has such an engine.

    Args:
        engines: by name, what each could run, or in words why it runs nothing of the family.
        nodes: of the cluster, with what each engine lacks there.
    """
    answers = dict(engines)
    for name, found in engines.items():
        reasons = [node.engines[name] for node in nodes if name in node.engines]
        if isinstance(found, list) and reasons and all(reasons):
            words = "; ".join(dict.fromkeys(reasons))
            where = "on the worker" if len(nodes) == 1 else "on any worker"
            answers[name] = f"{name} cannot run {where}: {words}"
    return answers
