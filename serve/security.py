"""Who may talk to a server: keys compared in constant time, TLS, client certificates, names a browser may use."""

import hashlib
import hmac
import ipaddress
import logging
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from serve.client import KEY_VARIABLE

MIN_KEY_LENGTH = 16
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SecurityConfig:
    """Keys are never settings: a command line is visible to every user of a machine."""

    key_file: Path | None = None  # one key per line; or one key in the environment variable REMASK_API_KEY
    tls_certificate: Path | None = None  # PEM, chain included
    tls_key: Path | None = None  # PEM
    client_ca: Path | None = None  # PEM: clients must show a certificate signed by it (mutual TLS)
    hosts: tuple[str, ...] = ()  # names browsers may use for this server, beside its own addresses

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs both security.tls_certificate and security.tls_key.")
        if self.client_ca is not None and self.tls_certificate is None:
            raise ValueError(
                "security.client_ca asks for client certificates, which needs TLS: give security.tls_certificate and tls_key."
            )

    @property
    def has_tls(self) -> bool:
        return self.tls_certificate is not None


class Keys:
    """The API keys. Without any, everybody is let in."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        short = [key for key in keys if len(key) < MIN_KEY_LENGTH]
        if short:
            raise ValueError(
                f"An API key has {len(short[0])} characters; at least {MIN_KEY_LENGTH} are needed: openssl rand -hex 32."
            )
        self._digests = tuple(_digest(key.encode()) for key in keys)

    @classmethod
    def load(cls, config: SecurityConfig) -> "Keys":
        """From the key file and the environment. Raises OSError or ValueError."""
        keys = [os.environ[KEY_VARIABLE]] if os.environ.get(KEY_VARIABLE) else []
        if config.key_file is not None:
            lines = [line.strip() for line in Path(config.key_file).expanduser().read_text().splitlines()]
            found = [line for line in lines if line and not line.startswith("#")]
            if not found:
                raise ValueError(f"{config.key_file} holds no key; write one per line.")
            keys += found
        return cls(tuple(keys))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, authorization: str | None) -> bool:
        """Whether an Authorization header ("Bearer KEY", or openpi's "Api-Key KEY") carries one of the keys.

        The time does not depend on how much of a key is right: digests of equal length are compared, all of them.
        """
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip().encode("utf-8", "surrogateescape"))
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() in ("bearer", "api-key") and any(matches)


def check_binding(host: str, config: SecurityConfig, keys: Keys) -> None:
    """Raise ValueError for an address beyond this machine without a key or TLS."""
    if is_loopback(host):
        return
    if not keys and not config.has_tls:
        raise ValueError(
            f"host {host!r} can be reached from other machines. Set a key ({KEY_VARIABLE} or security.key_file) or TLS "
            "first, or bind to 127.0.0.1."
        )
    if not keys and config.client_ca is None:
        logger.warning("TLS without a key or client_ca: whoever reaches %s may use this server.", host)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def tls_context(config: SecurityConfig) -> ssl.SSLContext | None:
    """For the HTTP port; None without TLS. Raises OSError or ssl.SSLError if the files are wrong."""
    if not config.has_tls:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(config.tls_certificate, config.tls_key)
    if config.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(config.client_ca)
    return context


def grpc_credentials(config: SecurityConfig) -> grpc.ServerCredentials | None:
    """For the gRPC port; None without TLS."""
    if not config.has_tls:
        return None
    pair = (Path(config.tls_key).read_bytes(), Path(config.tls_certificate).read_bytes())
    root = None if config.client_ca is None else Path(config.client_ca).read_bytes()
    return grpc.ssl_server_credentials([pair], root_certificates=root, require_client_auth=root is not None)


def host_name(header: str) -> str:
    """The name in a Host header, without its port."""
    name = header.strip().lower()
    if name.startswith("["):
        return name.partition("]")[0].removeprefix("[")
    return name.partition(":")[0]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
