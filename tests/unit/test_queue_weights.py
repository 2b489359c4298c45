"""The setting `queue_weights`, from the environment and from the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdstore.errors import ConfigurationError
from mdstore.settings import load_settings


def test_the_environment_gives_weights_as_text() -> None:
    found = load_settings({"MDSTORE_QUEUE_WEIGHTS": "orders=3, mails.fifo = 1,"}).settings.queue_weights
    assert found == {"orders": 3, "mails.fifo": 1}
    assert load_settings({}).settings.queue_weights == {}


def test_the_file_gives_them_as_a_table(tmp_path: Path) -> None:
    path = tmp_path / "mdstore.toml"
    path.write_text("queue_weights = {orders = 3}\n")
    assert load_settings({"MDSTORE_CONFIG": str(path)}).settings.queue_weights == {"orders": 3}


@pytest.mark.parametrize("value", ["orders", "orders=", "orders=0", "orders=many", "orders=1001", "=1"])
def test_a_bad_weight_is_refused_by_name(value: str) -> None:
    with pytest.raises(ConfigurationError, match="queue_weights"):
        load_settings({"MDSTORE_QUEUE_WEIGHTS": value})
