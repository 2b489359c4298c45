"""The configuration: read once, validated as a whole, and frozen.

Each value comes from the first of these that has it: an argument, the environment (`MDSTORE_*`, or AWS's own variable where
AWS has one), `config/mdstore.toml` (or the file that `MDSTORE_CONFIG` names), the profile, the default.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from mdstore.errors import ConfigurationError
from mdstore.running_stack import announced_url

LOCAL_PORT = 4566
MAX_RECORD_VALUES = 2**19  # decoded, each takes up to 200 bytes of memory
DEFAULT_FILE = Path("config/mdstore.toml")
DAY = 86_400

#: Settings whose environment variables AWS has named. Every other variable is MDSTORE_ and the field's name in capitals.
AWS_NAMES: Mapping[str, tuple[str, ...]] = {
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "endpoint_url": ("AWS_ENDPOINT_URL",),
    "endpoint_url_sqs": ("AWS_ENDPOINT_URL_SQS",),
    "endpoint_url_s3": ("AWS_ENDPOINT_URL_S3",),
    "endpoint_url_dynamodb": ("AWS_ENDPOINT_URL_DYNAMODB",),
    "endpoint_url_sns": ("AWS_ENDPOINT_URL_SNS",),
    "endpoint_url_secretsmanager": ("AWS_ENDPOINT_URL_SECRETS_MANAGER",),
    "aws_profile": ("AWS_PROFILE",),
    "aws_access_key_id": ("AWS_ACCESS_KEY_ID",),
    "aws_secret_access_key": ("AWS_SECRET_ACCESS_KEY",),
    "aws_session_token": ("AWS_SESSION_TOKEN",),
}
#: Old names that are still read, from the environment and from the file.
FORMER_NAMES: Mapping[str, str] = {"due_table": "delayed_table"}
SECRETS = frozenset({"aws_secret_access_key", "aws_session_token", "signing_keys"})
_MASK = "********"
_PASSWORD = re.compile(r"((?:\w+://|^)[^\s:/@]*):\S*@")  # of a URL, whose scheme may be missing
# Dummy keys keep boto3 from searching for credentials; the emulator accepts any keys.
# The wait time is short because the emulator continues a long poll after its client has gone, and then loses a message.
_LOCAL = {"region": "us-east-1", "aws_access_key_id": "local", "aws_secret_access_key": "local", "wait_time": 1}


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _split_weights(value: object) -> object:
    """Parse `a=3,b=1`, the form in an environment variable; the file has a table instead."""
    parts = _split(value)
    if not isinstance(value, str) or not isinstance(parts, list):
        return value
    pairs = [part.partition("=") for part in parts]
    return {name.strip(): weight.strip() for name, _, weight in pairs}


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Keys = Annotated[tuple[Annotated[str, Field(min_length=32)], ...], BeforeValidator(_split)]
Weights = Annotated[
    dict[Annotated[str, Field(min_length=1)], Annotated[int, Field(ge=1, le=1_000)]], BeforeValidator(_split_weights)
]


def _checked_url(value: str | None) -> str | None:
    try:
        parts = urlsplit(value or "")
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port over 65535, or half an IPv6 address
        is_url = False
    if value and not is_url:
        raise PydanticCustomError("endpoint", "a URL such as http://127.0.0.1:4566")
    return value


Endpoint = Annotated[str | None, AfterValidator(_checked_url)]


class Settings(BaseModel):
    """All settings. Times are in seconds and sizes in bytes unless a name says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    # -- AWS: region, endpoint and credentials

    profile: Literal["local", "aws"] = "local"
    region: str = ""
    aws_profile: str | None = None
    aws_access_key_id: str | None = None
    aws_secret_access_key: str | None = Field(default=None, repr=False)
    aws_session_token: str | None = Field(default=None, repr=False)
    endpoint_url: Endpoint = None
    endpoint_url_sqs: Endpoint = None
    endpoint_url_s3: Endpoint = None
    endpoint_url_dynamodb: Endpoint = None
    endpoint_url_sns: Endpoint = None
    endpoint_url_secretsmanager: Endpoint = None

    # -- Names of AWS resources. An empty name gets a default that begins with the namespace.

    namespace: str = Field(default="mdstore", pattern=r"^[a-z0-9][a-z0-9-]{2,40}$")
    # The local profile's default is {namespace}-payloads. The aws profile has none, because S3 names are global.
    bucket: str = ""
    # The data store's tables.
    records_table: str = ""
    ledger_table: str = ""
    # The queue's tables, queues and topics.
    results_table: str = ""
    delayed_table: str = ""
    queue: str = ""
    dead_letter_queue: str = ""
    # A topic's name is a prefix of its queues' names, and SQS limits those to 80 characters.
    control_topic: str = Field(default="", pattern=r"^[A-Za-z0-9_-]{0,50}$")
    events_topic: str = Field(default="", pattern=r"^[A-Za-z0-9_-]{0,50}$")
    # Prefixes of keys in the bucket: the data store's payloads and large record data, and the queue's large messages.
    payload_prefix: str = Field(default="payloads/", pattern=r"^[A-Za-z0-9_-]+/$")
    blob_prefix: str = Field(default="blobs/", pattern=r"^[A-Za-z0-9_-]+/$")
    claim_prefix: str = Field(default="claims/", pattern=r"^[A-Za-z0-9_-]+/$")  # objects under it expire

    # -- Store: the data store's entities, limits and retention

    entities: Names = ()
    strict_entities: bool = False  # refuse operations on entities that have no model
    lane_operations: int = Field(default=2_000, ge=1, le=100_000)  # the target for one lane
    lane_bytes: int = Field(default=8 * 2**20, ge=2**16)  # the target for one lane's JSON
    max_lane_bytes: int = Field(
        default=64 * 2**20, ge=2**20
    )  # the limit for one lane's JSON: a worker decodes it whole
    max_record_bytes: int = Field(default=16 * 2**20, ge=1_024)  # the limit for one operation's JSON
    max_record_values: int = Field(default=MAX_RECORD_VALUES, ge=1_000)  # the limit for one operation's values
    max_request_operations: int = Field(default=10_000_000, ge=1)
    transactions_in_flight: int = Field(default=24, ge=1, le=256)  # per lane: a lane of 2,000 operations has 21
    lane_budget: int = Field(default=90, ge=1)  # after this, the lane goes back to the queue; its receipts stay
    # A lane's turn: after this many seconds or waves, its other waves go back to the queue, behind other messages.
    # Most lanes have one wave.
    lane_turn: float = Field(default=0.5, gt=0)
    lane_turn_waves: int = Field(default=100, ge=1)
    receipt_days: int = Field(default=15, ge=15)  # SQS keeps a message for 14
    tombstone_days: int = Field(default=15, ge=15)

    # -- Queue: Celery on SQS, for any Celery app

    claim_threshold: int = Field(default=200 * 2**10, ge=2**13, le=300 * 2**10)  # larger messages are stored in S3
    max_claim_bytes: int = Field(default=64 * 2**20, ge=2**20)  # their limit: a worker's main process reads one whole
    result_hours: int = Field(default=24, ge=1)
    visibility_timeout: int = Field(default=120, ge=2, le=43_200)  # after this, SQS redelivers a dead worker's messages
    max_receives: int = Field(default=10, ge=1, le=999)  # SQS counts to 1,000, and the queue needs one more than this
    wait_time: int = Field(default=10, ge=1, le=20)  # the duration of one long poll
    # A queue's share of a worker's room while several of its queues have a backlog. Queues that are not named have weight 1.
    queue_weights: Weights = {}
    # The keys of signed messages: the first one signs, and both are accepted. Or the key is in a secret of Secrets Manager.
    signing_keys: Keys = Field(default=(), max_length=2, repr=False)
    signing_secret: str | None = None  # its name or ARN
    require_signatures: bool = True  # if there is a key, unsigned messages are not executed
    remote_control: bool = True  # workers take commands (celery inspect, celery control, Flower)
    events: bool = True  # workers report their tasks (celery events, Flower)

    # -- Worker: its processes, their tasks, and its health endpoint

    concurrency: int = Field(default=2, ge=1)  # tasks that one worker runs at the same time
    # The most messages held per process, including the running one. Sixteen messages of small requests count as one.
    prefetch: int = Field(default=10, ge=1, le=100)
    task_time_limit: int = Field(default=120, ge=1)
    shutdown_grace: int = Field(default=25, ge=1)  # for running tasks after a stop signal; ECS kills after 30
    worker_host: str = "127.0.0.1"
    worker_port: int = Field(default=0, ge=0, le=65_535)  # where a worker serves /livez; 0 disables it

    # -- HTTP API

    api_host: str = "127.0.0.1"
    api_port: int = Field(default=8080, ge=0, le=65_535)
    api_max_body_bytes: int = Field(default=64 * 2**20, ge=1_024)
    api_max_wait: int = Field(default=60, ge=0)
    # The most connections; 0 means 2,000, or fewer if the process may not open enough files.
    api_max_connections: int = Field(default=0, ge=0)
    api_max_bodies: int = Field(default=200, ge=2)  # held at the same time; one source may have half of them
    api_head_timeout: int = Field(default=10, ge=1)  # for a request's line and headers, once they have begun
    api_body_timeout: int = Field(default=30, ge=1)  # for a request's body, and one more second for each 10 KiB
    api_write_timeout: int = Field(default=30, ge=1)  # for a caller that does not read its answer

    @model_validator(mode="after")
    def _check_times(self) -> Self:
        if self.lane_budget >= self.task_time_limit:
            expected = f"less than task_time_limit={self.task_time_limit}"
            raise ConfigurationError(key="lane_budget", value=self.lane_budget, expected=expected)
        if self.receipt_days > self.tombstone_days:  # `verify` needs the tombstone of every delete that has a receipt
            expected = f"at most tombstone_days={self.tombstone_days}"
            raise ConfigurationError(key="receipt_days", value=self.receipt_days, expected=expected)
        for key in ("max_record_bytes", "lane_bytes"):
            if getattr(self, key) > self.max_lane_bytes:
                expected = f"at most max_lane_bytes={self.max_lane_bytes}"
                raise ConfigurationError(key=key, value=getattr(self, key), expected=expected)
        return self

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.signing_keys and self.signing_secret:
            expected = "no value where there are signing_keys"
            raise ConfigurationError(key="signing_secret", value=self.signing_secret, expected=expected)
        return self

    @model_validator(mode="after")
    def _check_prefixes(self) -> Self:
        if self.claim_prefix in (self.payload_prefix, self.blob_prefix):
            expected = "a prefix of its own: objects under it expire"
            raise ConfigurationError(key="claim_prefix", value=self.claim_prefix, expected=expected)
        return self

    @property
    def request_lease(self) -> int:
        """Seconds after which a request without a sign of work counts as abandoned: by then no task can still be running."""
        return self.task_time_limit + self.visibility_timeout

    def endpoint(self, service: Literal["sqs", "s3", "dynamodb", "sns", "secretsmanager"]) -> str | None:
        """Return the URL of `service`, or None for AWS's own endpoint."""
        own: str | None = getattr(self, f"endpoint_url_{service}")
        return own or self.endpoint_url


class LoadedSettings(BaseModel):
    """Settings with the origin of each value: `argument`, an environment variable, a file, `profile local` or `default`."""

    model_config = ConfigDict(frozen=True)
    settings: Settings
    origins: dict[str, str]

    def rows(self) -> list[tuple[str, object, str]]:
        """Return `(name, value, origin)` of every setting, with secrets masked."""
        values = self.settings.model_dump()
        return [(name, _masked(name, value), self.origins.get(name, "default")) for name, value in values.items()]


def load_settings(environ: Mapping[str, str] | None = None, **arguments: object) -> LoadedSettings:
    """Read the settings from all their sources. Raises `ConfigurationError`, which names the setting."""
    environ = os.environ if environ is None else environ
    found: dict[str, tuple[object, str]] = {name: (value, "argument") for name, value in arguments.items()}
    for layer in (_from_environment(environ), _from_file(environ)):
        found = {**layer, **found}
    profile = str(found.get("profile", ("local", ""))[0])
    found = {**_from_profile(profile), **found}
    for name, value in _derived(found, profile).items():
        found.setdefault(name, (value, "default"))
    try:
        settings = Settings.model_validate({name: value for name, (value, _) in found.items()})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "settings"
        shown = "..." if key == "settings" else _masked(key, first["input"])
        raise ConfigurationError(key=key, value=shown, expected=first["msg"]) from error
    return LoadedSettings(settings=settings, origins={name: origin for name, (_, origin) in found.items()})


def _masked(name: str, value: object) -> object:
    """Return a setting's value without secrets."""
    if name.partition(".")[0] in SECRETS and value:
        return _MASK
    return mask_passwords(value) if isinstance(value, str) else value


def mask_passwords(text: str) -> str:
    """Return `text` without the passwords of its URLs."""
    return _PASSWORD.sub(rf"\1:{_MASK}@", text)


def _from_environment(environ: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    found: dict[str, tuple[object, str]] = {}
    for name in Settings.model_fields:
        for variable in _variables(name):
            if environ.get(variable):
                found.setdefault(name, (environ[variable], variable))
    known = {variable for name in Settings.model_fields for variable in _variables(name)} | {"MDSTORE_CONFIG"}
    for variable in environ:
        if variable.startswith("MDSTORE_") and variable not in known:
            raise ConfigurationError(key=variable, value="...", expected="the name of a setting")
    return found


def _variables(name: str) -> tuple[str, ...]:
    """Return the environment variables of a setting; the first one that is set counts."""
    former = [old for old, new in FORMER_NAMES.items() if new == name]
    return AWS_NAMES.get(name, tuple(f"MDSTORE_{one.upper()}" for one in (name, *former)))


def _from_file(environ: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    named = environ.get("MDSTORE_CONFIG")
    path = Path(named) if named else DEFAULT_FILE
    if not path.is_file():
        if named:
            raise ConfigurationError(key="MDSTORE_CONFIG", value=named, expected="a file")
        return {}
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(key="MDSTORE_CONFIG", value=str(path), expected=f"TOML ({error})") from error
    return {FORMER_NAMES.get(name, name): (value, str(path)) for name, value in values.items()}


def _from_profile(profile: str) -> dict[str, tuple[object, str]]:
    if profile != "local":
        return {}
    found: dict[str, tuple[object, str]] = {name: (value, "profile local") for name, value in _LOCAL.items()}
    url = announced_url()
    found["endpoint_url"] = (url, "mdstore up") if url else (f"http://127.0.0.1:{LOCAL_PORT}", "profile local")
    return found


def _derived(found: Mapping[str, tuple[object, str]], profile: str) -> dict[str, str]:
    namespace = str(found.get("namespace", ("mdstore", ""))[0])
    if profile == "aws":
        for key in ("region", "bucket"):
            if not found.get(key, ("", ""))[0]:
                raise ConfigurationError(key=key, value="", expected="a value in the profile aws")
    return {
        "bucket": f"{namespace}-payloads",
        "records_table": f"{namespace}-records",
        "ledger_table": f"{namespace}-ledger",
        "results_table": f"{namespace}-results",
        "delayed_table": f"{namespace}-due",
        "queue": namespace,
        "dead_letter_queue": f"{namespace}-dead-letters",
        "control_topic": f"{namespace}-control",
        "events_topic": f"{namespace}-events",
    }
