# SPDX-License-Identifier: Apache-2.0
"""The name of a full block: a hash of its tokens and of everything before them.

Two blocks of one name hold the same keys and values, so one can stand for the other. The chain
starts at the salt, which keeps apart what must not be shared: callers that name one, and later
adapters and images. 128 bits of blake2b: nobody can make two chains meet, so tokens need not be
compared on a hit.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

HASH_BYTES = 16


def chain_start(salt: str) -> bytes:
    """Return what the first block of a sequence with this salt has before it."""
    return blake2b(salt.encode(), digest_size=HASH_BYTES, person=b"xinference salt").digest()


def next_hashes(
    before: bytes, token_ids: npt.NDArray[np.int32], block_size: int
) -> Sequence[bytes]:
    """Return the names of the full blocks of these tokens, which follow the block `before`.

    Args:
        before: the name of the block before them, or `chain_start`.
        token_ids: (n,) int32; what is beyond the last full block is left out.
        block_size: tokens in a block.
    """
    hashes = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        block = token_ids[start : start + block_size].tobytes()
        before = blake2b(before + block, digest_size=HASH_BYTES).digest()
        hashes.append(before)
    return hashes
