"""docker-compose.yml, without Docker: its services' own commands, run here on other ports.

What only Docker does is not shown: images, volumes, the order in which services start.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from waiting import until

from sessionstore import SessionStore

ROOT = Path(__file__).parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
PASSWORD = "0123456789abcdef"
needs_redis = pytest.mark.skipif(
    not os.environ.get("CI") and not (shutil.which("redis-server") and shutil.which("redis-cli")),
    reason="its commands are those of Redis: redis-server and redis-cli",
)


def in_profile(profile: str | None) -> dict[str, Any]:
    wanted = [profile] if profile else None
    return {name: one for name, one in SERVICES.items() if one.get("profiles") == wanted}


class Services:
    """The services of a profile as processes, each with directories of its own."""

    def __init__(self, profile: str | None, folder: Path, first_port: int) -> None:
        self.services = in_profile(profile)
        self._folder = folder
        self._ports: dict[str, str] = {}
        ports = sorted({port for one in self.services.values() for port in ports_in(one)})
        for number, port in enumerate(ports):
            self._ports[port] = str(first_port + number)
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def port(self, named: int) -> int:
        return int(self._ports[str(named)])

    def _here(self, name: str, text: str) -> str:
        """Text as a shell of the service would get it, with ports and places of this machine."""
        for port, own in self._ports.items():
            text = re.sub(rf"\b{port}\b", own, text)
        if name == "redis":  # whose port only Docker maps
            text = text.replace("redis-cli ", f"redis-cli -p {self.port(6379)} ")
            own = f"--port {self.port(6379)} --appendonly"
            text = text.replace("--appendonly", own)
        place = self._folder / name
        return re.sub(r"/(data|tmp)\b", rf"{place}/\1", text).replace("$$", "$")

    def _environment(self, name: str) -> dict[str, str]:
        stated = {
            key: self._here(name, str(value))
            for key, value in self.services[name].get("environment", {}).items()
        }
        return {**os.environ, **stated, "REDIS_PASSWORD": PASSWORD}

    def start(self, *names: str) -> None:
        for name in names or self.services:
            for folder in ("data", "tmp"):
                (self._folder / name / folder).mkdir(parents=True, exist_ok=True)
            command = [self._here(name, part) for part in self.services[name]["command"]]
            self._running[name] = subprocess.Popen(
                command,
                cwd=self._folder / name / "data",
                env=self._environment(name),
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )

    def is_healthy(self, name: str) -> bool:
        kind, test = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD-SHELL"
        check = subprocess.run(
            ["sh", "-c", self._here(name, test)],
            env=self._environment(name),
            capture_output=True,
            check=False,
        )
        return check.returncode == 0

    def wait_until_healthy(self, *names: str) -> None:
        until(lambda: all(self.is_healthy(name) for name in names or self.services))

    def stop(self, *names: str) -> None:
        for name in names or tuple(self._running):
            process = self._running.pop(name)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(10)


def ports_in(service: Any) -> set[str]:
    stated = " ".join(
        [*service["command"], str(service.get("environment")), str(service.get("ports"))]
    )
    return set(re.findall(r"\b(?:6379|638[01]|2637[9]|2638[01]|700[0-5])\b", stated))


@pytest.fixture
def ports() -> int:
    """The first of twelve ports that are free, and so are those of the cluster's bus."""
    for first in range(21_000, 25_000, 50):
        with ExitStack() as stack, suppress(OSError):
            for number in range(12):
                for port in (first + number, first + number + 10_000):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise AssertionError("no free ports")


@pytest.fixture
def services(request: pytest.FixtureRequest, tmp_path: Path, ports: int) -> Iterator[Services]:
    one = Services(request.param, tmp_path, ports)
    yield one
    one.stop()


def assert_safe(port: int) -> None:
    """It asks for a password, evicts nothing and keeps what it has."""
    with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    with redis.Redis(port=port, password=PASSWORD, decode_responses=True) as client:
        settings: Any = client.config_get("*")
        assert (settings["maxmemory-policy"], settings["appendonly"]) == ("noeviction", "yes")


def test_one_server_is_all_that_starts_without_a_profile() -> None:
    assert list(in_profile(None)) == ["redis"]
    assert SERVICES["redis"]["ports"] == ["127.0.0.1:${REDIS_PORT:-6379}:6379"]


def test_every_service_listens_on_loopback_alone_and_has_a_health_check() -> None:
    for name, service in SERVICES.items():
        command = " ".join(service["command"])
        assert "healthcheck" in service, name
        if "redis-server" in command and name != "redis":
            assert service["network_mode"] == "host"
            assert "--bind 127.0.0.1 " in command, name
        used = {volume.partition(":")[0] for volume in service.get("volumes", ())}
        assert used <= COMPOSE["volumes"].keys()


@needs_redis
@pytest.mark.parametrize("services", [None], indirect=True)
def test_the_single_server(services: Services) -> None:
    services.start()
    services.wait_until_healthy()
    assert_safe(services.port(6379))
    services.stop()
    assert not services.is_healthy("redis")


@needs_redis
@pytest.mark.parametrize("services", ["sentinel"], indirect=True)
def test_the_pair_fails_over_and_is_found_again_after_a_restart(services: Services) -> None:
    sentinels = ",".join(f"127.0.0.1:{services.port(port)}" for port in (26379, 26380, 26381))
    url = f"redis+sentinel://:{PASSWORD}@{sentinels}/sessions?sentinel_password={PASSWORD}"
    services.start()
    services.wait_until_healthy()
    for port in (6380, 6381):
        assert_safe(services.port(port))
    stranger = redis.Redis(port=services.port(26379))
    with stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    with SessionStore.from_url(url, deadline=40.0) as store:
        session_id = store.create_session("claude", "service", "/src").id
        store.add_output(session_id, "before")
        with redis.Redis(port=services.port(6381), password=PASSWORD) as replica:
            until(lambda: replica.exists(f"{{agents}}:session:{session_id}:output"))
        services.stop("pair-0")
        assert store.add_output(session_id, "after") == 2
    services.stop()
    services.start()
    services.wait_until_healthy()
    with SessionStore.from_url(url, deadline=40.0) as store:
        assert store.get_session(session_id).output_buffer == ("before", "after")


@needs_redis
@pytest.mark.parametrize("services", ["cluster"], indirect=True)
def test_the_cluster_is_made_once(services: Services) -> None:
    nodes = [name for name in services.services if name != "cluster-ready"]
    services.start(*nodes)
    services.wait_until_healthy(*nodes)
    services.start("cluster-ready")
    services.wait_until_healthy("cluster-ready")
    first = services.port(7000)
    assert_safe(first)
    with SessionStore.from_url(
        f"redis://:{PASSWORD}@127.0.0.1:{first}", cluster=True, partitions=16, deadline=40.0
    ) as store:
        for number in range(20):
            store.create_session("claude", f"service-{number}", "/src")
    with redis.Redis(port=first, password=PASSWORD, decode_responses=True) as client:
        roles = [node["flags"].replace("myself,", "") for node in client.cluster("NODES").values()]
        assert sorted(roles) == ["master"] * 3 + ["slave"] * 3
    time.sleep(1.1)  # what everysec keeps
    services.stop()
    services.start()
    services.wait_until_healthy()
    with SessionStore.from_url(
        f"redis://:{PASSWORD}@127.0.0.1:{first}", cluster=True, partitions=16, deadline=40.0
    ) as store:
        assert store.get_metrics().total_sessions == 20
