"""A Redis Cluster of processes of its own: started, slots moved between nodes, nodes killed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Self

import redis
from waiting import until

from sessionstore._server import PrivateServer, ServerProgram

SLOTS = 16384
#: Milliseconds in which a node that does not answer is found to be away.
NODE_TIMEOUT = 1000


class PrivateCluster:
    """Primaries that share all slots evenly, each with so many replicas."""

    def __init__(
        self,
        program: ServerProgram,
        *,
        primaries: int = 3,
        replicas: int = 0,
        arguments: Sequence[str] = (),
        started: Callable[[ServerProgram, Sequence[str]], PrivateServer] = PrivateServer,
        met_at: Callable[[PrivateServer], int] = lambda node: node.port,
    ) -> None:
        options = (
            *("--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT)),
            *("--repl-diskless-sync-delay", "0", *arguments),
        )
        self._stack = ExitStack()
        self.nodes: list[PrivateServer] = []
        self._admins: list[Any] = []  # a plain client of each node
        try:
            for _ in range(primaries * (1 + replicas)):
                node = self._stack.enter_context(started(program, options))
                self.nodes.append(node)
                client: Any = redis.Redis(port=node.port, decode_responses=True)
                self._stack.callback(client.close)
                self._admins.append(client)
            self._form(primaries, met_at)
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """That of one node; a client learns the others from it."""
        return self.nodes[0].url

    def admin(self, node: PrivateServer) -> Any:
        """A plain client of one node."""
        return self._admins[self.nodes.index(node)]

    def _form(self, primaries: int, met_at: Callable[[PrivateServer], int]) -> None:
        clients = self._admins
        bounds = [SLOTS * number // primaries for number in range(primaries + 1)]
        for client, first, end in zip(clients, bounds, bounds[1:], strict=False):
            client.execute_command("CLUSTER ADDSLOTSRANGE", first, end - 1)
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            clients[0].execute_command("CLUSTER MEET", "127.0.0.1", met_at(node))
        for client in clients:
            until(lambda: len(client.cluster("NODES")) == len(clients))  # noqa: B023
        ids = [client.execute_command("CLUSTER MYID") for client in clients]
        for number, client in enumerate(clients[primaries:]):
            primary = ids[number % primaries]
            until(lambda: self._replicate(client, primary))  # noqa: B023
        for client in clients:
            until(lambda: client.cluster("INFO")["cluster_state"] == "ok")  # noqa: B023
        for client in clients[primaries:]:
            until(lambda: self._is_in_step(client))  # noqa: B023

    @staticmethod
    def _is_in_step(client: Any) -> bool:
        return client.info("replication").get("master_link_status") == "up"

    @staticmethod
    def _replicate(client: Any, primary: str) -> bool:
        with suppress(redis.ResponseError):  # it has not heard of it yet
            client.execute_command("CLUSTER REPLICATE", primary)
            return True
        return False

    def _owners(self, slot: int) -> list[int]:
        """The ports of the nodes that serve a slot, as each node has it; the first node's first."""
        ports: dict[int, None] = {}
        for client in self._admins:
            with suppress(redis.ConnectionError):
                for first, last, (_, port, *_), *_ in client.execute_command("CLUSTER SLOTS"):
                    if first <= slot <= last:
                        ports[port] = None
        return list(ports)

    def owner_of(self, slot: int) -> PrivateServer:
        """The node that serves a slot, as the first that answers has it."""
        port = self._owners(slot)[0]
        return next(node for node in self.nodes if node.port == port)

    def next_to(self, node: PrivateServer) -> PrivateServer:
        """Another primary; in turn, all of them."""
        primaries = [one for one, client in zip(self.nodes, self._admins, strict=True)
                     if client.role()[0] == "master"]  # fmt: skip
        return primaries[(primaries.index(node) + 1) % len(primaries)]

    def settle(self) -> None:
        """Wait until all nodes agree whose each slot is, and replicas have what primaries have.

        A replica that has not heard of a move is promoted with a slot that is another's. And two
        nodes that give themselves the same epoch, each for a slot of its own, may disagree on.
        """
        until(lambda: len({self._view_of(client) for client in self._admins}) == 1)
        reached = [client.info("replication")["master_repl_offset"] for client in self._admins]
        for client, offset in zip(self._admins, reached, strict=True):
            until(lambda: self._are_at(client, offset))  # noqa: B023

    @staticmethod
    def _view_of(client: Any) -> tuple[Any, ...]:
        slots = client.execute_command("CLUSTER SLOTS")
        owners = sorted((first, last, port) for first, last, (_, port, *_), *_ in slots)
        return (client.cluster("INFO")["cluster_current_epoch"], *owners)

    @staticmethod
    def _are_at(client: Any, offset: int) -> bool:
        found = client.info("replication")
        replicas = [value for name, value in found.items() if re.fullmatch(r"slave\d+", name)]
        return all(int(replica["offset"]) >= offset for replica in replicas)

    def fail_over(self, slot: int) -> PrivateServer:
        """Kill the primary of a slot, and wait until a replica has taken its place."""
        self.settle()
        node = self.owner_of(slot)
        node.kill()
        until(lambda: self.owner_of(slot) is not node)
        return node

    def bring_back(self, node: PrivateServer) -> None:
        """Start a node again, which becomes a replica of what took its place."""
        node.start()
        until(lambda: self._is_in_step(self.admin(node)))
        self.settle()

    def move(
        self, slot: int, to: PrivateServer, hold: Callable[[int], object] = lambda _: None
    ) -> None:
        """Move a slot key by key, as ``redis-cli --cluster reshard`` does.

        ``hold`` is called before the first key is moved, when half of them are, and after the last,
        with how many have been.
        """
        self.settle()
        source, target = self.admin(self.owner_of(slot)), self.admin(to)
        target_id = target.execute_command("CLUSTER MYID")
        target.cluster("SETSLOT", slot, "IMPORTING", source.execute_command("CLUSTER MYID"))
        source.cluster("SETSLOT", slot, "MIGRATING", target_id)
        hold(0)
        half = int(source.cluster("COUNTKEYSINSLOT", slot)) // 2
        moved = 0
        while keys := source.execute_command("CLUSTER GETKEYSINSLOT", slot, 10):
            source.execute_command("MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS", *keys)
            if moved <= half < moved + len(keys):
                hold(moved + len(keys))
            moved += len(keys)
        hold(moved)
        for client in (target, source, *self._admins):
            with suppress(redis.RedisError):  # a replica, or a node that is away
                client.cluster("SETSLOT", slot, "NODE", target_id)

    def remove(self, node: PrivateServer) -> None:
        """Move a node's slots to another, and forget it, as ``redis-cli --cluster del-node`` does.

        It stays up, and serves no slot.
        """
        leaving, other = self.admin(node), self.next_to(node)
        own_id = leaving.execute_command("CLUSTER MYID")
        other_id = self.admin(other).execute_command("CLUSTER MYID")
        leaving.config_set("cluster-allow-replica-migration", "no")  # stays a primary to the end
        slots = self._slots_of(node)
        for slot, keys in zip(slots, self._asked(leaving, "COUNTKEYSINSLOT", slots), strict=True):
            if keys:
                self.move(slot, other)
        self.settle()
        slots = self._slots_of(node)
        for client in (self.admin(other), *self._admins):
            self._asked(client, "SETSLOT", slots, "NODE", other_id)
        for client in self._admins:
            if client is not leaving:
                client.execute_command("CLUSTER FORGET", own_id)
        leaving.execute_command("CLUSTER RESET", "SOFT")

    def _slots_of(self, node: PrivateServer) -> list[int]:
        return [
            slot
            for first, last, (_, port, *_), *_ in self.admin(node).execute_command("CLUSTER SLOTS")
            for slot in range(first, last + 1)
            if port == node.port
        ]

    @staticmethod
    def _asked(client: Any, command: str, slots: Sequence[int], *words: str) -> list[Any]:
        with client.pipeline(transaction=False) as pipe:
            for slot in slots:
                pipe.execute_command(f"CLUSTER {command}", slot, *words)
            return list(pipe.execute())

    def move_whole(self, slot: int, to: PrivateServer) -> None:
        """Move a slot by atomic slot migration, as Valkey 9 does it."""
        source, target = self.owner_of(slot), self.admin(to).execute_command("CLUSTER MYID")
        range_of_one = ("SLOTSRANGE", slot, slot)
        self.admin(source).execute_command("CLUSTER MIGRATESLOTS", *range_of_one, "NODE", target)
        until(lambda: self._owners(slot) == [to.port])

    def count_of(self, error: str) -> int:
        """How often the nodes have answered with an error since they were started."""
        stats = [client.info("errorstats") for client in self._admins]
        return sum(int(one.get(f"errorstat_{error}", {}).get("count", 0)) for one in stats)

    def stop(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
