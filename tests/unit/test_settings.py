"""Settings: where each value comes from, and what the error of a wrong value says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mdstore.errors import ConfigurationError
from mdstore.settings import SECRETS, LoadedSettings, Settings, load_settings


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in a directory without a `config/mdstore.toml`, unless the test writes one."""
    monkeypatch.chdir(tmp_path)


def file_with(text: str, name: str = "my.toml") -> dict[str, str]:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, "utf-8")
    return {"MDSTORE_CONFIG": name}


def error_of(environ: Mapping[str, str] | None = None, **arguments: Any) -> ConfigurationError:
    """Load settings, and return the error."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings(environ or {}, **arguments)
    return caught.value


def test_precedence_is_argument_environment_file_profile_default() -> None:
    """The first place that has a value decides, and is named as the value's origin."""
    file = file_with('region = "from-file"')
    places: list[tuple[dict[str, str], dict[str, Any], str, str]] = [
        ({}, {}, "us-east-1", "profile local"),
        (file, {}, "from-file", "my.toml"),
        ({**file, "AWS_REGION": "from-env"}, {}, "from-env", "AWS_REGION"),
        ({**file, "AWS_REGION": "from-env"}, {"region": "from-argument"}, "from-argument", "argument"),
    ]
    for environ, arguments, value, origin in places:
        loaded = load_settings(environ, **arguments)
        assert (loaded.settings.region, loaded.origins["region"]) == (value, origin)


@pytest.mark.parametrize(
    ("environ", "arguments", "value", "origin"),
    [
        ({}, {}, 2_000, "default"),
        ({"MDSTORE_LANE_OPERATIONS": "5"}, {}, 5, "MDSTORE_LANE_OPERATIONS"),
        ({"MDSTORE_LANE_OPERATIONS": ""}, {}, 2_000, "default"),
        ({"MDSTORE_LANE_OPERATIONS": "5"}, {"lane_operations": 7}, 7, "argument"),
    ],
)
def test_rows_show_value_and_origin(
    environ: dict[str, str], arguments: dict[str, Any], value: int, origin: str
) -> None:
    """Each setting has one row. An empty variable counts as not set."""
    rows = load_settings(environ, **arguments).rows()
    assert ("lane_operations", value, origin) in rows
    assert [name for name, _, _ in rows] == list(Settings.model_fields)


def test_the_default_file_is_read_if_it_exists() -> None:
    """`config/mdstore.toml` needs no variable that names it, and a named file replaces it."""
    file_with("lane_operations = 7", "config/mdstore.toml")
    loaded = load_settings({})
    assert (loaded.settings.lane_operations, loaded.origins["lane_operations"]) == (7, "config/mdstore.toml")
    assert load_settings(file_with("")).settings.lane_operations == 2_000


def test_settings_of_aws_have_the_names_of_aws() -> None:
    """The first of AWS's names decides, and a service's endpoint takes precedence over the common one."""
    settings = load_settings({
        "AWS_DEFAULT_REGION": "second",
        "AWS_REGION": "first",
        "AWS_ENDPOINT_URL": "http://all",
        "AWS_ENDPOINT_URL_SQS": "http://sqs",
    }).settings  # fmt: skip
    assert settings.region == "first"
    assert (settings.endpoint("sqs"), settings.endpoint("s3")) == ("http://sqs", "http://all")


@pytest.mark.parametrize("name", ["MDSTORE_LANE_OPERATION", "MDSTORE_REGION", "MDSTORE_", "MDSTORE_lane_operations"])
def test_an_unknown_variable_is_an_error_that_names_it(name: str) -> None:
    """A misspelt name does not silently leave the default, and settings of AWS have no second name."""
    error = error_of({name: "5"})
    assert (error.key, error.expected) == (name, "the name of a setting")
    assert str(error) == f"setting {name}='...': expected the name of a setting"


def test_variables_of_other_programs_are_ignored() -> None:
    """Only names that begin with MDSTORE_ are checked."""
    assert load_settings({"MDSTOREX": "1", "PATH": "/bin"}).settings == load_settings({}).settings


def test_an_unknown_variable_does_not_show_a_secret() -> None:
    """A secret under a misspelt name is a likely mistake, and must not get into a log."""
    assert "hunter2" not in str(error_of({"MDSTORE_AWS_SECRET_ACCESS_KEY": "hunter2"}))


@pytest.mark.parametrize(
    ("arguments", "key", "value", "expected"),
    [
        ({"lane_operations": 0}, "lane_operations", 0, "Input should be greater than or equal to 1"),
        ({"api_port": "http"}, "api_port", "http", "Input should be a valid integer"),
        ({"receipt_days": 14}, "receipt_days", 14, "Input should be greater than or equal to 15"),
        ({"profile": "production"}, "profile", "production", "Input should be 'local' or 'aws'"),
        ({"namespace": "My_Store"}, "namespace", "My_Store", "String should match pattern"),
        ({"payload_prefix": "a/b/"}, "payload_prefix", "a/b/", "String should match pattern"),
        ({"claim_prefix": "blobs/"}, "claim_prefix", "blobs/", "a prefix of its own: objects under it expire"),
        ({"claim_prefix": "p/", "payload_prefix": "p/"}, "claim_prefix", "p/", "a prefix of its own"),
        ({"claim_threshold": 2**20}, "claim_threshold", 2**20, "Input should be less than or equal to 307200"),
        ({"colour": "red"}, "colour", "red", "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_setting(
    arguments: dict[str, Any], key: str, value: Any, expected: str
) -> None:
    """The error has key, value and what was expected, as fields and in its message."""
    error = error_of(**arguments)
    assert (error.key, error.value) == (key, value)
    assert error.expected.startswith(expected)
    assert str(error).startswith(f"setting {key}={value!r}: expected {expected}")


CONFLICTS: list[tuple[dict[str, Any], str, Any, str]] = [
    ({"receipt_days": 16}, "receipt_days", 16, "at most tombstone_days=15"),
    ({"lane_budget": 120}, "lane_budget", 120, "less than task_time_limit=120"),
    ({"task_time_limit": 60}, "lane_budget", 90, "less than task_time_limit=60"),
    ({"max_record_bytes": 2**27}, "max_record_bytes", 2**27, "at most max_lane_bytes=67108864"),
]


@pytest.mark.parametrize(("arguments", "key", "value", "expected"), CONFLICTS)
def test_conflicting_values_are_named_in_the_message(
    arguments: dict[str, Any], key: str, value: Any, expected: str
) -> None:
    """The message has the setting to change, its value, and what the other settings would allow."""
    text = str(error_of(**arguments))
    assert f"{key}={value}: expected {expected}" in text


@pytest.mark.parametrize(("arguments", "key", "value", "expected"), CONFLICTS)
def test_an_error_of_conflicting_values_has_fields(
    arguments: dict[str, Any], key: str, value: Any, expected: str
) -> None:
    """The fields of the error name the setting, like those of any other wrong value."""
    error = error_of(**arguments)
    assert (error.key, error.value, error.expected) == (key, value, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"visibility_timeout": 2, "task_time_limit": 600},
        {"lane_budget": 119},
        {"max_record_bytes": 2**26},
        {"prefetch": 100, "visibility_timeout": 2},
    ],
)
def test_values_at_the_bounds_are_accepted(arguments: dict[str, Any]) -> None:
    """The bounds are inclusive."""
    load_settings({}, **arguments)


def test_a_lane_s_target_size_must_not_exceed_its_limit() -> None:
    """Otherwise lanes would exceed the limit, and requests of an allowed size would be refused."""
    assert "lane_bytes" in str(error_of(lane_bytes=2**23, max_lane_bytes=2**20, max_record_bytes=2**20))


@pytest.mark.parametrize(
    ("environ", "missing"),
    [
        ({}, "region"),
        ({"AWS_REGION": "eu-central-1"}, "bucket"),
        ({"MDSTORE_BUCKET": "b"}, "region"),
    ],
)
def test_the_profile_aws_needs_region_and_bucket(environ: dict[str, str], missing: str) -> None:
    """Bucket names are global in S3, and a region cannot be guessed."""
    error = error_of({"MDSTORE_PROFILE": "aws", **environ})
    assert (error.key, error.expected) == (missing, "a value in the profile aws")


def test_the_profile_aws_sets_neither_endpoints_nor_keys() -> None:
    """On AWS, keys come from roles, and endpoints from AWS."""
    loaded = load_settings({"MDSTORE_PROFILE": "aws", "AWS_REGION": "eu-central-1", "MDSTORE_BUCKET": "b"})
    settings = loaded.settings
    assert (settings.endpoint("s3"), settings.aws_access_key_id, settings.aws_secret_access_key) == (None, None, None)
    assert loaded.origins["profile"] == "MDSTORE_PROFILE"


def test_the_profile_local_needs_no_setting() -> None:
    """On a developer's machine, everything has a default."""
    loaded = load_settings({})
    settings = loaded.settings
    assert settings.endpoint("dynamodb") == "http://127.0.0.1:4566"
    assert settings.bucket == "mdstore-payloads"
    assert loaded.origins["endpoint_url"] == "profile local"


def test_names_begin_with_the_namespace() -> None:
    """The names of tables, queues and bucket begin with the namespace, and each can be set separately."""
    settings = load_settings({"MDSTORE_NAMESPACE": "team-a", "MDSTORE_QUEUE": "other"}).settings
    assert (settings.records_table, settings.ledger_table, settings.results_table, settings.delayed_table) == (
        "team-a-records",
        "team-a-ledger",
        "team-a-results",
        "team-a-due",
    )
    assert (settings.bucket, settings.queue, settings.dead_letter_queue) == (
        "team-a-payloads",
        "other",
        "team-a-dead-letters",
    )


SECRET = {
    "AWS_SECRET_ACCESS_KEY": "hunter2",
    "AWS_SESSION_TOKEN": "hunter3",
    "MDSTORE_SIGNING_KEYS": "hunter4" * 5,
}


def test_secrets_are_masked() -> None:
    """Rows show that a secret is set and where it comes from. No `repr` shows it."""
    loaded = load_settings(SECRET)
    rows = {name: (value, origin) for name, value, origin in loaded.rows()}
    assert {rows[name][0] for name in SECRETS} == {"********"}
    assert rows["aws_session_token"][1] == "AWS_SESSION_TOKEN"
    for displayed in (repr(loaded), str(loaded), repr(loaded.settings), str(loaded.settings), repr(loaded.rows())):
        assert "hunter" not in displayed
    assert loaded.settings.aws_secret_access_key == "hunter2"


def test_a_secret_that_is_not_set_is_not_masked() -> None:
    """A mask would suggest that there is a value."""
    rows = {name: value for name, value, _ in load_settings({}).rows()}
    assert rows["aws_session_token"] is None


def test_a_wrong_secret_is_masked_in_its_error() -> None:
    """Neither the error's value nor its message shows the secret."""
    error = error_of(aws_secret_access_key=["hunter2"])
    assert error.value == "********"
    assert "hunter2" not in str(error)


def test_an_error_s_cause_shows_no_secret() -> None:
    """A traceback prints the cause of an error too."""
    for changes in ({"lane_budget": 120}, {"aws_session_token": ["hunter2"]}):
        error = error_of(SECRET, **changes)
        assert "hunter" not in str(error.__cause__)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("config.entities, more.entities", ("config.entities", "more.entities")),
        ("one", ("one",)),
        (" , one ,, ", ("one",)),
        (["a", "b"], ("a", "b")),
        ([], ()),
    ],
)
def test_entities_are_a_list_or_comma_separated_text(given: object, expected: tuple[str, ...]) -> None:
    """The environment has text, and a file has a list."""
    assert load_settings({}, entities=given).settings.entities == expected


def test_entities_may_come_from_the_environment_or_a_file() -> None:
    """Both set the same setting."""
    file = file_with('entities = ["a", "b"]')
    assert load_settings(file).settings.entities == ("a", "b")
    assert load_settings({**file, "MDSTORE_ENTITIES": "c,d"}).settings.entities == ("c", "d")


@pytest.mark.parametrize("text", ["lane_operations = ", "\udcff"])
def test_an_unreadable_file_is_an_error_that_names_it(text: str) -> None:
    """This covers broken TOML and broken UTF-8."""
    Path("my.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    error = error_of({"MDSTORE_CONFIG": "my.toml"})
    assert (error.key, error.value) == ("MDSTORE_CONFIG", "my.toml")
    assert error.expected.startswith("TOML (")


def test_a_named_file_must_exist() -> None:
    """Only the default file may be missing."""
    error = error_of({"MDSTORE_CONFIG": "none.toml"})
    assert (error.key, error.value, error.expected) == ("MDSTORE_CONFIG", "none.toml", "a file")


def test_settings_are_frozen() -> None:
    """Loaded settings cannot be changed."""
    loaded = load_settings({})
    with pytest.raises(ValidationError):
        loaded.settings.region = "x"  # type: ignore[misc]
    assert isinstance(loaded, LoadedSettings)


def test_former_names_are_still_read() -> None:
    """A deployment that sets a name of the former release keeps its table; the present name takes precedence."""
    assert load_settings({"MDSTORE_DUE_TABLE": "mine"}).settings.delayed_table == "mine"
    assert load_settings(file_with('due_table = "mine"\n')).settings.delayed_table == "mine"
    both = {"MDSTORE_DUE_TABLE": "former", "MDSTORE_DELAYED_TABLE": "present"}
    assert load_settings(both).settings.delayed_table == "present"
    assert load_settings({}).settings.delayed_table == "mdstore-due"
