"""A Redis Cluster of processes of its own: started, slots moved between nodes, nodes killed."""

from __future__ import annotations

from collections.abc import Sequence
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
    ) -> None:
        options = (
            *("--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT)),
            *("--cluster-replica-validity-factor", "0", *arguments),
        )
        self._stack = ExitStack()
        self.nodes: list[PrivateServer] = []
        try:
            for _ in range(primaries * (1 + replicas)):
                node = self._stack.enter_context(PrivateServer(program, options))
                self.nodes.append(node)
            self._form(primaries)
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """That of one node; a client learns the others from it."""
        return self.nodes[0].url

    def admin(self, node: PrivateServer) -> Any:
        """A plain client of one node; closed with the cluster."""
        client: Any = redis.Redis(port=node.port, decode_responses=True)
        self._stack.callback(client.close)
        return client

    def _form(self, primaries: int) -> None:
        clients = [self.admin(node) for node in self.nodes]
        bounds = [SLOTS * number // primaries for number in range(primaries + 1)]
        for client, first, end in zip(clients, bounds, bounds[1:], strict=False):
            client.execute_command("CLUSTER ADDSLOTSRANGE", first, end - 1)
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            clients[0].execute_command("CLUSTER MEET", "127.0.0.1", node.port)
        for client in clients:
            until(lambda: len(client.cluster("NODES")) == len(clients))  # noqa: B023
        ids = [client.execute_command("CLUSTER MYID") for client in clients]
        for number, client in enumerate(clients[primaries:]):
            primary = ids[number % primaries]
            until(lambda: self._replicate(client, primary))  # noqa: B023
        for client in clients:
            until(lambda: client.cluster("INFO")["cluster_state"] == "ok")  # noqa: B023
        for number, _ in enumerate(clients[primaries:]):
            primary = clients[number % primaries]
            until(lambda: primary.info("replication")["connected_slaves"])  # noqa: B023

    @staticmethod
    def _replicate(client: Any, primary: str) -> bool:
        with suppress(redis.ResponseError):  # it has not heard of it yet
            client.execute_command("CLUSTER REPLICATE", primary)
            return True
        return False

    def id_of(self, node: PrivateServer) -> str:
        return str(self.admin(node).execute_command("CLUSTER MYID"))

    def stop(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
