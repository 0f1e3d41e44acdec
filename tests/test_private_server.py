"""The private server of the tests and of the demo."""

from __future__ import annotations

import socket

import pytest
import redis
from conftest import PROGRAMS

from sessionstore import _server
from sessionstore._server import PrivateServer, ServerNotFoundError, ServerProgram


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> ServerProgram:
    return PROGRAMS[request.param]


def test_a_port_that_is_taken_meanwhile_is_no_failure(
    program: ServerProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = _server._free_port()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = iter([taken.getsockname()[1], free])
        monkeypatch.setattr(_server, "_free_port", lambda: next(ports))
        with PrivateServer(program) as server:
            assert server.port == free
            with redis.Redis(port=free) as client:
                assert client.ping()


def test_what_does_not_start_says_why(program: ServerProgram) -> None:
    with pytest.raises(ServerNotFoundError, match="no-such-option"):
        PrivateServer(program, ("--no-such-option", "1"))
