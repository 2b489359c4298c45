"""Options, one run of each test per target, and strict expected failures for the known differences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conformance.bench import Bench
from tests.conformance.differences import DIFFERENCES, Difference
from tests.conformance.target import EMBEDDED, MEMORY, SINGLE_THREADED, Target, renamed, running

HERE = Path(__file__).parent
#: Differences that no collected test shows although their modules were collected.
STALE = pytest.StashKey[list[Difference]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that choose a target other than the embedded emulators."""
    group = parser.getgroup("conformance")
    group.addoption("--endpoint", help="URL of a DynamoDB to run the conformance suite against")
    group.addoption("--aws", action="store_true", help="run the conformance suite against AWS, in AWS_REGION")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers that choose a test's targets, and refuse both options at once."""
    if config.getoption("--aws", default=False) and config.getoption("--endpoint", default=None):
        raise pytest.UsageError("--endpoint and --aws exclude each other")
    config.addinivalue_line("markers", "double: the unit tests' double must pass this test too")
    config.addinivalue_line(
        "markers", "large: gets its own tables on moto, which copies a table for each action of a transaction"
    )
    config.addinivalue_line("markers", "concurrent: is not run on targets that lose concurrent writes")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test once per target."""
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", _targets(metafunc), indirect=True, scope="session")


def _targets(metafunc: pytest.Metafunc) -> tuple[str, ...]:
    config, mark = metafunc.config, metafunc.definition.get_closest_marker
    # The defaults are for runs in which this file is loaded after the command line was parsed.
    if config.getoption("--aws", default=False):
        return ("aws",)
    if config.getoption("--endpoint", default=None):
        return ("endpoint",)
    names = (*EMBEDDED, MEMORY) if mark("double") else EMBEDDED
    return tuple(name for name in names if not (mark("concurrent") and name in SINGLE_THREADED))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: Iterable[pytest.Item]) -> None:
    """Mark tests with known differences as expected failures, and record the differences that no test shows."""
    ran: set[tuple[str, str]] = set()
    cases: dict[Difference, set[str]] = {one: set() for one in DIFFERENCES}
    for item in items:
        # Items of other suites are here too.
        if item.path.parent != HERE or not isinstance(item, pytest.Function) or "target" not in item.fixturenames:
            continue
        emulator, module = str(item.callspec.params["target"]), item.path.name
        case = item.callspec.id.removeprefix(emulator).removeprefix("-")
        ran.add((emulator, module))
        for one in DIFFERENCES:
            if one.covers(emulator, f"{module}::{item.originalname}", case):
                item.add_marker(pytest.mark.xfail(reason=one.instead, raises=one.raises, strict=True))
                cases[one].add(case)
    config.stash[STALE] = [
        one
        for one, found in cases.items()
        if (one.emulator, one.module) in ran and (not found or set(one.cases) - found)
    ]


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Yield a running target."""
    with running(request.param, request.config.getoption("--endpoint", default=None)) as found:
        yield found


@pytest.fixture(scope="session")
def lasting_tables(target: Target) -> Iterator[None]:
    """Keep tables for the whole run on targets where creating them is slow."""
    with ExitStack() as stack:
        if target.name not in EMBEDDED:
            target.make_tables(stack)
        yield


@pytest.fixture(scope="module")
def tables(target: Target, lasting_tables: None) -> Iterator[None]:  # noqa: ARG001
    """Keep tables for one module on targets where creating them is fast."""
    with ExitStack() as stack:
        if target.name in EMBEDDED:
            target.make_tables(stack)
        yield


@pytest.fixture
def bench(request: pytest.FixtureRequest, target: Target, tables: None) -> Iterator[Bench]:  # noqa: ARG001
    """Yield a bench over the target."""
    with ExitStack() as stack:
        if target.name == "moto" and request.node.get_closest_marker("large"):
            target = replace(target, settings=renamed(target.settings))
            target.make_tables(stack)
        yield Bench(target)
