"""The whole system on one machine: embedded AWS, provisioned resources, worker and HTTP API."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from mdstore.client import Client
from mdstore.errors import MdstoreError
from mdstore.local.emulator import EmbeddedAws, check_port, free_port
from mdstore.local.resend import resend_lost_requests
from mdstore.provision import provision
from mdstore.settings import Settings, load_settings
from mdstore.store import Store

_STOP_TIMEOUT = 20.0  # seconds
_START_TIMEOUT = 30.0  # seconds


class Stack:
    """Runs embedded AWS, worker and HTTP API as child processes. Use it as a context manager.

    The processes start in this order and stop in reverse. `environ` is added to the environment of the child processes, and
    `settings` are read from it too. Logs are written to `log_dir`, or to standard error without one.
    """

    def __init__(
        self,
        *,
        port: int | None = None,
        api_port: int | None = None,
        data_dir: Path | None = None,
        log_dir: Path | None = None,
        environ: Mapping[str, str] | None = None,
        with_api: bool = True,
        with_worker: bool = True,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._data_dir = data_dir
        self._log_dir = log_dir
        self._report = report
        self._with_api, self._with_worker = with_api, with_worker
        self.aws = EmbeddedAws(port=port or free_port(), data_dir=data_dir, log=log_dir and log_dir / "aws.log")
        self.environ = {
            **os.environ,
            "MDSTORE_PROFILE": "local",
            "AWS_ENDPOINT_URL": self.aws.url,
            "MDSTORE_API_PORT": str(api_port or free_port()),
            **(environ or {}),
        }
        self.settings: Settings = load_settings(self.environ).settings
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.api_key = ""

    @property
    def api_url(self) -> str:
        """The URL at which the HTTP API listens."""
        return f"http://{self.settings.api_host}:{self.settings.api_port}"

    def start(self) -> Self:
        """Start all processes, and return when the HTTP API is ready."""
        if self._with_api:
            check_port(self.settings.api_port, name="api_port")
        try:
            self.aws.start()
            self._report(f"embedded AWS   {self.aws.url}")
            for _ in provision(self.settings):
                pass
            if self._data_dir and (lost := resend_lost_requests(Client(self.settings))):
                self._report(
                    f"requests       {lost} sent again, because the embedded AWS had lost them when it was killed"
                )
            if self._with_worker:
                self.start_worker()
            if self._with_api:
                self._start_api()
        except BaseException:
            self.stop()
            raise
        return self

    def start_worker(self, name: str = "worker") -> subprocess.Popen[bytes]:
        """Start another worker; its log is `{name}.log`."""
        # A worker with a log file logs at the level INFO. On a terminal that it shares with others, it logs only warnings.
        process = self._spawn(name, ["worker"] if self._log_dir else ["worker", "--quiet", "--log-level", "WARNING"])
        self._report(f"worker         pid {process.pid}, {self.settings.concurrency} processes")
        return process

    def _start_api(self) -> None:
        self.api_key = Store(self.settings).api_keys.create(source="local", scopes=["write", "read", "operate"])
        process = self._spawn("api", ["api"])
        deadline = time.monotonic() + _START_TIMEOUT
        while not _responds(f"{self.api_url}/readyz"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise MdstoreError(f"the HTTP API did not become ready at {self.api_url}: see its log")
            time.sleep(0.05)
        self._report(f"HTTP API       {self.api_url}  (documentation: {self.api_url}/docs)")
        self._report(f"API key        {self.api_key}")

    def wait(self) -> str:
        """Wait until a child process exits, and return its name; for the embedded AWS, also say what data is left."""
        while True:
            if (code := self.aws.poll()) is not None:
                kept = f"{self._data_dir} has its state of a few seconds ago" if self._data_dir else "its data is lost"
                return f"embedded AWS (code {code}; {kept})"
            for name, process in self.processes.items():
                if process.poll() is not None:
                    return name
            time.sleep(0.2)

    def stop(self) -> None:
        """Stop all processes in the reverse order of their start. Stopping twice is safe."""
        for name in reversed(list(self.processes)):
            stop_process(self.processes.pop(name))
        self.aws.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _spawn(self, name: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        log = (self._log_dir / f"{name}.log").open("ab") if self._log_dir else None
        try:
            # In a session of its own, a child gets no Ctrl-C (only the parent does), and its whole group can be killed at once.
            process = subprocess.Popen(
                [sys.executable, "-m", "mdstore", *arguments],
                env=self.environ,
                stdout=log or sys.stderr.fileno(),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            if log:
                log.close()
        self.processes[name] = process
        return process


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Stop a process with SIGTERM. If it does not exit within 20 seconds, kill its process group."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            kill_group(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill (SIGKILL) a child process that leads its own process group, and all processes of that group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _responds(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):  # noqa: S310  our own child
            return True
    except (urllib.error.URLError, OSError):
        return False
