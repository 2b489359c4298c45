"""With sequences, the order in which requests are applied does not matter: each key ends in the state of its highest one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.store import Store
from tests.integration.shuffled_history import Size, run, store_on


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with EmbeddedAws(port=free_port()) as aws:
        yield store_on(aws)


@pytest.mark.parametrize("newest_wins", [False, True], ids=["upserts and deletes", "newest_wins"])
def test_a_shuffled_history_ends_in_the_highest_sequences(store: Store, newest_wins: bool) -> None:
    """1,000 operations in 16 requests, which 8 threads apply; `python -m tests.integration.shuffled_history` does 8,000."""
    assert run(store, 7, Size(operations=1_000, keys=120), newest_wins=newest_wins) == []
