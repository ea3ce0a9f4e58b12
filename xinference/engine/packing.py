# SPDX-License-Identifier: Apache-2.0
"""Linear layers with their weights laid out once for the CPU's matrix kernels.

PyTorch hands oneDNN a plain matrix, which it lays out anew in every call; with few rows, as in
decoding, that costs as much as the product. Packed once at load, a decoding step of a 0.5B model
takes about 0.6 of the time in bfloat16 and 0.4 in float32 (`doc/experiments/engine-cpu.md`).

Layers that map the same tensor, like those of queries, keys and values, become one product. Which
do is not read from their names: `SharedInputs` watches a forward.
"""

import logging
from collections.abc import Iterable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from .native.linear import NativeWeights, can_be_native

logger = logging.getLogger(__name__)

_PACKABLE = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """Computes what the `nn.Linear` did that it was made from. Inference only, CPU only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self._weights = _packed(linear.weight.detach(), linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return self._weights.map(hidden)

    @property
    def weight(self) -> Tensor:
        """The plain matrix, made anew: for model code that looks at it now and then."""
        return self._weights.plain()


class JoinedLinear(nn.Module):
    """Computes what one `nn.Linear` of several did that map the same tensor, all at once."""

    def __init__(self, linear: nn.Linear, team: "_Team", place: int) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self._team = team
        self._place = place

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features), part of a wider tensor."""
        return self._team.map(hidden, self._place)

    @property
    def weight(self) -> Tensor:
        """As `PackedLinear.weight`."""
        return self._team.plain(self._place)


def _packed(weight: Tensor, bias: Tensor | None) -> "NativeWeights | _OneDnnWeights":
    return (NativeWeights if can_be_native(weight) else _OneDnnWeights)(weight, bias)


class _OneDnnWeights:
    """A matrix and a bias, laid out for oneDNN's kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._num_out = len(weight)
        self._bias = bias
        # Why not a parameter: the packed layout is opaque, nothing may look into it or move it.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def map(self, hidden: Tensor) -> Tensor:
        if hidden.numel() == 0:
            return hidden.new_empty(*hidden.shape[:-1], self._num_out)
        mapped: Tensor = torch.ops.mkldnn._linear_pointwise(
            hidden, self._packed, self._bias, "none", [], ""
        )
        return mapped

    def plain(self) -> Tensor:
        weight: Tensor = self._packed.to_dense()
        return weight


class _Team:
    """Layers that map the same tensor: the first that is called computes for all."""

    def __init__(self, linears: tuple[nn.Linear, ...]) -> None:
        self._widths = [linear.out_features for linear in linears]
        bias = None
        if any(linear.bias is not None for linear in linears):
            bias = torch.cat(
                [
                    linear.weight.new_zeros(linear.out_features)
                    if linear.bias is None
                    else linear.bias.detach()
                    for linear in linears
                ]
            )
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self._weights = _packed(weight, bias)
        self._hidden: Tensor | None = None
        self._parts: dict[int, Tensor] = {}
        """Of `_hidden`, what nobody has taken yet."""

    def map(self, hidden: Tensor, place: int) -> Tensor:
        # Why by identity: it is held until it is forgotten, so no other can be taken for it.
        if hidden is not self._hidden or place not in self._parts:
            parts = self._weights.map(hidden).split(self._widths, dim=-1)
            self._hidden, self._parts = hidden, dict(enumerate(parts))
        part = self._parts.pop(place)
        if not self._parts:
            self._hidden = None
        return part

    def plain(self, place: int) -> Tensor:
        parts: tuple[Tensor, ...] = self._weights.plain().split(self._widths)
        return parts[place]


class SharedInputs:
    """Watches forwards of a model: which linear layers map the same tensor, one after another."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._hidden: Tensor | None = None
        self._runs: list[list[nn.Linear]] = []

    def __enter__(self) -> Self:
        for module in self._model.modules():
            if type(module) is nn.Linear:
                self._hooks.append(module.register_forward_pre_hook(self._note))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hidden = None

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear), module
        hidden = inputs[0] if inputs else None
        if hidden is not None and hidden is self._hidden:
            self._runs[-1].append(module)
        else:
            self._runs.append([module])
        self._hidden = hidden

    def groups(self) -> list[tuple[nn.Linear, ...]]:
        """Return those of more than one layer that were the same each time."""
        distinct = {tuple(run): None for run in self._runs}
        times: dict[nn.Linear, int] = {}
        for run in distinct:
            for linear in run:
                times[linear] = times.get(linear, 0) + 1
        return [
            run for run in distinct if len(run) > 1 and all(times[linear] == 1 for linear in run)
        ]


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether layers of this type can be packed there, by packing a small one.

    Why by trying: the operators are PyTorch's own but not public, and differ by build and CPU.
    """
    if device.type != "cpu" or dtype not in _PACKABLE or not torch.backends.mkldnn.is_available():
        return False
    with torch.inference_mode():
        linear = nn.Linear(32, 16, dtype=dtype)
        hidden = torch.ones(2, 32, dtype=dtype)
        try:
            packed = PackedLinear(linear)(hidden)
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            logger.info("linear layers stay as they are: %s", error)
            return False
        return bool(torch.allclose(packed.float(), linear(hidden).float(), atol=0.05, rtol=0.05))


def pack_linears(model: nn.Module, joined: Iterable[tuple[nn.Linear, ...]] = ()) -> int:
    """Replace every plain `nn.Linear` below `model` by a packed one; return how many.

    A weight that something else uses too, like the embedding tied to a head, stays for the other
    and is copied for the packed layer. Do not save or train the model afterwards.

    Args:
        model: on the CPU, in a type that `can_pack` knows.
        joined: layers that map the same tensor (`SharedInputs.groups`); those that are no longer
            below it are left out.
    """
    packed: dict[nn.Linear, nn.Module] = {}
    present = set(model.modules())
    for linears in joined:
        if not present.issuperset(linears):
            continue
        team = _Team(linears)
        for place, linear in enumerate(linears):
            packed[linear] = JoinedLinear(linear, team, place)
    num_packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # Why the exact type: a subclass may compute something else.
            if type(child) is nn.Linear:
                setattr(parent, name, packed.pop(child, None) or PackedLinear(child))
                num_packed += 1
    return num_packed
