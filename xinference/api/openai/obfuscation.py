# SPDX-License-Identifier: Apache-2.0
"""`stream_options.include_obfuscation`: pieces of a stream whose sizes tell nothing of their text.

Who can see only how long the encrypted records of a stream are could guess what is in them. With
random characters beside it, every piece is one of few lengths.
"""

import secrets

BLOCK_CHARS = 32
"""A text and the characters beside it are a multiple of this."""


def padding(text: str) -> str:
    """Return the characters that go beside a piece of text."""
    return secrets.token_hex(BLOCK_CHARS)[: BLOCK_CHARS - len(text) % BLOCK_CHARS]


def padded(chunks: bytes, text: str) -> bytes:
    """Return server-sent events of which the first, a JSON object, has the characters beside it."""
    first, end, others = chunks.partition(b"}\n\n")
    return b'%b,"obfuscation":"%b"%b%b' % (first, padding(text).encode(), end, others)
