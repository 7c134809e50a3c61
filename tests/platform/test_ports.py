"""Addresses of servers: whom they name, whether anyone answers, and whether one can listen there."""

import socket

import pytest

from lossworks.errors import UserError
from lossworks.ports import host_and_port, require_free_port, silence


@pytest.fixture
def listener():
    """A port of loopback that somebody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("127.0.0.1:6379", ("127.0.0.1", 6379)),
        ("ray://head:10001", ("head", 10001)),
        ("http://head:8265/", ("head", 8265)),
        ("http://head", ("head", 80)),
        ("https://head", ("head", 443)),
        ("[::1]:6379", ("::1", 6379)),
        ("auto", None),
        ("head:port", None),
        ("head:70000", None),
        ("http://[::1", None),
    ],
)
def test_whom_an_address_names(address, found):
    """Host and port, the usual ones of web addresses among them, or nobody."""
    assert host_and_port(address) == found


def test_who_listens_is_reached_and_who_does_not_is_silent(listener):
    """A reason in words, or none."""
    assert silence("127.0.0.1", listener) == ""
    assert "refused" in silence("127.0.0.1", require_free_port("127.0.0.1", 0, named="any"))


def test_a_port_is_free_or_refused_by_the_name_of_its_setting(listener):
    """One that is taken, one that is none, and one of another machine."""
    free = require_free_port("127.0.0.1", 0, named="any")

    assert require_free_port("127.0.0.1", free, named="the same") == free
    with pytest.raises(UserError, match=r"^--port: can't be listened on: Address already in use"):
        require_free_port("127.0.0.1", listener, named="--port")
    with pytest.raises(UserError, match=r"^--port: a port is between 1 and 65535"):
        require_free_port("127.0.0.1", 65536, named="--port")
    with pytest.raises(UserError, match=r"^--host: can't be listened on"):
        require_free_port("203.0.113.1", 0, named="--host")
