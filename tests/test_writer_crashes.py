"""Writers through a server that is killed and a network that loses replies: no line is lost, none
is there twice, and all are in order.
"""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import closing
from typing import Any

import pytest
from faults import FaultyWorld, astray, counted, seeded, shuffled, weather
from programme import Attack, proves

from sessionstore import AsyncSessionStore, SessionStore
from sessionstore._server import PrivateServer

OUTAGE = 3.0  # seconds
SETTINGS: dict[str, Any] = {"namespace": "writers", "buffer_limit": 0, "buffer_bytes": 0}


@proves("server killed", ordinary=1, full=10)
def test_a_server_killed_in_mid_stream_costs_no_line(
    own_server: PrivateServer, attack: Attack
) -> None:
    """Both kinds of writer, under a lease, writing all the time."""
    rng = seeded()
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
    for kill in range(attack.size):
        time.sleep(0.5 if kill == 0 else rng.uniform(0.1, 1.0))
        own_server.kill()
        time.sleep(OUTAGE if kill == 0 else rng.uniform(0.0, 1.0))
        own_server.start()
    time.sleep(0.7)
    is_over.set()
    for thread in threads:
        thread.join()

    assert len(written) == 2
    wrong = 0
    with SessionStore.from_url(own_server.url, **SETTINGS) as store:
        for own, count in written.items():
            assert count > 1000
            wrong += astray(store.get_session(own).output_buffer, [str(n) for n in range(count)])
    attack.tell(injected=attack.size, wrong=wrong, acknowledged_lines=sum(written.values()))


@pytest.mark.parametrize("style", ["sync", "async"])
@proves("bad network", ordinary=6, full=150)
def test_a_network_that_loses_replies_costs_no_line(
    server: PrivateServer, style: str, attack: Attack
) -> None:
    """All that a call's deadline cannot ride out is repeated by the writer."""
    rng = seeded()
    lines = [str(n) for n in range(30 * attack.size)]
    with closing(FaultyWorld(style, server, delay=0.3)) as world:
        store = world.store(deadline=0.8, buffer_limit=0)
        own = store.create_session("claude", "s", "/src").id
        # Each flush is two sendings at least, of which the one is harmed, or the other.
        world.proxy.plan(shuffled(rng, weather(rng, attack.size, waits=0.3), 2 * attack.size))
        with store.writer(own) as out:
            for number, line in enumerate(lines):
                out.write(f"{line}\n")
                if number % 10 == 0:
                    out.flush()
        stored = world.redis.lrange(f"{world.session(own)}:output", 0, -1)
        attack.tell(
            injected=world.proxy.injected.total(),
            wrong=astray(stored, lines),
            lines=len(lines),
            **counted(world.proxy.injected),
        )
