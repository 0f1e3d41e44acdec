"""Redis Cluster: slots that move, nodes that die, and workers who notice neither.

What a store does on a healthy cluster is in the contract tests, which run on one too.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import redis
from clusters import PrivateCluster
from conftest import CLUSTER, PROGRAMS, STYLES, World
from programme import Attack, controls, proves
from rawkeys import RawKeys, crc16
from test_contract_batch import batch_of
from waiting import until
from workers import Appending, Work, at_work

from sessionstore import InvalidArgumentError, OutcomeUnknownError, SessionStore
from sessionstore._server import PrivateServer

#: redis-py's asyncio client drops a node that it has found anew with its connections open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """What it has dropped is found in the test that let it, not after the last."""
    yield
    gc.collect()


of_each_style = pytest.mark.parametrize(
    "kind", [{"processes": 4}, {"tasks": 4}], ids=["sync", "async"]
)


@pytest.fixture(params=PROGRAMS)
def cluster_program(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cluster(cluster_program: str) -> Iterator[PrivateCluster]:
    """Three primaries, for this test alone."""
    with PrivateCluster(PROGRAMS[cluster_program]) as started:
        yield started


@pytest.fixture
def replicated(cluster_program: str) -> Iterator[PrivateCluster]:
    """Three primaries with a replica each."""
    options = ("--appendonly", "yes", "--appendfsync", "no")
    with PrivateCluster(PROGRAMS[cluster_program], replicas=1, arguments=options) as started:
        yield started


def test_who_takes_a_node_for_a_single_server_is_told(running: Callable[[str], Any]) -> None:
    url = running(CLUSTER).url  # of the node that has the first slots
    elsewhere = next(name for name in map(str, range(100)) if slot_of(f"{{{name}}}") > 6000)
    with (
        SessionStore.from_url(url, namespace=elsewhere) as store,
        pytest.raises(InvalidArgumentError, match=r"^cluster must be true: this server is a node"),
    ):
        store.get_metrics()


def slot_of(prefix: str) -> int:
    """The slot of a partition: that of what stands between its braces."""
    return crc16(prefix[1 : prefix.index("}")]) % 16384


def slot_of_session(work: Work, session_id: str) -> int:
    client: Any = None
    return slot_of(RawKeys(client, work.namespace, 16).prefix_of(session_id))


def slots_of(namespace: str, partitions: int) -> list[int]:
    client: Any = None
    return [slot_of(prefix) for prefix in RawKeys(client, namespace, partitions).prefixes]


def move_in_turn(
    cluster: PrivateCluster, slots: list[int], times: int, pause: float = 0.0
) -> list[float]:
    """Move slots to the next node each, one after another; how long each took, in seconds."""
    took: list[float] = []
    for number in range(times):
        slot = slots[number % len(slots)]
        target = cluster.next_to(cluster.owner_of(slot))
        began = time.monotonic()
        cluster.move(slot, target, hold=lambda _: time.sleep(pause))
        took.append(time.monotonic() - began)
    return took


@of_each_style
@proves("slots move", ordinary=3, full=40)
def test_slots_move_and_no_worker_notices(
    cluster: PrivateCluster, kind: dict[str, int], attack: Attack
) -> None:
    with at_work(cluster.url, cluster=True, partitions=16, **kind) as work:
        work.wait_for_turns(2)
        took = move_in_turn(cluster, slots_of(work.namespace, 16), attack.size, pause=0.1)
        work.wait_for_turns(2)
    attack.tell(
        injected=len(took),
        wrong=work.broken(),
        **work.seen(),
    )
    print(f"the longest move took {max(took):.2f} s")


@pytest.fixture
def atomic() -> Iterator[PrivateCluster]:
    """Three primaries that move slots as a whole."""
    with PrivateCluster(PROGRAMS["valkey"]) as started:
        yield started


def test_where_slots_move_as_a_whole_no_call_is_held_up(atomic: PrivateCluster) -> None:
    """No node has to answer TRYAGAIN, as all do that move a slot key by key."""
    with at_work(atomic.url, cluster=True, partitions=16, tasks=4) as work:
        slots = slots_of(work.namespace, 16)
        for slot in slots:
            work.wait_for_turns(1)
            atomic.move_whole(slot, atomic.next_to(atomic.owner_of(slot)))
        work.wait_for_turns(1)
        assert atomic.count_of("TRYAGAIN") == 0
        move_in_turn(atomic, [slot_of_session(work, work.lives[0].session_id)], 2, pause=0.1)
        assert atomic.count_of("TRYAGAIN") > 0
    assert work.broken() == 0


@controls("slots move", ordinary=3)
def test_a_script_without_a_guard_fails_when_half_its_keys_have_moved(
    cluster: PrivateCluster, attack: Attack
) -> None:
    """All keys that it declares are there still; the index that the session leaves is not."""
    (slot,) = slots_of("agents", 1)
    failed = 0
    with SessionStore.from_url(cluster.url, cluster=True) as store:
        store._on_cluster = False
        held, ended, *others = [
            store.create_session("claude", "s", "/src").id for _ in range(2 + attack.size)
        ]
        store.update_status(ended, "error")  # so that all indexes are there
        with store.claim(held):
            for session_id in others:
                source = cluster.owner_of(slot)
                target = cluster.next_to(source)

                def write(moved: int) -> None:
                    nonlocal failed
                    if moved:
                        return
                    move_alone = ("MIGRATE", "127.0.0.1", target.port)  # noqa: B023
                    left = "{agents}:sessions:status:active"
                    cluster.admin(source).execute_command(*move_alone, left, 0, 5000)  # noqa: B023
                    with suppress(redis.RedisError):
                        store.update_status(session_id, "error")  # noqa: B023
                        return
                    failed += 1

                cluster.move(slot, target, hold=write)
    attack.tell(injected=len(others), wrong=failed)


@of_each_style
@proves("cluster failover", ordinary=1, full=5)
def test_slots_move_a_primary_dies_and_its_replica_goes_on(
    replicated: PrivateCluster, kind: dict[str, int], attack: Attack
) -> None:
    """Nobody gets an error, nothing is twice; lost is only what was not yet with the replica."""
    moves = 8 if attack.in_full else 2
    settings: dict[str, Any] = {"cluster": True, "partitions": 16, "life": Appending}
    failovers: list[tuple[float, float]] = []
    with at_work(replicated.url, **settings, **kind) as work:
        slots = slots_of(work.namespace, 16)
        for number in range(attack.size):
            work.wait_for_turns(50)
            move_in_turn(replicated, slots, moves)
            began = time.monotonic()
            killed = replicated.fail_over(slots[number])
            failovers.append((began - 1.0, time.monotonic()))
            work.wait_for_turns(50)
            replicated.bring_back(killed)
        work.wait_for_turns(50)
    wrong = work.broken(failovers=failovers)
    lost = sum(life.lost_in_failovers for life in work.lives if isinstance(life, Appending))
    attack.tell(
        injected=len(failovers),
        wrong=wrong,
        **work.seen(),
        slots_moved=moves * len(failovers),
        lost_in_failovers=lost,
    )
    print(f"the longest failover took {max(end - begin - 1.0 for begin, end in failovers):.2f} s")


@controls("cluster failover", ordinary=1)
def test_without_a_replica_a_dead_primary_takes_its_sessions_with_it(
    cluster: PrivateCluster, attack: Attack
) -> None:
    settings: dict[str, Any] = {"cluster": True, "partitions": 16, "life": Appending}
    with at_work(cluster.url, threads=4, deadline=2.0, **settings) as work:
        work.wait_for_turns(20)
        killed = cluster.owner_of(slot_of_session(work, work.lives[0].session_id))
        killed.kill()
        until(lambda: work.lives[0].wrong_answers)
        killed.start()
        work.wait_for_turns(1)
    attack.tell(injected=attack.size, wrong=work.broken(), **work.seen())


@pytest.fixture
def without_a_part(cluster: PrivateCluster) -> PrivateCluster:
    """Its other nodes go on when one of them is away."""
    for node in cluster.nodes:
        cluster.admin(node).config_set("cluster-require-full-coverage", "no")
    return cluster


@contextmanager
def opened(style: str, cluster: PrivateCluster) -> Iterator[World]:
    world = World(style, CLUSTER, cluster.url, 16)
    try:
        yield world
    finally:
        world.close()


def of_each_node(store: Any, cluster: PrivateCluster) -> dict[PrivateServer, str]:
    """A new session on each node."""
    found: dict[PrivateServer, str] = {}
    for number in itertools.count():
        if len(found) == len(cluster.nodes):
            return found
        made = store.create_session("claude", f"service-{number}", "/src").id
        prefix = store.keyspace.of_session(made).prefix
        found[cluster.owner_of(slot_of(prefix))] = made
    raise AssertionError


@pytest.mark.parametrize("style", STYLES)
def test_leases_are_renewed_while_another_partition_is_away(
    without_a_part: PrivateCluster, style: str
) -> None:
    """Their time to live is shorter than a call to the partition that is away takes."""
    with opened(style, without_a_part) as world:
        store = world.store(deadline=20.0)
        sessions = of_each_node(store, without_a_part)
        leases = [store.claim(session_id, ttl=1.5) for session_id in sessions.values()]
        away = without_a_part.nodes[-1]
        away.kill()
        world.sleep(4.0)
        left = {node: lease.expires_in for node, lease in zip(sessions, leases, strict=True)}
        away.start()  # without its data
        world.until(lambda: [lease.lost for lease in leases] == [node is away for node in sessions])
    assert min(seconds for node, seconds in left.items() if node is not away) > 0
    assert left[away] < 0


@pytest.mark.parametrize("style", STYLES)
def test_what_a_batch_has_for_other_nodes_is_carried_out(
    without_a_part: PrivateCluster, style: str
) -> None:
    with opened(style, without_a_part) as world:
        store = world.store(deadline=2.0)
        sessions = of_each_node(store, without_a_part)
        away = without_a_part.nodes[-1]
        away.kill()
        with batch_of(world, store) as batch:
            outcomes = {
                node: batch.add_output(session_id, "line") for node, session_id in sessions.items()
            }
        failed = {node for node, outcome in outcomes.items() if outcome.error is not None}
        away.start()
        assert failed == {away}
        assert isinstance(outcomes[away].error, (redis.ConnectionError, OutcomeUnknownError))


@pytest.mark.parametrize("style", STYLES)
def test_sessions_are_reaped_while_another_partition_is_away(
    without_a_part: PrivateCluster, style: str
) -> None:
    with opened(style, without_a_part) as world:
        store = world.store(deadline=1.0, reap_grace=0.5)
        sessions = of_each_node(store, without_a_part)
        for session_id in sessions.values():
            store.claim(session_id, ttl=0.1).abandon()
        away = without_a_part.owner_of(slot_of(f"{{{world.namespace}}}"))  # what meta is on
        away.kill()
        world.sleep(0.2)
        for _ in range(2):  # marked, and ended
            with pytest.raises((redis.ConnectionError, OutcomeUnknownError)):
                store.reap()
            world.sleep(0.5)
        ended = [
            store.get_session(session_id).status
            for node, session_id in sessions.items()
            if node is not away
        ]
        away.start()
        assert ended == ["error", "error"]


def calls_of(world: World, session_id: str, store: Any) -> dict[str, Callable[[], Any]]:
    """A write of one session by itself, and one in a batch."""

    def in_a_batch() -> Any:
        with batch_of(world, store) as batch:
            outcome = batch.add_output(session_id, "line")
        return outcome.result()

    return {"call": lambda: store.add_output(session_id, "line"), "batch": in_a_batch}


@pytest.mark.parametrize("by", ["call", "batch"])
@pytest.mark.parametrize("style", STYLES)
def test_a_node_that_has_left_the_cluster_is_left(
    cluster: PrivateCluster, style: str, by: str
) -> None:
    """It stays up, and says of all slots that nobody serves them."""
    with opened(style, cluster) as world:
        store = world.store(deadline=5.0)
        node, session_id = list(of_each_node(store, cluster).items())[-1]
        cluster.remove(node)
        assert calls_of(world, session_id, store)[by]() == 1
        world.redis.nodes_manager.initialize()  # the test's own client


@pytest.mark.parametrize("by", ["call", "batch"])
@pytest.mark.parametrize("style", STYLES)
def test_a_slot_that_nobody_served_is_found_once_somebody_does(
    without_a_part: PrivateCluster, style: str, by: str
) -> None:
    cluster = without_a_part
    with opened(style, cluster) as world:
        away = cluster.owner_of(slot_of(f"{{{world.namespace}}}"))  # what meta is on
        sessions = of_each_node(world.store(), cluster)
        node, session_id = next(one for one in sessions.items() if one[0] is not away)
        slot = slot_of(world.store().keyspace.of_session(session_id).prefix)
        for each in cluster.nodes:
            cluster.admin(each).execute_command("CLUSTER DELSLOTS", slot)
        store = world.store(deadline=1.0)  # learns the topology now
        call = calls_of(world, session_id, store)[by]
        with pytest.raises(redis.RedisError) as caught:
            call()
        assert not isinstance(caught.value, OutcomeUnknownError)
        cluster.admin(node).execute_command("CLUSTER ADDSLOTS", slot)
        until(lambda: cluster.owner_of(slot) is node)
        assert world.until(lambda: succeeded(call))


def succeeded(call: Callable[[], Any]) -> bool:
    with suppress(redis.RedisError):
        call()
        return True
    return False


def test_a_call_that_is_interrupted_gives_its_connection_back(
    cluster: PrivateCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SessionStore.from_url(cluster.url, cluster=True, max_connections=1) as store:
        session_id = store.create_session("claude", "service", "/src").id
        for step in ("send_packed_command", "read_response"):
            with monkeypatch.context() as broken:
                broken.setattr(redis.Connection, step, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    store.add_output(session_id, "line")
            assert store.add_output(session_id, "line") >= 1


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt
