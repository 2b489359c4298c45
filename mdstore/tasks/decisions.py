"""The policy: what becomes of a message whose task has ended, decided as a value. `StoreTask` carries it out."""

from __future__ import annotations

from dataclasses import dataclass

from mdstore.errors import DeploymentBroken, IntegrityError, Unavailable

#: Seconds that a postponed message waits at most; the wait is drawn at random, so that messages do not come back together.
POSTPONED = 5.0


@dataclass(frozen=True, kw_only=True)
class Deliveries:
    """How often SQS has delivered a message, this time included, and how often a worker executes it at most."""

    count: int
    limit: int

    @property
    def is_last(self) -> bool:
        """Whether no further delivery will be executed."""
        return self.count >= self.limit


@dataclass(frozen=True)
class Done:
    """Delete the message."""


@dataclass(frozen=True)
class Postpone:
    """Send the message again, to be visible within `seconds`. It spends no delivery."""

    seconds: float


@dataclass(frozen=True)
class DeadLetter:
    """Keep the message among the dead letters, with its `reason`: executing it again would end the same way."""

    reason: str


@dataclass(frozen=True)
class Redeliver:
    """Give the message back to the queue. Where it `gives_up`, this was the last delivery: the message is dead-lettered."""

    gives_up: bool


@dataclass(frozen=True)
class Pause:
    """Give the message back because the deployment is broken, which no other message would survive either."""

    gives_up: bool


Decision = Done | Postpone | DeadLetter | Redeliver | Pause


def decide(error: Exception | None, deliveries: Deliveries) -> Decision:
    """What becomes of a message whose task raised `error`, or None where it ended well."""
    match error:
        case None:
            return Done()
        case Unavailable():  # throttled, or out of reach
            return Postpone(POSTPONED)
        case IntegrityError():  # forged, or damaged
            return DeadLetter(str(error))
        case DeploymentBroken():
            return Pause(gives_up=deliveries.is_last)
        case _:
            return Redeliver(gives_up=deliveries.is_last)
