"""`mdstore up --data-dir`: the embedded AWS is killed at any moment, and what was accepted is there after the next start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from mdstore.client import Client
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.local.snapshots import newest
from mdstore.settings import load_settings
from tests.waiting import until


def operations(count: int, name: str) -> list[dict[str, Any]]:
    return [{"op": "insert", "entity": "thing", "key": f"{name}-{n}", "data": {"n": n}} for n in range(count)]


@contextmanager
def up(*options: str, log: Path) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    """Run `mdstore up` on free ports; yields the process and a client of its stack."""
    environ = {**os.environ, "MDSTORE_WAIT_TIME": "1"}
    command = [
        sys.executable,
        "-m",
        "mdstore",
        "up",
        "--json",
        "--port",
        str(free_port()),
        "--api-port",
        str(free_port()),
    ]
    with log.open("ab") as errors:
        process = subprocess.Popen([*command, *options], env=environ, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        yield process, Client(load_settings({**environ, "AWS_ENDPOINT_URL": json.loads(line)["aws"]}).settings)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=90)


def error_of(process: subprocess.Popen[str]) -> str:
    """Wait until the process has failed; returns the error that it prints."""
    assert process.wait(60) == 1
    assert process.stdout is not None
    return " ".join(process.stdout.read().split())


def saved(data: Path) -> str:
    """Return the newest snapshot of DynamoDB's tables."""
    with suppress(FileNotFoundError):  # there is none yet, or it was just replaced
        return ((newest(data / "snapshots") or data) / "dynamodb.json").read_text()
    return ""


def kill_aws(process: subprocess.Popen[str]) -> None:
    """Kill the emulator of an `mdstore up`, as the system does when memory is short."""
    found = [child for child in psutil.Process(process.pid).children() if "mdstore" not in child.cmdline()]
    (aws,) = [child for child in found if any("snapshots" in part or "ministack" in part for part in child.cmdline())]
    aws.kill()


def test_a_killed_embedded_aws_keeps_what_was_accepted(tmp_path: Path) -> None:
    """Records of a minute ago and an API key are in the snapshot; a request accepted just before is applied again."""
    data, log = tmp_path / "data", tmp_path / "up.log"
    with up("--data-dir", str(data), log=log) as (process, client):
        client.submit(operations(500, "old"), request_id="old").wait()
        key = client.store.api_keys.create(source="erp", scopes=["read"])
        until(lambda: '"erp"' in saved(data), what="the key in a snapshot")
        client.submit(operations(300, "new"), request_id="new").wait()
        assert client.submit(operations(10, "newest"), request_id="newest").new
        client.store.ingestor.prepare(operations(1, "later"), request_id="later")  # a link, whose task has not ended
        kill_aws(process)
        assert f"embedded AWS (code -9; {data} has its state of a few seconds ago) exited unexpectedly" in error_of(
            process
        )

    with up("--data-dir", str(data), log=log) as (process, client):
        for name, count in (("old", 500), ("new", 300), ("newest", 10)):
            assert client.wait(name, timeout=60).counts.applied == {"insert": count}
            assert client.verify(name).ok
        assert client.store.api_keys.find(key) is not None
        assert sum(1 for _ in client.export()) == 810
        assert client.get("thing", "new-7").version == 1  # not applied twice


def test_up_notices_that_the_embedded_aws_died(tmp_path: Path) -> None:
    """Without a data directory it says that the data is lost, and it ends all other processes."""
    log = tmp_path / "up.log"
    with up(log=log) as (process, _):
        children = psutil.Process(process.pid).children(recursive=True)
        kill_aws(process)
        assert "embedded AWS (code -9; its data is lost) exited unexpectedly" in error_of(process)
        assert psutil.wait_procs(children, timeout=10)[1] == []


@contextmanager
def aws_with_table(data: Path, log: Path) -> Iterator[tuple[EmbeddedAws, Any]]:
    """Run the emulator alone; yields it and a client of DynamoDB."""
    with EmbeddedAws(port=free_port(), data_dir=data, log=log) as aws:
        environ = {**os.environ, "AWS_ENDPOINT_URL": aws.url}
        yield aws, Client(load_settings(environ).settings).store.aws.dynamodb


def create_table(dynamo: Any, name: str) -> None:
    dynamo.create_table(
        TableName=name, BillingMode="PAY_PER_REQUEST", KeySchema=[{"AttributeName": "pk", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "pk", "AttributeType": "S"}],
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["snapshots", "state"])
def test_a_clean_stop_saves_everything(tmp_path: Path, layout: str) -> None:
    """A clean stop saves even what changed a moment ago. A directory that an earlier release wrote is read too."""
    with aws_with_table(tmp_path, tmp_path / "log") as (aws, dynamo):
        create_table(dynamo, "first")
        assert 2**24 < aws.memory() < 2**28
    if layout == "state":
        (snapshot,) = (tmp_path / "snapshots").iterdir()
        snapshot.rename(tmp_path / "state")
    with aws_with_table(tmp_path, tmp_path / "log") as (_, dynamo):
        assert dynamo.list_tables()["TableNames"] == ["first"]
    assert len(list((tmp_path / "snapshots").iterdir())) == 1


def test_a_snapshot_that_was_not_finished_is_not_read(tmp_path: Path) -> None:
    """The emulator was killed while it wrote. The snapshot before counts, and the next one removes what is left."""
    with aws_with_table(tmp_path, tmp_path / "log") as (_, dynamo):
        create_table(dynamo, "first")
    snapshots = tmp_path / "snapshots"
    (complete,) = snapshots.iterdir()
    unfinished = snapshots / f"{int(complete.name) + 1}.new"
    shutil.copytree(complete, unfinished)
    (unfinished / "dynamodb.json").write_text("{")
    with aws_with_table(tmp_path, tmp_path / "log") as (_, dynamo):
        assert dynamo.list_tables()["TableNames"] == ["first"]
    assert [path.name for path in snapshots.iterdir()] == [str(int(complete.name) + 2)]


def test_an_idle_emulator_writes_nothing(tmp_path: Path) -> None:
    """Reading and waiting for messages change nothing that must survive."""
    with aws_with_table(tmp_path, tmp_path / "log") as (_, dynamo):
        create_table(dynamo, "first")
        first = until(lambda: newest(tmp_path / "snapshots"))
        for _ in range(30):
            dynamo.list_tables()
            dynamo.get_item(TableName="first", Key={"pk": {"S": "k"}})
            time.sleep(0.1)
        assert list((tmp_path / "snapshots").iterdir()) == [first]


def test_a_snapshot_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    """If the disk is full or read-only, the log says so, and the emulator goes on."""
    log = tmp_path / "log"
    with aws_with_table(tmp_path, log) as (aws, dynamo):
        create_table(dynamo, "first")
        snapshots = tmp_path / "snapshots"
        until(lambda: newest(snapshots))
        kept = snapshots.rename(tmp_path / "kept")
        snapshots.touch()  # no directory can be made there
        create_table(dynamo, "second")
        until(lambda: "the one before stays" in log.read_text())
        assert dynamo.list_tables()["TableNames"] == ["first", "second"]
        os.kill(aws.pid, signal.SIGKILL)
    snapshots.unlink()
    kept.rename(snapshots)
    with aws_with_table(tmp_path, log) as (_, dynamo):
        assert dynamo.list_tables()["TableNames"] == ["first"]
