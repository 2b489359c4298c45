"""A process that forks: its connections outlive whatever the child does with what it inherited."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

_RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

#: Calls, forks, and calls again. The child drops the clients in the way that `HOW` says.
_PROGRAM = textwrap.dedent("""
    import gc, os, sys
    from mdstore.aws.http import SignedHttp
    from tests.unit.endpoint import Keys

    url, how = sys.argv[1:]
    http = SignedHttp(service="dynamodb", region="x", credentials=Keys())

    def calls():
        assert http.send(url, (), b"one by one").body == b"ok"
        with http.concurrent_calls() as concurrent_calls:
            concurrent_calls.start(1, url, (), b"at the same time")
            while concurrent_calls:
                for _, answer in concurrent_calls.completed(5):
                    assert answer.body == b"ok", answer

    calls()
    child = os.fork()
    if child == 0:
        if how == "close":
            http.close()
        elif how == "drop":
            del http
            gc.collect()
        elif how == "own":
            http = SignedHttp(service="dynamodb", region="x", credentials=Keys())
            gc.collect()
            calls()
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    calls()
""")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a certificate of `localhost` and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + signed.public_bytes(pem))
    return path


class Server:
    """A TLS server. `accepted` counts its connections, `ended` those that a peer has closed."""

    def __init__(self, certificate: Path) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://localhost:{self._listener.getsockname()[1]}/"
        self.accepted = 0
        Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with self._context.wrap_socket(connection, server_side=True) as stream:
            received = b""
            while piece := stream.recv(65_536):
                received += piece
                if received.endswith((b"one by one", b"at the same time")):
                    stream.sendall(_RESPONSE)
                    received = b""


@pytest.fixture
def server(certificate: Path) -> Iterator[Server]:
    found = Server(certificate)
    yield found
    found.close()


@pytest.mark.parametrize(("how", "more"), [("exit", 0), ("drop", 0), ("close", 0), ("own", 2)])
def test_a_forked_child_leaves_its_parents_connections(certificate: Path, server: Server, how: str, more: int) -> None:
    """The parent goes on with the two connections that it has; only a child that makes its own clients opens more."""
    subprocess.run(
        [sys.executable, "-c", _PROGRAM, server.url, how],
        env={**os.environ, "AWS_CA_BUNDLE": str(certificate)},
        timeout=60,
        check=True,
    )
    assert server.accepted == 2 + more
