"""What clients of redis-py send: every write to a socket, of blocking and of asyncio clients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis.asyncio.connection
import redis.connection


@contextmanager
def noted_sendings() -> Iterator[list[bytes]]:
    """The bytes of each round trip to a server from now on, as long as the ``with`` lasts."""
    sent: list[bytes] = []

    def noting(connection_class: Any) -> Any:
        send = connection_class.send_packed_command

        def note(connection: Any, command: Any, *args: Any, **kwargs: Any) -> Any:
            said = command if isinstance(command, bytes) else b"".join(command)
            if b"SENTINEL" not in said:
                sent.append(said)
            return send(connection, command, *args, **kwargs)

        return note

    with pytest.MonkeyPatch.context() as patch:
        for module in (redis.connection, redis.asyncio.connection):
            shown: Any = module.AbstractConnection
            patch.setattr(shown, "send_packed_command", noting(shown))
        yield sent
