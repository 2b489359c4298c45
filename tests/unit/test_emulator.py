"""Ports for processes that are started: what `free_port` hands out stays free until its server listens."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

from mdstore.local.emulator import check_port, free_port


def test_no_port_is_given_out_twice() -> None:
    """Of 600 ports that are asked for side by side none is given twice, though nobody listens on any of them yet.

    Ports that were only probed would meet: 600 of the 14,000 that the system chooses from make some 13 pairs.
    """
    with ThreadPoolExecutor(4) as pool:
        ports = list(pool.map(lambda _: free_port(), range(600)))

    assert len(set(ports)) == len(ports)


def test_a_server_can_listen_on_a_free_port() -> None:
    """The port refuses connections until a server asks for it by its number, and then it is the server's."""
    port = free_port()
    with socket.socket() as caller:
        assert caller.connect_ex(("127.0.0.1", port)) != 0
    check_port(port, name="port")
    with socket.create_server(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)) as connection:
        assert connection.getpeername() == ("127.0.0.1", port)
