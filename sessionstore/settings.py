"""Settings of a store, from arguments or from the environment.

An argument wins over the environment variable ``SESSIONSTORE_<NAME>``, which wins over the
default. Workers that share a namespace should share its settings.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, Self, TypedDict

from pydantic import BaseModel, Field, ValidationError, field_validator

from sessionstore.errors import InvalidArgumentError

#: What an agent type looks like.
TYPE_PATTERN = r"[a-z][a-z0-9_-]{0,31}"
ENVIRONMENT_PREFIX = "SESSIONSTORE_"


class SettingsArguments(TypedDict, total=False):
    """The settings as keyword arguments; ``StoreSettings`` explains them."""

    namespace: str
    buffer_limit: int
    buffer_bytes: int
    chunk_limit: int
    types: frozenset[str] | set[str] | list[str] | tuple[str, ...] | None
    partitions: int
    cluster: bool
    deadline: float
    wait_replicas: int
    max_connections: int
    allow_eviction: bool
    coalesce: bool
    worker: str
    reap_grace: float
    retention: float | None


class StoreSettings(BaseModel, frozen=True, extra="forbid"):
    """How a store behaves."""

    namespace: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}$", description="first part of every key"),
    ] = "agents"
    buffer_limit: Annotated[
        int, Field(ge=0, description="most entries a buffer keeps; 0 = no bound")
    ] = 10_000
    buffer_bytes: Annotated[
        int, Field(ge=0, description="most bytes a buffer keeps (UTF-8 + 16 an entry); 0 = none")
    ] = 8 * 1024 * 1024
    chunk_limit: Annotated[
        int, Field(ge=1, le=64 * 1024 * 1024, description="most bytes of one chunk")
    ] = 1024 * 1024
    types: Annotated[
        frozenset[Annotated[str, Field(pattern=f"^{TYPE_PATTERN}$")]] | None,
        Field(min_length=1, description="the only agent types accepted; None = any"),
    ] = None
    partitions: Annotated[
        Literal[1, 16, 256], Field(description="into how many hash slots the namespace is spread")
    ] = 1
    cluster: Annotated[bool, Field(description="the URL is that of a node of a Redis Cluster")] = (
        False
    )
    deadline: Annotated[
        float, Field(gt=0, le=60, description="seconds a call may take over all its attempts")
    ] = 10.0
    wait_replicas: Annotated[
        int, Field(ge=0, le=100, description="how many replicas must have each write")
    ] = 0
    max_connections: Annotated[
        int, Field(ge=1, description="connections of the pool that from_url opens")
    ] = 50
    allow_eviction: Annotated[
        bool, Field(description="open a store on a server that may evict any key")
    ] = False
    coalesce: Annotated[
        bool,
        Field(description="asyncio: send calls that are made at the same time in one pipeline"),
    ] = True
    worker: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9_.-]{0,64}$",
            description="label in this worker's name, after host and process id",
        ),
    ] = ""
    reap_grace: Annotated[
        float,
        Field(gt=0, le=3600, description="seconds a worker has to renew an expired lease"),
    ] = 10.0
    retention: Annotated[
        float | None,
        Field(
            ge=0, lt=1e10, description="seconds that ended sessions are kept; None = until deleted"
        ),
    ] = None

    @field_validator("partitions", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.isdecimal() else value

    @field_validator("types", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return frozenset(filter(None, (one.strip() for one in value.split(","))))
        return value

    @classmethod
    def load(cls, **arguments: Any) -> Self:
        """The settings given as arguments, completed from the environment.

        Raises:
            InvalidArgumentError: a value breaks its rule; the message names the setting.
        """
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for name in cls.model_fields:
            variable = ENVIRONMENT_PREFIX + name.upper()
            if os.environ.get(variable):
                values[name], sources[name] = os.environ[variable], variable
        values.update(arguments)
        sources.update(dict.fromkeys(arguments, ""))
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise InvalidArgumentError.of(
                sources.get(name) or name, f"is not valid: {first['msg']}"
            ) from None
