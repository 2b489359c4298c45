"""What is recorded of the data store: requests in every state, and what is expected of each. Values are written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

from mdstore import Client, Unavailable
from tests.compat.corpus import Environment
from tests.compat.post import DENIED, NOT_NOW, Post, arguments, execute

Operation = dict[str, Any]

#: Bytes of one operation; the recorder's limit, so that an operation over it is refused.
MAX_RECORD_BYTES = 600_000
#: Operations of a lane of the requests that have several.
NARROW = 6
LARGE = "x" * 450_000  # more than an item holds
ODD = {
    "composed": "\u00e9",
    "decomposed": "e\u0301",
    "family": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "right to left": "\u202eabc\u202c \u05d0\u05d1",
    "controls": "\u0000\u0001\u007f\u0085\u2028\ufeff",
    "noncharacters": "\uffff\U0010ffff",
    "escapes": "\"\\/\b\f\n\r\t",
    "\u0130 \ufb01 \u00df": "names too",
    "": "an empty name",
    "empty": "",
}  # fmt: skip
NUMBERS = {
    "38 digits": 12345678901234567890123456789012345678,
    "38 negative": -98765432109876543210987654321098765432,
    "38 in a fraction": Decimal("0.12345678901234567890123456789012345678"),
    "largest": Decimal("9.9999999999999999999999999999999999999E+125"),
    "smallest": Decimal("1E-130"),
    "trailing zero": Decimal("1.50"),
    "zero": 0,
    "beyond a double": 9007199254740993,
}
NESTED = {
    "name": "Pennsylvania Station", "open": True, "closed": False, "nothing": None, "empty map": {}, "empty list": [],
    "tracks": [1, "1a", {"side": "left", "lengths": [[1, 2], [3]]}],
}  # fmt: skip

SEED: list[Operation] = [
    {"op": "insert", "entity": "station", "key": "NYP", "data": NESTED},
    {"op": "insert", "entity": "text", "key": "na\u00efve/\u9375/\U0001f6ec #%?", "data": ODD},
    {"op": "insert", "entity": "number", "key": "limits", "data": NUMBERS},
    {"op": "insert", "entity": "large", "key": "one", "data": {"text": LARGE, "n": 1}},
    {"op": "insert", "entity": "order", "key": "1", "data": {"n": 1}, "sequence": 100},
    {"op": "insert", "entity": "order", "key": "2", "data": {"n": 2}},
    {"op": "upsert", "entity": "order", "key": "3", "data": {"n": 3}, "sequence": 5},
    {"op": "insert", "entity": "thing", "key": "back", "data": {"n": 0}},
    {"op": "insert", "entity": "thing", "key": "kept", "data": {"n": 0}},
]
EVERY: list[Operation] = [
    {"op": "insert", "entity": "station", "key": "NYP", "data": {"name": "another"}},
    {"op": "update", "entity": "station", "key": "NYP", "data": {"name": "Penn", "tracks": 21}, "expect_version": 1},
    {"op": "patch", "entity": "station", "key": "NYP", "data": {"tracks": None, "city": "New York"}},
    {"op": "upsert", "entity": "order", "key": "1", "data": {"n": 99}, "sequence": 99},
    {"op": "upsert", "entity": "order", "key": "1", "data": {"n": 101}, "sequence": 101},
    {"op": "delete", "entity": "order", "key": "2"},
    {"op": "delete", "entity": "order", "key": "3", "sequence": 6},
    {"op": "update", "entity": "thing", "key": "absent", "data": {}},
    {"op": "check", "entity": "thing", "key": "kept", "expect_version": 1, "group": "passes"},
    {"op": "insert", "entity": "thing", "key": "grouped", "data": {"n": 1}, "group": "passes"},
    {"op": "check", "entity": "thing", "key": "kept", "expect_version": 9, "group": "fails"},
    {"op": "insert", "entity": "thing", "key": "lost", "data": {"n": 1}, "group": "fails"},
    {"op": "insert", "entity": "thing", "key": "without data"},
    {"op": "upsert", "entity": "thing", "key": "huge", "data": {"text": "y" * 700_000}},
    {"op": "delete", "entity": "thing", "key": "back"},
    {"op": "insert", "entity": "thing", "key": "back", "data": {"n": 1}},
    {"op": "patch", "entity": "large", "key": "one", "data": {"n": 2}},
]
EVERY_REFUSED = {
    0: "exists", 3: "stale", 7: "missing", 10: "version_mismatch", 11: "group_refused", 12: "invalid", 13: "too_large",
}  # fmt: skip
ORDER: list[Operation] = [
    {"op": "upsert", "entity": "invoice", "key": "2026/1", "data": {"total": Decimal("12.5"), "paid": False}}
]
ACCEPTED: list[Operation] = [
    {"op": "insert", "entity": "pair", "key": "accepted/0", "data": {"text": LARGE, "digits": NUMBERS["38 digits"]}}
]
#: Operations of half-done requests that were applied: two lanes, or one, and the first transaction of one more.
SO_FAR = {
    "half-chord": [0, 7, 8, 15, 4, 6, 12, 14, 1, 2, 3, 5],
    "half-again": [0, 2, 8, 10, 3, 7],
}
NONSENSE: list[Operation] = [{"op": "upsert", "entity": "thing", "key": "without data either"}]


def pairs(name: str) -> list[Operation]:
    """Eight keys that are inserted and then patched: lanes of two transactions, one after the other."""
    keys = [f"{name}/{number}" for number in range(8)]
    inserts = [{"op": "insert", "entity": "pair", "key": key, "data": {"a": 1, "b": 1}} for key in keys]
    return inserts + [{"op": "patch", "entity": "pair", "key": key, "data": {"b": None, "c": key}} for key in keys]


class StoreScenes:
    """Plays requests up to a state. `requests` and `expected` go into the corpus."""

    def __init__(self, environment: Environment, post: Post, url: str) -> None:
        self._environment = environment
        self._post = post
        common = {"AWS_ENDPOINT_URL": url, "MDSTORE_MAX_RECORD_BYTES": str(MAX_RECORD_BYTES)}
        self._client = Client(environment.settings_with(**common))
        self._narrow = Client(environment.settings_with(**common, MDSTORE_LANE_OPERATIONS=str(NARROW)))
        self.requests: dict[str, dict[str, Any]] = {}
        self.expected: dict[str, Any] = {}
        self._records: list[dict[str, Any]] = []

    def play(self) -> None:
        """Play all scenes."""
        self._play_one_lane()
        self._play_many_lanes()
        self._play_accepted()
        self._play_half_done()
        self._play_failed()
        self._play_unsent()
        self._make_key()
        self.expected["records"] = self._records

    def _submit(self, name: str, operations: list[Operation], *, narrow: bool = False, **options: str) -> None:
        client: Any = self._narrow if narrow else self._client
        self.requests[name] = {"operations": operations, **options}
        client.submit(operations, request_id=name, **options)

    def _execute(self, letter: Any, *, receives: int = 1) -> None:
        execute(self._client.app, letter, receives=receives)

    # -- scenes

    def _play_one_lane(self) -> None:
        """Requests that one message applies: records of all kinds, every op, refusals, nothing at all."""
        self._submit("seed", SEED)
        self._execute(self._post.one("ingest seed"))
        self._submit("every", EVERY, on_invalid="refuse")
        self._execute(self._post.one("ingest every"))
        self._submit("erp:order-1", ORDER, source="erp")
        self._execute(self._post.one("ingest order"))
        self._submit("nonsense", NONSENSE, on_invalid="refuse")
        self._execute(self._post.one("ingest nonsense"))
        self._expect_records()
        self._expect("seed", SEED, superseded=6)
        self._expect("every", EVERY, refused=EVERY_REFUSED)
        self._expect("erp:order-1", ORDER, source="erp")
        self._expect("nonsense", NONSENSE, refused={0: "invalid"}, lanes=0)

    def _play_many_lanes(self) -> None:
        """A request whose lanes are a chord, from its first message to its last."""
        lanes = self._spread("many-lanes", source="erp")
        for letter in lanes:
            self._execute(letter)
        self._execute(self._post.one("finish many-lanes"))
        self._expect("many-lanes", pairs("many-lanes"), source="erp", lanes=3)
        self._expect_pairs("many-lanes")

    def _play_accepted(self) -> None:
        """Requests that no worker has seen, of one lane and of several."""
        self._submit("accepted", ACCEPTED)
        self._post.one("ingest accepted")
        self._submit("accepted-lanes", pairs("accepted-lanes"), narrow=True)
        self._post.one("ingest accepted-lanes")
        effects = [["pair", "accepted/0", 1, ACCEPTED[0]["data"]]]
        self._expect("accepted", ACCEPTED, state="accepted", effects=effects)
        self._expect("accepted-lanes", pairs("accepted-lanes"), lanes=3, state="accepted")

    def _play_half_done(self) -> None:
        """Requests with a lane done, and one that was denied its second transaction; `half-chord` lacks this lane only."""
        for name, is_alone in (("half-chord", True), ("half-again", False)):
            first, second, third = self._spread(name)
            self._execute(first)
            if is_alone:
                self._execute(third)
            with self._post.refusing("TransactWriteItems", DENIED, after=1):
                self._execute(second)
            counts = [8 if is_alone else 4, 0, 0]  # a lane is counted when it is done
            self._expect(
                name,
                pairs(name),
                lanes=3,
                state="running",
                counts=counts,
                so_far=dict.fromkeys(SO_FAR[name], "applied"),
            )

    def _play_failed(self) -> None:
        """A request one of whose lanes was denied its second transaction at the last delivery."""
        first, second, third = self._spread("failed")
        self._execute(first)
        with self._post.refusing("TransactWriteItems", DENIED, after=1):
            self._execute(second, receives=self._client.settings.max_receives)
        self._execute(third)
        so_far = {index: "failed" if index in (11, 15) else "applied" for index in range(16)}
        self._expect("failed", pairs("failed"), lanes=3, state="failed", counts=[14, 0, 2], so_far=so_far)

    def _play_unsent(self) -> None:
        """A request whose payload is stored, and whose message could not be sent."""
        with self._post.refusing("SendMessageBatch", NOT_NOW), suppress(Unavailable):
            self._submit("stored", pairs("stored"), narrow=True)
        self._expect("stored", pairs("stored"), lanes=3, state="accepted")

    def _make_key(self) -> None:
        """An API key."""
        made = self._environment.mdstore("key", "create", "--source", "erp")
        self.expected["key"] = made.stdout.strip()

    def _spread(self, name: str, **options: str) -> Sequence[Any]:
        """Submit a request of three lanes and execute its first message; returns the lanes' messages in order."""
        self._submit(name, pairs(name), narrow=True, **options)
        self._execute(self._post.one(f"ingest {name}"))
        letters = sorted(self._post.take("", "", ""), key=lambda letter: int(arguments(letter)[1]))
        self._post.kept |= {f"lane {number} of {name}": letter for number, letter in enumerate(letters)}
        return letters

    # -- what is expected

    def _expect(
        self,
        name: str,
        operations: list[Operation],
        *,
        refused: dict[int, str] | None = None,
        source: str = "default",
        lanes: int = 1,
        state: str = "completed",
        counts: list[int] | None = None,
        so_far: dict[int, str] | None = None,
        superseded: int = 0,
        effects: list[Any] | None = None,
    ) -> None:
        """Note what a request is. Where it is not completed, `counts` and the outcomes `so_far` are those of a status.

        `effects` are the records that it leaves when it is completed by a replay, those of `pairs` if none are given.
        """
        refused = refused or {}
        outcomes = [[index, "refused", refused[index]] if index in refused else [index, "applied", ""]
                    for index in range(len(operations))]  # fmt: skip
        request = {
            "source": source,
            "lanes": lanes,
            "state": state,
            "operations": len(operations),
            "counts": counts
            or ([len(operations) - len(refused), len(refused), 0] if state == "completed" else [0, 0, 0]),
            "outcomes": sorted(outcomes),
            "superseded": superseded,
        }
        item = self._environment.dynamodb.get_item(
            TableName=self._environment.table("ledger"), Key={"pk": {"S": name}, "sk": {"S": "request"}}
        )
        if "Item" in item:
            request["accepted_at"] = int(item["Item"]["accepted_at"]["N"])
        if state != "completed":
            request["outcomes_so_far"] = [[index, outcome, ""] for index, outcome in sorted((so_far or {}).items())]
            request["effects"] = effects or [["pair", f"{name}/{n}", 2, {"a": 1, "c": f"{name}/{n}"}] for n in range(8)]
        self.expected.setdefault("requests", {})[name] = request

    def _expect_records(self) -> None:
        penn = {"name": "Penn", "city": "New York"}
        for entity, key, version, data, sequence in [
            ("station", "NYP", 3, penn, None),
            ("text", "na\u00efve/\u9375/\U0001f6ec #%?", 1, ODD, None),
            ("number", "limits", 1, NUMBERS, None),
            ("large", "one", 2, {"text": LARGE, "n": 2}, None),
            ("order", "1", 2, {"n": 101}, 101),
            ("order", "2", 2, None, None),
            ("order", "3", 2, None, 6),
            ("thing", "back", 3, {"n": 1}, None),
            ("thing", "kept", 1, {"n": 0}, None),
            ("thing", "grouped", 1, {"n": 1}, None),
            ("invoice", "2026/1", 1, {"total": Decimal("12.5"), "paid": False}, None),
        ]:
            self._expect_record(entity, key, version, data, sequence)

    def _expect_pairs(self, name: str) -> None:
        for number in range(8):
            self._expect_record("pair", f"{name}/{number}", 2, {"a": 1, "c": f"{name}/{number}"}, None)

    def _expect_record(self, entity: str, key: str, version: int, data: Any, sequence: int | None) -> None:
        item = self._environment.dynamodb.get_item(
            TableName=self._environment.table("records"), Key={"pk": {"S": f"{entity}#{key}"}}
        )["Item"]
        self._records.append(
            {
                "entity": entity, "key": key, "version": version, "data": data, "sequence": sequence,
                "updated_at": int(item["updated_at"]["N"]), "updated_by": item["updated_by"]["S"],
            }
        )  # fmt: skip
