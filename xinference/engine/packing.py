# SPDX-License-Identifier: Apache-2.0
"""Linear layers with their weights laid out once for the CPU's matrix kernels.

PyTorch hands oneDNN a plain matrix, which it lays out anew in every call; with few rows, as in
decoding, that costs as much as the product. Packed once at load, a decoding step of a 0.5B model
takes about 0.6 of the time in bfloat16 and 0.4 in float32 (`doc/experiments/engine-cpu.md`).
"""

import logging

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_PACKABLE = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """Computes what the `nn.Linear` did that it was made from. Inference only, CPU only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        # Why not a parameter: the packed layout is opaque, nothing may look into it or move it.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if hidden.numel() == 0:
            return hidden.new_empty(*hidden.shape[:-1], self.out_features)
        mapped: Tensor = torch.ops.mkldnn._linear_pointwise(
            hidden, self._packed, self.bias, "none", [], ""
        )
        return mapped

    @property
    def weight(self) -> Tensor:
        """The plain matrix, made anew: for model code that looks at it now and then."""
        weight: Tensor = self._packed.to_dense()
        return weight


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


def pack_linears(model: nn.Module) -> int:
    """Replace every plain `nn.Linear` below `model` by a packed one; return how many.

    A weight that something else uses too, like the embedding tied to a head, stays for the other
    and is copied for the packed layer. Do not save or train the model afterwards.
    """
    num_packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # Why the exact type: a subclass may compute something else.
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
                num_packed += 1
    return num_packed
