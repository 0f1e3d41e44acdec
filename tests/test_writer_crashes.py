"""Writers through a server that is killed and a network that loses replies: no line is lost, none
is there twice, and all are in order.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from faults import AFTER_THE_COMMAND, Fault, FaultyWorld, seeded, shuffled

from sessionstore import AsyncSessionStore, SessionStore
from sessionstore._server import PrivateServer

OUTAGE = 3.0  # seconds
SETTINGS: dict[str, Any] = {"namespace": "writers", "buffer_limit": 0, "buffer_bytes": 0}


def test_a_server_killed_in_mid_stream_costs_no_line(own_server: PrivateServer) -> None:
    """Both kinds of writer, under a lease, writing all the time."""
    is_over = threading.Event()
    written: dict[str, int] = {}

    def write() -> None:
        with SessionStore.from_url(own_server.url, **SETTINGS) as store:
            own = store.create_session("claude", "s", "/src").id
            with store.claim(own), store.writer(own) as out:
                n = 0
                while not is_over.is_set():
                    out.write(f"{n}\n")
                    n += 1
                    time.sleep(0.0005)
            written[own] = n

    async def write_async() -> None:
        async with AsyncSessionStore.from_url(own_server.url, **SETTINGS) as store:
            own = (await store.create_session("claude", "s", "/src")).id
            async with store.claim(own), store.writer(own) as out:
                n = 0
                while not is_over.is_set():
                    await out.write(f"{n}\n")
                    n += 1
                    await asyncio.sleep(0.0005)
            written[own] = n

    threads = [
        threading.Thread(target=write),
        threading.Thread(target=lambda: asyncio.run(write_async())),
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    own_server.kill()
    time.sleep(OUTAGE)
    own_server.start()
    time.sleep(0.7)
    is_over.set()
    for thread in threads:
        thread.join()

    assert len(written) == 2
    with SessionStore.from_url(own_server.url, **SETTINGS) as store:
        for own, count in written.items():
            assert count > 1000
            assert store.get_session(own).output_buffer == tuple(map(str, range(count)))


@pytest.mark.parametrize("style", ["sync", "async"])
def test_a_network_that_loses_replies_costs_no_line(server: PrivateServer, style: str) -> None:
    world = FaultyWorld(style, server, delay=0.5)
    try:
        store = world.store(deadline=0.8, buffer_limit=0)
        own = store.create_session("claude", "s", "/src").id
        faults = [Fault.NEVER_REPLY, Fault.LOSE_REQUEST, *AFTER_THE_COMMAND]
        world.proxy.plan(shuffled(seeded(), faults, 12))
        with store.writer(own) as out:
            for n in range(60):
                out.write(f"{n}\n")
                if n % 3 == 0:
                    out.flush()
        assert world.proxy.injected.total() == len(faults)
        assert world.direct.get_session(own).output_buffer == tuple(map(str, range(60)))
    finally:
        world.close()
