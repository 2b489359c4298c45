"""Create the second queue: run `python -m plain_celery_app.create_queue` after `mdstore provision`. It is safe to repeat."""

from __future__ import annotations

import json

from .app import REPORTS, app

DAY = 86_400


def main() -> None:
    """Create the queue of reports, with the same redrive policy as the first queue."""
    sqs, settings = app.aws.sqs, app.settings  # `app.aws.sqs` is boto3's client
    dead_letters = sqs.get_queue_url(QueueName=settings.dead_letter_queue)["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=dead_letters, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    # The worker dead-letters a message with its reason; SQS would move it without one, so its limit is one delivery higher.
    redrive = {"deadLetterTargetArn": arn, "maxReceiveCount": str(settings.max_receives + 1)}
    sqs.create_queue(
        QueueName=REPORTS,
        Attributes={
            "VisibilityTimeout": str(settings.visibility_timeout),
            "MessageRetentionPeriod": str(14 * DAY),
            "RedrivePolicy": json.dumps(redrive),
        },
    )
    print(f"queue {REPORTS} exists")


if __name__ == "__main__":
    main()
