"""Many clients send small requests to two HTTP APIs, one of which is killed again and again, and so is a worker.

Run `python -m tests.chaos.small_requests`: 10,000 requests of 50 clients; an API and a worker are killed ten times each.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import httpx

from mdstore.client import Client
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.model import State
from mdstore.provision import provision
from mdstore.settings import load_settings
from tests.chaos.worker_pool import kill, worker_pool
from tests.waiting import until

ROOT = Path(__file__).parents[2]
_REPEATED, _CONFLICTING = 0.15, 0.05  # parts of the requests
_PATIENCE = 60.0  # seconds in which a request must be accepted


class Api:
    """An HTTP API on one port, which can be killed and starts again."""

    def __init__(self, environ: Mapping[str, str], log: Path) -> None:
        self._environ = dict(environ)
        self._log = log
        self.url = f"http://127.0.0.1:{free_port()}"
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mdstore", "api", "--port", self.url.rpartition(":")[2]]
        with self._log.open("ab") as output:
            return subprocess.Popen(command, cwd=ROOT, env=self._environ, stdout=output, stderr=output)

    def restart(self) -> None:
        """Kill the process without warning, and start another one."""
        self.stop()
        self._process = self._start()
        until(self.serves, within=60)

    def serves(self) -> bool:
        """Return whether the API answers."""
        try:
            return httpx.get(f"{self.url}/livez", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()


@dataclass
class Found:
    """What the clients saw: the ids that were accepted, and how many answers there were of each status."""

    accepted: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Clients:
    """Clients that share the APIs. Each sends its requests one after the other, and repeats one until it is accepted."""

    def __init__(self, apis: list[Api], key: str) -> None:
        self._apis = apis
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self.found = Found()
        self._lock = threading.Lock()

    def run(self, client: int, count: int) -> None:
        """Send `count` requests of one client."""
        chosen = random.Random(client)
        with httpx.Client(headers=self._headers, timeout=30) as http:
            for number in range(count):
                name = f"{client}-{number}"
                self._until_accepted(http, chosen, name)
                if chosen.random() < _REPEATED:
                    self._until_accepted(http, chosen, name)
                if chosen.random() < _CONFLICTING:
                    answer = self._sent(http, chosen, name, n=-1)
                    if answer not in (None, 409, 503):
                        self.found.wrong.append(f"{name}: other content was answered with {answer}")
                with self._lock:
                    self.found.accepted.append(name)

    def _until_accepted(self, http: httpx.Client, chosen: random.Random, name: str) -> None:
        deadline = time.monotonic() + _PATIENCE
        while (answer := self._sent(http, chosen, name)) != 202:
            if answer not in (None, 429, 503) or time.monotonic() > deadline:
                self.found.wrong.append(f"{name}: not accepted, but answered with {answer}")
                return
            time.sleep(0.05)

    def _sent(self, http: httpx.Client, chosen: random.Random, name: str, n: int = 1) -> int | None:
        """Send a request to either API; return the answer's status, or None if there is none."""
        operation = f'{{"op":"upsert","entity":"item","key":"{name}","data":{{"n":{n}}}}}'
        try:
            answer = http.post(
                f"{chosen.choice(self._apis).url}/v1/requests",
                content=f'{{"operations":[{operation}]}}',
                headers={"Idempotency-Key": name},
            )
        except httpx.TransportError:
            return None
        with self._lock:
            self.found.statuses[answer.status_code] += 1
        return answer.status_code


@contextmanager
def _worker(environ: Mapping[str, str], log: Path, *, kills: int, pause: float) -> Iterator[threading.Event]:
    """Run a worker, which is killed `kills` times and replaced, `pause` seconds after each start."""
    stop = threading.Event()
    with worker_pool() as workers:

        def run() -> None:
            for _ in range(kills):
                worker = workers.start("workers.celery_app", environ, log)
                stop.wait(pause)
                kill(worker)
            workers.start("workers.celery_app", environ, log)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield stop
        finally:
            thread.join()


def run(directory: Path, *, requests: int, clients: int, kills: int, pause: float) -> Found:
    """Send the requests while processes are killed; then check that each accepted one was applied once."""
    with ExitStack() as stack:
        aws = stack.enter_context(EmbeddedAws(port=free_port()))
        environ = {
            **os.environ,
            "MDSTORE_PROFILE": "local",
            "AWS_ENDPOINT_URL": aws.url,
            "MDSTORE_NAMESPACE": f"small-{uuid4().hex[:12]}",
            "MDSTORE_VISIBILITY_TIMEOUT": "5",
            "MDSTORE_WAIT_TIME": "1",
            "MDSTORE_MAX_RECEIVES": "50",
        }
        client = Client(load_settings(environ).settings)
        list(provision(client.settings))
        apis = [Api(environ, directory / f"api{number}") for number in range(2)]
        for api in apis:
            stack.callback(api.stop)
            until(api.serves, within=60)
        stack.enter_context(_worker(environ, directory / "worker", kills=kills, pause=pause))
        group = Clients(apis, client.store.api_keys.create(source="shop", scopes=("write",)))
        with ThreadPoolExecutor(clients) as threads:
            running = [threads.submit(group.run, number, requests // clients) for number in range(clients)]
            for _ in range(kills):
                time.sleep(pause)
                apis[0].restart()
            for one in running:
                one.result()
        _check(client, group.found)
    return group.found


def _check(client: Client, found: Found) -> None:
    assert found.wrong == []
    ids = [f"shop:{name}" for name in found.accepted]
    ledger = client.store.ledger

    def unfinished() -> list[str]:
        states = ledger.get_many(ids)
        return [
            request_id
            for request_id in ids
            if request_id not in states or states[request_id].state is not State.COMPLETED
        ]

    until(lambda: not unfinished(), within=300, what="every accepted request is completed")
    records = client.store.records.look_up(("item", name) for name in found.accepted)
    wrong = [
        name
        for name in found.accepted
        if (record := records.get(("item", name))) is None or (record.version, record.data) != (1, {"n": 1})
    ]
    assert wrong == []


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        began = time.monotonic()
        result = run(Path(made), requests=10_000, clients=50, kills=10, pause=5.0)
        print(
            f"{len(result.accepted)} requests were accepted, and applied once each, in {time.monotonic() - began:.0f} s;"
            f" answers by status: {dict(result.statuses)}"
        )
