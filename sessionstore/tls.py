"""TLS: what a ``rediss://`` URL asks for is looked at when the store is made.

redis-py reads certificates when it connects. There a file that is missing fails like a server that
is away, and would be tried again until the deadline. Here it is an ``InvalidArgumentError`` that
names the option. Whether the server is who it says it is, is left to redis-py, which verifies
certificate and host name unless the URL asks it not to.
"""

from __future__ import annotations

import logging
import ssl
from typing import Any

from redis import connection
from redis.asyncio.connection import RedisSSLContext
from redis.exceptions import RedisError

from sessionstore.errors import InvalidArgumentError

logger = logging.getLogger("sessionstore")

_redis_py: Any = connection  # whose types are not whole
_context_of: Any = RedisSSLContext
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_OF_A_CONTEXT = (
    *("keyfile", "certfile", "cert_reqs", "ca_certs", "ca_data", "ca_path"),
    *("check_hostname", "ciphers", "min_version"),
)


def checked(url: str) -> dict[str, Any]:
    """Refuse files and options that no connection could be made with; warn of what is not verified.

    Returns:
        Options beside the URL's: redis-py 6's asyncio client takes no certificate without a file
        of its key, though it may be in the same.

    Raises:
        InvalidArgumentError: the message names the option, or says what OpenSSL says.
    """
    if not url.startswith("rediss://"):
        return {}
    try:
        options: dict[str, Any] = _redis_py.parse_url(url)
    except ValueError:
        return {}  # it is no URL, which the client will say
    for name in _FILES:
        _check_file(name, options.get(name))
    _check_pair(options)
    verifying = {"ssl_cert_reqs": "required", "ssl_check_hostname": True} | options
    given: dict[str, Any] = {name: verifying.get(f"ssl_{name}") for name in _OF_A_CONTEXT}
    if given["certfile"]:  # looked at already; with a password OpenSSL would ask the terminal
        given["certfile"] = given["keyfile"] = None
    try:
        used = {name: value for name, value in given.items() if value is not None}
        context: ssl.SSLContext = _context_of(**used).get()
    except (OSError, ValueError, TypeError, RedisError) as error:
        raise InvalidArgumentError.of("ssl_ options", f"are of no use: {error}") from None
    if context.verify_mode == ssl.CERT_NONE:
        logger.warning("ssl_cert_reqs=none: anybody on the way can pass for the server")
    elif not given["check_hostname"]:
        logger.warning(
            "ssl_check_hostname=false: whoever has a certificate of the CA can pass for the server"
        )
    if "ssl_certfile" in options and "ssl_keyfile" not in options:
        return {"ssl_keyfile": options["ssl_certfile"]}
    return {}


def _check_file(name: str, path: str | None) -> None:
    if path is None:
        return
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise InvalidArgumentError.of(
            name, f"names a file that cannot be read: {path}: {error.strerror}"
        ) from None


def _check_pair(options: dict[str, Any]) -> None:
    certificate, key = options.get("ssl_certfile"), options.get("ssl_keyfile")
    if certificate is None and key is None:
        return
    if certificate is None:
        raise InvalidArgumentError.of("ssl_keyfile", "needs ssl_certfile")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(
            certificate,
            key,
            # Without one OpenSSL would ask the terminal for it, and wait.
            options.get("ssl_password") or "",
        )
    except (OSError, ValueError) as error:
        raise InvalidArgumentError.of(
            "ssl_certfile",
            f"does not go together with ssl_keyfile and ssl_password, or one is no PEM: {error}",
        ) from None
