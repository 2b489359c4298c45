"""The claim check on a real emulator: messages through S3, forged pointers, and the rules that make objects expire."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any
from uuid import uuid4

import pytest
import zstandard

from mdstore.compression import compress
from mdstore.errors import IntegrityError
from mdstore.local.emulator import EmbeddedAws
from mdstore.model import CLAIM_DAYS
from mdstore.provision import provision
from mdstore.queue.broker.claim_check import ClaimChecks
from mdstore.settings import load_settings
from mdstore.store import Store

LARGE = json.dumps(
    {"headers": {"task": "shop.report", "id": "t1"}, "body": [f"é{number}" for number in range(400_000)]}
)


class Environment:
    """A provisioned namespace and the claim checks in its bucket."""

    def __init__(self, url: str) -> None:
        environ = {**os.environ, "AWS_ENDPOINT_URL": url, "MDSTORE_NAMESPACE": f"claims-{uuid4().hex[:12]}"}
        self.settings = load_settings(environ).settings
        self.provisioned = list(provision(self.settings))
        self.store = Store(self.settings)
        self.s3 = self.store.aws.s3
        self.claim_checks = ClaimChecks(
            objects=self.store.objects,
            prefix=self.settings.claim_prefix,
            threshold=self.settings.claim_threshold,
            max_bytes=self.settings.max_claim_bytes,
        )

    def rules(self) -> dict[str, Any]:
        found = self.s3.get_bucket_lifecycle_configuration(Bucket=self.settings.bucket)["Rules"]
        return {str(rule["ID"]): rule for rule in found}


@pytest.fixture
def environment(aws: EmbeddedAws) -> Environment:
    return Environment(aws.url)


def test_a_large_message_goes_through_s3(environment: Environment) -> None:
    """A message of 5 MB, five times what SQS accepts, is stored in S3 and loaded by a pointer of less than 300 bytes."""
    assert len(LARGE) > 5 * 2**20
    pointer = environment.claim_checks.store(LARGE)
    assert len(pointer) < 300
    assert environment.claim_checks.load(pointer) == LARGE


@pytest.mark.parametrize("kind", ["missing", "bomb", "other content", "another prefix", "no zstd"])
def test_a_forged_pointer_is_refused(environment: Environment, kind: str) -> None:
    """A pointer is refused if its object is missing or does not match the digest; other prefixes are never read."""
    pointer = json.loads(environment.claim_checks.store(LARGE))
    digest = hashlib.sha256(b"forged").hexdigest()
    key = f"{pointer['days']}/{pointer['stored']}/{digest[:2]}/{digest}"
    content = {
        "missing": None,
        "bomb": zstandard.ZstdCompressor().compress(b"0" * 2**28),
        "other content": compress(b"other!"),
        "another prefix": compress(b"forged"),
        "no zstd": b"forged",
    }[kind]
    if content is not None:
        prefix = environment.settings.blob_prefix if kind == "another prefix" else environment.settings.claim_prefix
        environment.s3.put_object(Bucket=environment.settings.bucket, Key=f"{prefix}{key}", Body=content)
    with pytest.raises(IntegrityError, match=r"cannot be read|digest"):
        environment.claim_checks.load(json.dumps({**pointer, "digest": digest, "size": 6}))


def test_claims_expire_by_the_buckets_rules(environment: Environment) -> None:
    """The bucket has one rule per lifetime, and each rule covers its own prefix only."""
    assert [row for row in environment.provisioned if row[0] == "expiry"] == [
        ("expiry", f"claims/{days}/", True) for days in CLAIM_DAYS
    ]
    rules = environment.rules()
    assert {name: rule["Expiration"]["Days"] for name, rule in rules.items()} == {
        f"claims/{days}/": days for days in CLAIM_DAYS
    }
    assert all(rule["Filter"] == {"Prefix": name} and rule["Status"] == "Enabled" for name, rule in rules.items())
    (key,) = [
        item["Key"]
        for _ in [environment.claim_checks.store(LARGE)]
        for item in environment.s3.list_objects_v2(Bucket=environment.settings.bucket)["Contents"]
    ]
    assert key.startswith(f"claims/{CLAIM_DAYS[0]}/")


def test_rules_of_others_stay(environment: Environment) -> None:
    """S3 replaces all rules at once: `provision` repairs this project's rules and sends the team's own rules back unchanged."""
    own: Any = {
        "ID": "logs", "Filter": {"Prefix": "logs/"}, "Status": "Enabled", "Expiration": {"Days": 3},
    }  # fmt: skip
    broken: Any = {**environment.rules()["claims/45/"], "Status": "Disabled"}
    environment.s3.put_bucket_lifecycle_configuration(
        Bucket=environment.settings.bucket, LifecycleConfiguration={"Rules": [own, broken]}
    )
    for made in (True, False):
        rows = [row for row in provision(environment.settings) if row[0] == "expiry"]
        assert [created for _, _, created in rows] == [made] * len(CLAIM_DAYS)
        assert environment.rules()["logs"] == own
        assert environment.rules()["claims/45/"]["Status"] == "Enabled"
        assert len(environment.rules()) == 1 + len(CLAIM_DAYS)
