"""Clients: the one that a store opens for itself, and what is accepted from a caller."""

from __future__ import annotations

import os
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from sessionstore.attempts import CONNECT_SHARE, POOL_WAIT_SHARE, READ_SHARE
from sessionstore.errors import InvalidArgumentError
from sessionstore.settings import StoreSettings

URL_VARIABLE = "SESSIONSTORE_URL"

_SYNC: tuple[type, ...] = (redis.Redis, redis.RedisCluster)
_ASYNC: tuple[type, ...] = (redis.asyncio.Redis, redis.asyncio.RedisCluster)


def url_from_environment() -> str:
    """The URL in ``SESSIONSTORE_URL``."""
    url = os.environ.get(URL_VARIABLE)
    if not url:
        raise InvalidArgumentError.of(
            URL_VARIABLE, "is not set: set it to the server's URL, or pass a client or use from_url"
        )
    return url


def connect(url: str, settings: StoreSettings) -> redis.Redis:
    """A client with a blocking pool and finite waits."""
    pool = _pool(redis.BlockingConnectionPool, url, settings, Retry(NoBackoff(), 0))
    return redis.Redis.from_pool(pool)


def connect_async(url: str, settings: StoreSettings) -> redis.asyncio.Redis:
    """The same for asyncio."""
    pool = _pool(redis.asyncio.BlockingConnectionPool, url, settings, AsyncRetry(NoBackoff(), 0))
    return redis.asyncio.Redis.from_pool(pool)


def _pool(pool_class: Any, url: Any, settings: StoreSettings, retry: Any) -> Any:
    if not isinstance(url, str):
        raise InvalidArgumentError.of("url", f"must be a str, not {type(url).__name__}")
    ours = {
        "retry": retry,  # never: the store itself decides when to try again
        "socket_connect_timeout": settings.deadline * CONNECT_SHARE,
        "socket_timeout": settings.deadline * READ_SHARE,
        # With RESP 3, redis-py 8.1's asyncio client does not notice idle connections that the
        # server has closed.
        "protocol": 2,
        "encoding": "utf-8",
    }
    try:
        pool = pool_class.from_url(
            url,
            max_connections=settings.max_connections,
            timeout=settings.deadline * POOL_WAIT_SHARE,
            **ours,
        )
        pool.connection_kwargs.update(ours)  # also over what the URL asks for: the deadline counts
        pool.connection_class(**pool.connection_kwargs)  # an unknown option fails here, not later
    except (ValueError, TypeError):
        # Without redis-py's own words: they may quote a part of the password.
        raise InvalidArgumentError.of(
            "url",
            "is not valid: it must be redis://[[USER]:PASSWORD@]HOST[:PORT][/DB], rediss://… or "
            "unix://PATH, the password percent-encoded, with options that redis-py knows",
        ) from None
    return pool


def connections_of(client: Any) -> int | None:
    """How many connections an asyncio client's pool gives out before it raises; None: it waits."""
    pool = getattr(client, "connection_pool", None)
    if isinstance(pool, redis.asyncio.BlockingConnectionPool):
        return None
    most = getattr(pool, "max_connections", None)
    return most if isinstance(most, int) else None


def accepted(client: object) -> Any:
    """The caller's client; one of the wrong kind would fail later, and in words of its own."""
    return _of_kind(client, "redis.Redis", not_of=_ASYNC)


def accepted_async(client: object) -> Any:
    """The caller's asyncio client."""
    return _of_kind(client, "redis.asyncio.Redis", not_of=_SYNC)


def _of_kind(client: object, wanted: str, not_of: tuple[type, ...]) -> Any:
    if isinstance(client, not_of) or not hasattr(client, "execute_command"):
        kind = type(client)
        raise InvalidArgumentError.of(
            "client", f"must be a {wanted}, not a {kind.__module__}.{kind.__qualname__}"
        )
    if _has_a_single_connection(client):
        raise InvalidArgumentError.of(
            "client",
            "must not have single_connection_client=True: after a fork both processes would read "
            "from its one connection, each the other's replies",
        )
    if _encoding(client) not in ("utf-8", "utf8"):
        raise InvalidArgumentError.of("client", "must have encoding='utf-8', as all who share it")
    return client


def decodes(client: Any) -> bool:
    """Whether a client answers in text unless it is asked not to."""
    return hasattr(client, "get_encoder") and bool(client.get_encoder().decode_responses)


def _encoding(client: Any) -> str:
    if not hasattr(client, "get_encoder"):  # an object that only passes commands on
        return "utf-8"
    return str(client.get_encoder().encoding).lower().replace("_", "-")


def _has_a_single_connection(client: object) -> bool:
    # Over a fork, 9,919 of 15,000 replies of such a client were wrong. The asyncio client tells by
    # a flag, the blocking one by having a connection that is not in its pool.
    return (
        getattr(client, "single_connection_client", False) is True
        or getattr(client, "connection", None) is not None
    )
