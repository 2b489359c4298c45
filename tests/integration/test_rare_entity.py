"""A page of a listing reads a bounded part of the table, and says when it ended early for that reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mdstore.local.emulator import EmbeddedAws, free_port
from tests.integration.api_process import ApiProcess, api_process

COMMON = 6_000


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    """Yield an API over one record of the entity `rare` among 6,000 of another."""
    with (
        EmbeddedAws(port=free_port()) as aws,
        api_process(aws.url, tmp_path_factory.mktemp("api") / "log") as running,
    ):
        store = running.client.store
        names = [("common", f"{n}") for n in range(COMMON)] + [("rare", "1")]
        for start in range(0, len(names), 25):
            puts: list[Any] = [{"PutRequest": {"Item": item(*name)}} for name in names[start : start + 25]]
            store.aws.dynamodb.batch_write_item(RequestItems={store.settings.records_table: puts})
        yield running


def item(entity: str, key: str) -> Any:
    return {
        "pk": {"S": f"{entity}#{key}"},
        "entity": {"S": entity},
        "key": {"S": key},
        "data": {"M": {}},
        "version": {"N": "1"},
        "updated_at": {"N": "1"},
        "updated_by": {"S": "r/0/0"},
    }


def pages(api: ApiProcess, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        found.append(api.http.get(path, params={"cursor": cursor, "limit": "1000"}).json())
        cursor = found[-1]["cursor"]
    return found


def test_a_page_of_a_rare_entity_says_that_it_ended_early(api: ApiProcess) -> None:
    """No page reads more than 4,000 records, so the first may be empty, and the pages together have the one record."""
    found = pages(api, "/v1/records/rare")
    assert [page["read_limit_reached"] for page in found] == [True, False]
    assert [record["key"] for page in found for record in page["records"]] == ["1"]


def test_a_full_page_is_not_short(api: ApiProcess) -> None:
    """Pages that are as long as they were asked to be did not end early."""
    found = pages(api, "/v1/records/common")
    assert {len(page["records"]) for page in found[:-1]} == {1_000}
    assert not any(page["read_limit_reached"] for page in found)
    assert len({record["key"] for page in found for record in page["records"]}) == COMMON


def test_no_entity_at_all_is_one_empty_listing(api: ApiProcess) -> None:
    """An entity without records has two pages here, and none of them has records."""
    assert [page["records"] for page in pages(api, "/v1/records/none")] == [[], []]
