"""Certificates and keys of a federation on one machine: a new authority, made for the occasion."""

import os
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_VALID = timedelta(days=30)


def make_certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Make an authority and a server's certificate for this machine's loopback addresses.

    Returns:
        The authority's certificate, the server's certificate and the server's private key, as PEM files; the
        authority's own key is thrown away, so that nothing else can be signed with it.
    """
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    issuer = _name("Lossworks loopback authority")
    root = (
        _builder(issuer, issuer, authority)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority, hashes.SHA256())
    )
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    leaf = (
        _builder(_name("localhost"), issuer, server)
        .add_extension(names, critical=False)
        .sign(authority, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return (
        _write(folder / "ca.pem", root.public_bytes(pem)),
        _write(folder / "server.pem", leaf.public_bytes(pem)),
        write_private(folder / "server.key", server),
    )


def make_node_key(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a SuperNode's key pair; return the files of its private and its public half."""
    private = ec.generate_private_key(ec.SECP384R1())
    public = private.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return write_private(folder / name, private), _write(folder / f"{name}.pub", public)


def write_private(path: Path, key: ec.EllipticCurvePrivateKey) -> Path:
    """Write a private key that only its owner can read."""
    text = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH
        if path.suffix != ".key"
        else serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(text)
    return path


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + _VALID)
    )


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
