"""The embedded AWS: runs the emulator ministack as a child process.

The emulator listens only on the loopback address. It keeps its state in memory. If it has a data directory, it saves the state
there every few seconds and on a clean stop (`local.snapshots`).
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from mdstore.errors import ConfigurationError, MdstoreError


class _Timeouts(NamedTuple):
    """Seconds that a start and a stop may take."""

    start: float
    stop: float


_IN_MEMORY, _WITH_DATA_DIR = (
    _Timeouts(30.0, 10.0),
    _Timeouts(300.0, 120.0),
)  # a large state takes time to read and write


class EmbeddedAws:
    """One ministack process. Use it as a context manager; stopping twice is safe."""

    def __init__(
        self,
        *,
        port: int,
        data_dir: Path | None = None,
        log: Path | None = None,
        module: str = "mdstore.local.fast_ministack",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.port = port
        self._data_dir = data_dir
        self._timeouts = _IN_MEMORY if data_dir is None else _WITH_DATA_DIR
        self._log = log
        self._module = module
        self._sleep = sleep
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The endpoint URL of all services."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The emulator's process id. Raises `MdstoreError` if it is not running."""
        if self._process is None:
            raise MdstoreError("the embedded AWS is not running")
        return self._process.pid

    def start(self) -> Self:
        """Start the emulator, and return when it is healthy.

        Raises `ConfigurationError` if ministack is not installed or the port is taken, and `MdstoreError` if the emulator exits
        or does not become healthy in time.
        """
        if importlib.util.find_spec("ministack") is None:
            raise ConfigurationError(
                key="profile", value="local", expected='the extra "local": pip install "mdstore[local]"'
            )
        check_port(self.port, name="port")
        environ = {
            **os.environ,
            "BIND_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(self.port),
            "MINISTACK_HOST": "127.0.0.1",
            "IOT_MTLS_ENABLED": "0",
            "SFTP_ENABLED": "0",
            "LOG_LEVEL": "WARNING",
        }
        command = [sys.executable, "-m", self._module]
        if self._data_dir is not None:
            environ |= {"S3_PERSIST": "1", "S3_DATA_DIR": str(self._data_dir / "s3")}
            command = [sys.executable, "-m", "mdstore.local.snapshots", str(self._data_dir / "snapshots")]
        output = self._log.open("ab") if self._log else subprocess.DEVNULL
        try:
            # In a session of its own, the emulator gets no Ctrl-C. The parent gets it, and stops its children in order.
            self._process = subprocess.Popen(command, env=environ, stdout=output, stderr=output, start_new_session=True)
        finally:
            if not isinstance(output, int):
                output.close()
        self._wait_until_healthy(self._process)
        return self

    def memory(self) -> int:
        """Return the bytes of memory that the emulator takes now. Raises `MdstoreError` if it is not running."""
        statm = Path(f"/proc/{self.pid}/statm")
        if statm.exists():
            return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        command = ["/bin/ps", "-o", "rss=", "-p", str(self.pid)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(found.stdout) * 1024

    def poll(self) -> int | None:
        """Return the emulator's exit code if it was started and has exited by itself."""
        return self._process.poll() if self._process else None

    def stop(self) -> None:
        """Stop the emulator. If it has a data directory, it saves its state now."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(self._timeouts.stop)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        timeout = self._timeouts.start
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise MdstoreError(
                    f"the embedded AWS exited during its start with code {process.returncode}; its log: {self._log}"
                )
            try:
                with urllib.request.urlopen(f"{self.url}/_ministack/health", timeout=2):  # noqa: S310  our own child
                    return
            except (urllib.error.URLError, OSError):
                self._sleep(0.05)
        self.stop()
        raise MdstoreError(f"the embedded AWS did not become healthy within {timeout:.0f} s; its log: {self._log}")


def check_port(port: int, *, name: str) -> None:
    """Raise `ConfigurationError` if `port` on 127.0.0.1 is taken. The message names the option that chooses another."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigurationError(
                key=name,
                value=port,
                expected=f"a free port on 127.0.0.1 ({error.strerror}): stop the process that listens there (another"
                f" `mdstore up`?), or choose another port with --{name.replace('_', '-')}",
            ) from error


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free now, and that the system assigns to no other process for a minute.

    A connection to the port is closed on the port's side first. The system remembers such a connection for a minute
    (TIME_WAIT), and until then neither picks the port by itself nor refuses it to a server that asks for it by number with
    SO_REUSEADDR, as servers do. A port that is only probed may go to another process before its server has started.
    """
    with socket.socket() as listener, socket.socket() as caller:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        caller.connect(listener.getsockname())
        accepted, _ = listener.accept()
        accepted.close()
        port: int = listener.getsockname()[1]
    return port
