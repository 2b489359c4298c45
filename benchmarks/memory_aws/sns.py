"""SNS in memory: topics that deliver messages to queues as they were published."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from xml.sax.saxutils import escape

from benchmarks.memory_aws.sqs import Sqs


class Sns:
    """All topics; their subscribers are queues of `sqs`."""

    def __init__(self, sqs: Sqs) -> None:
        self._sqs = sqs
        self._topics: dict[str, dict[str, str]] = {}  # the queue's ARN by the subscription's

    def call(self, action: str, fields: Mapping[str, str]) -> tuple[int, bytes]:
        """Make a call of the query protocol; return its status and XML."""
        found = getattr(self, f"_{action.lower()}", None)
        if found is None:
            return _error(400, "InvalidAction")
        try:
            return 200, _result(action, found(fields))
        except KeyError:  # there is no such topic
            return _error(404, "NotFound")

    def _createtopic(self, fields: Mapping[str, str]) -> str:
        arn = f"arn:aws:sns:us-east-1:000000000000:{fields['Name']}"
        self._topics.setdefault(arn, {})
        return f"<TopicArn>{arn}</TopicArn>"

    def _gettopicattributes(self, fields: Mapping[str, str]) -> str:
        _ = self._topics[fields["TopicArn"]]
        return "<Attributes></Attributes>"

    def _settopicattributes(self, fields: Mapping[str, str]) -> str:
        _ = self._topics[fields["TopicArn"]]
        return ""

    def _subscribe(self, fields: Mapping[str, str]) -> str:
        arn = f"{fields['TopicArn']}:{uuid.uuid4()}"
        self._topics[fields["TopicArn"]][arn] = fields["Endpoint"]
        return f"<SubscriptionArn>{arn}</SubscriptionArn>"

    def _unsubscribe(self, fields: Mapping[str, str]) -> str:
        self._topics[fields["SubscriptionArn"].rpartition(":")[0]].pop(fields["SubscriptionArn"], None)
        return ""

    def _listsubscriptionsbytopic(self, fields: Mapping[str, str]) -> str:
        members = "".join(
            f"<member><SubscriptionArn>{one}</SubscriptionArn><Protocol>sqs</Protocol><Owner>000000000000</Owner>"
            f"<Endpoint>{escape(queue)}</Endpoint><TopicArn>{fields['TopicArn']}</TopicArn></member>"
            for one, queue in self._topics[fields["TopicArn"]].items()
        )
        return f"<Subscriptions>{members}</Subscriptions>"

    def _publish(self, fields: Mapping[str, str]) -> str:
        for queue in self._topics[fields["TopicArn"]].values():
            self._sqs.deliver(queue.rpartition(":")[2], fields["Message"])
        return f"<MessageId>{uuid.uuid4()}</MessageId>"


def _error(status: int, code: str) -> tuple[int, bytes]:
    return (
        status,
        f"<ErrorResponse><Error><Code>{code}</Code><Message>{code}</Message></Error></ErrorResponse>".encode(),
    )


def _result(action: str, inner: str) -> bytes:
    return f"<{action}Response><{action}Result>{inner}</{action}Result></{action}Response>".encode()
