# SPDX-License-Identifier: Apache-2.0
"""Proof that both ends of a connection know the key of one instance. Pure.

The key of an instance is derived from the cluster's key, so a replica is given only its own:
whoever takes over a model's process cannot speak for another one. Each proof covers both
nonces, the version, the role, the instance and the certificate, so none can be used twice, turned
round, or passed on by somebody between the two ends.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from xinference.identifiers import InstanceId

ROLES = ("gateway", "actor")
NONCE_BYTES = 32
HANDSHAKE_SECONDS = 5.0
"""A server closes a connection that has not been welcomed by then."""


def instance_key(cluster_key: bytes, instance: InstanceId) -> bytes:
    """Return the key of one instance: 32 bytes."""
    label = b"xinference data plane key\x00" + instance.encode()
    return hmac.new(cluster_key, label, hashlib.sha256).digest()


def new_nonce() -> bytes:
    """Return bytes that nobody has seen before."""
    return secrets.token_bytes(NONCE_BYTES)


def is_same(proof: bytes, expected: bytes) -> bool:
    """Compare in a time that does not depend on where they differ."""
    return hmac.compare_digest(proof, expected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """What both ends have said, in the clear, when they come to prove themselves."""

    version: int
    instance: str
    role: str
    challenge: bytes
    """The server's nonce."""
    nonce: bytes
    """The client's."""
    certificate: bytes = b""
    """The digest of the server's, as each end has it; empty without encryption."""

    def client_proof(self, key: bytes) -> bytes:
        """Return what a client shows in HELLO."""
        return self._proof(b"client", key)

    def server_proof(self, key: bytes) -> bytes:
        """Return what a server shows in WELCOME."""
        return self._proof(b"server", key)

    def _proof(self, side: bytes, key: bytes) -> bytes:
        parts = (
            b"xinference data plane",
            side,
            b"%d" % self.version,
            self.instance.encode(),
            self.role.encode(),
            self.challenge,
            self.nonce,
            self.certificate,
        )
        # Why the lengths: without them two different lists of parts could be the same bytes.
        said = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.new(key, said, hashlib.sha256).digest()
