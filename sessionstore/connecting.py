"""Clients: the one that a store opens for itself, and what is accepted from a caller."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException
from redis.retry import Retry

from sessionstore import sentinels, tls
from sessionstore.attempts import CONNECT_SHARE, POOL_WAIT_SHARE, READ_SHARE
from sessionstore.clusters import TaskCluster, ThreadCluster
from sessionstore.errors import InvalidArgumentError
from sessionstore.settings import StoreSettings

URL_VARIABLE = "SESSIONSTORE_URL"

_SYNC: tuple[type, ...] = (redis.Redis, redis.RedisCluster)
_ASYNC: tuple[type, ...] = (redis.asyncio.Redis, redis.asyncio.RedisCluster)
_SENTINELS: tuple[type, ...] = (redis.Sentinel, redis.asyncio.Sentinel)


def url_from_environment() -> str:
    """The URL in ``SESSIONSTORE_URL``."""
    url = os.environ.get(URL_VARIABLE)
    if not url:
        raise InvalidArgumentError.of(
            URL_VARIABLE, "is not set: set it to the server's URL, or pass a client or use from_url"
        )
    return url


def connect(url: str, settings: StoreSettings) -> Any:
    """A client with blocking pools and finite waits."""
    retry = Retry(NoBackoff(), 0)
    if sentinels.is_sentinel_url(url):
        return _of_sentinels(
            sentinels.thread_client, redis.BlockingConnectionPool, url, settings, retry
        )
    if settings.cluster:
        blocking: Any = redis.BlockingConnectionPool
        pools = partial(blocking, timeout=settings.deadline * POOL_WAIT_SHARE)
        options = _options(settings, retry, nodes=2, max_connections=settings.max_connections)
        _of_cluster(redis.asyncio.RedisCluster, url, options)  # refuses what is no URL, now
        options["connection_pool_class"] = pools
        return ThreadCluster(partial(_of_cluster, redis.RedisCluster, url, options))
    return redis.Redis.from_pool(_pool(redis.BlockingConnectionPool, url, settings, retry))


def connect_async(url: str, settings: StoreSettings) -> Any:
    """The same for asyncio. The pools of a cluster client do not block, its calls wait instead."""
    retry = AsyncRetry(NoBackoff(), 0)
    if sentinels.is_sentinel_url(url):
        return _of_sentinels(
            sentinels.task_client, redis.asyncio.BlockingConnectionPool, url, settings, retry
        )
    if settings.cluster:
        options = _options(settings, retry, nodes=2, max_connections=settings.max_connections)
        return TaskCluster(_of_cluster(redis.asyncio.RedisCluster, url, options))
    pool = _pool(redis.asyncio.BlockingConnectionPool, url, settings, retry)
    return redis.asyncio.Redis.from_pool(pool)


def _options(settings: StoreSettings, retry: Any, *, nodes: int = 1, **more: Any) -> dict[str, Any]:
    # ``nodes``: for how many an attempt may wait. After a failure a cluster client learns the
    # topology, and sentinels are asked where the primary is.
    return {
        "retry": retry,  # never: the store itself decides when to try again
        "socket_connect_timeout": settings.deadline * CONNECT_SHARE / nodes,
        "socket_timeout": settings.deadline * READ_SHARE / nodes,
        # With RESP 3, redis-py 8.1's asyncio client does not notice idle connections that the
        # server has closed.
        "protocol": 2,
        "encoding": "utf-8",
        **more,
    }


def _pool(pool_class: Any, url: Any, settings: StoreSettings, retry: Any, nodes: int = 1) -> Any:
    options = _options(settings, retry, nodes=nodes)
    _refuse_other_than_text(url)
    options |= tls.checked(url)
    try:
        pool = pool_class.from_url(
            url,
            max_connections=settings.max_connections,
            timeout=settings.deadline * POOL_WAIT_SHARE,
            **options,
        )
        pool.connection_kwargs.update(options)  # also over what the URL asks for
        pool.connection_class(**pool.connection_kwargs)  # an unknown option fails here, not later
    except (ValueError, TypeError):
        raise _bad_url(
            "redis://[[USER]:PASSWORD@]HOST[:PORT][/DB], rediss://…, unix://PATH or "
            f"{sentinels.URL_FORMS}"
        ) from None
    return pool


def _of_sentinels(
    client_of: Callable[[sentinels.SentinelURL, Any], Any],
    pool_class: Any,
    url: str,
    settings: StoreSettings,
    retry: Any,
) -> Any:
    """A client of the primary whose sentinels a URL names."""
    if settings.cluster:
        raise InvalidArgumentError.of("cluster", "must be false: a cluster has no sentinels")
    try:
        named = sentinels.parsed(url)
        pool = _pool(pool_class, named.server, settings, retry, nodes=2)
        return client_of(named, pool)
    except InvalidArgumentError:
        raise
    except (ValueError, TypeError):
        raise _bad_url(f"{sentinels.URL_FORMS} or rediss+sentinel://…") from None


def _of_cluster(client_class: Any, url: Any, options: dict[str, Any]) -> Any:
    _refuse_other_than_text(url)
    options = options | tls.checked(url)
    try:
        return client_class.from_url(
            url,
            require_full_coverage=False,
            # At every fifth MOVED the asyncio client would close the connections of all tasks.
            reinitialize_steps=0,
            **options,
        )
    except (ValueError, TypeError):
        raise _bad_url("redis://[[USER]:PASSWORD@]HOST[:PORT] or rediss://…") from None
    except RedisClusterException as error:
        if "cluster mode" in str(error):  # of a database, or of a socket
            raise _bad_url("redis://[[USER]:PASSWORD@]HOST[:PORT] or rediss://…") from None
        raise


def _refuse_other_than_text(url: object) -> None:
    if not isinstance(url, str):
        raise InvalidArgumentError.of("url", f"must be a str, not {type(url).__name__}")


def _bad_url(forms: str) -> InvalidArgumentError:
    # Without redis-py's own words: they may quote a part of the password.
    return InvalidArgumentError.of(
        "url",
        f"is not valid: it must be {forms}, the password percent-encoded, with options that "
        "redis-py knows",
    )


def connections_of(client: Any) -> int | None:
    """How many connections an asyncio client's pool gives out before it raises; None: it waits."""
    if isinstance(client, TaskCluster):
        return client.max_connections
    pool = getattr(client, "connection_pool", None)
    if isinstance(pool, redis.asyncio.BlockingConnectionPool):
        return None
    most = getattr(pool, "max_connections", None)
    return most if isinstance(most, int) else None


def read_timeout(client: Any) -> float | None:
    """Seconds that a client waits for an answer, if that can be told and is not for ever."""
    options = getattr(getattr(client, "connection_pool", None), "connection_kwargs", {})
    timeout = options.get("socket_timeout")
    return timeout if isinstance(timeout, (int, float)) else None


def accepted(client: object) -> Any:
    """The caller's client; one of the wrong kind would fail later, and in words of its own."""
    client = _of_kind(client, "redis.Redis", not_of=_ASYNC)
    if isinstance(client, redis.RedisCluster):
        return ThreadCluster(lambda: client, decodes=decodes(client), retries=True)
    return client


def accepted_async(client: object) -> Any:
    """The caller's asyncio client."""
    client = _of_kind(client, "redis.asyncio.Redis", not_of=_SYNC)
    if isinstance(client, redis.asyncio.RedisCluster):
        return TaskCluster(client, decodes=decodes(client))
    return client


def _of_kind(client: object, wanted: str, not_of: tuple[type, ...]) -> Any:
    if isinstance(client, _SENTINELS):
        raise InvalidArgumentError.of("client", "must be what master_for gives, not the Sentinel")
    if getattr(getattr(client, "connection_pool", None), "is_master", True) is False:
        raise InvalidArgumentError.of("client", "must be of the primary: one of master_for")
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
    if isinstance(client, (ThreadCluster, TaskCluster)):
        return client.decodes
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
