"""Create the second queue: `python -m plain_celery_app.create_queue`, once, after `mdstore provision`; safe to repeat."""

from __future__ import annotations

import json

from .app import REPORTS, app

DAY = 86_400


def main() -> None:
    """Create the queue of reports, with the same redrive policy as the first queue."""
    sqs, settings = app.aws.sqs, app.settings  # `app.aws.sqs` is boto3's client
    dead_letters = sqs.get_queue_url(QueueName=settings.dead_letter_queue)["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=dead_letters, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    # SQS moves a message away one delivery after the worker gives up, because the worker also says why.
    redrive = {"deadLetterTargetArn": arn, "maxReceiveCount": str(settings.max_receives + 1)}
    sqs.create_queue(
        QueueName=REPORTS,
        Attributes={
            "VisibilityTimeout": str(settings.visibility_timeout),
            "MessageRetentionPeriod": str(14 * DAY),
            "RedrivePolicy": json.dumps(redrive),
        },
    )
    print(f"queue {REPORTS} is there")


if __name__ == "__main__":
    main()
