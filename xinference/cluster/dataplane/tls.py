# SPDX-License-Identifier: Apache-2.0
"""The encryption of a data plane connection between hosts.

A replica makes a certificate of its own when it starts. Nobody signs it and nobody keeps it: the
proofs of the handshake cover its digest, and only the two ends know the key they are made with. So
whoever sits between them and shows another certificate is refused by both.
"""

import datetime
import hashlib
import secrets
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SUBJECT = "xinference data plane"
# Why not around now: no end looks at them, so no clock that is wrong can do harm.
_VALID_FROM = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_VALID_UNTIL = datetime.datetime(2999, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class ServerTls:
    """What a replica encrypts with."""

    context: ssl.SSLContext
    digest: bytes
    """Of its certificate, by `digest_of`."""


def new_server_tls() -> ServerTls:
    """Make a key and a certificate that live as long as this process."""
    # Why here: only processes that others reach need it, and it takes 50 ms.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, _SUBJECT)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_VALID_FROM)
        .not_valid_after(_VALID_UNTIL)
        .sign(key, hashes.SHA256())
    )
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    # Why a password: the library reads files only, and this one is of no use to who finds it.
    password = secrets.token_bytes(32)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password),
    )
    with tempfile.TemporaryDirectory(prefix="xinference-") as directory:
        file = Path(directory) / "certificate.pem"
        file.write_bytes(pem + certificate.public_bytes(serialization.Encoding.PEM))
        context.load_cert_chain(file, password=password)
    return ServerTls(context, digest_of(certificate.public_bytes(serialization.Encoding.DER)))


def client_tls() -> ssl.SSLContext:
    """Return what a client encrypts with. It trusts any certificate: the proofs tell."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def digest_of(certificate: bytes) -> bytes:
    """Return the digest of a certificate in DER: 32 bytes."""
    return hashlib.sha256(certificate).digest()


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context
