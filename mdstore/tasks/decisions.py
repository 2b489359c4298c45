"""The policy for a message whose task has ended. `decide` returns the decision as a value; `StoreTask` carries it out."""

from __future__ import annotations

from dataclasses import dataclass

from mdstore.errors import DeploymentBroken, IntegrityError, LaneUnfinished, Unavailable

#: The longest wait of a postponed message, in seconds. Waits are random, so that postponed messages do not return all at once.
POSTPONED = 5.0


@dataclass(frozen=True, kw_only=True)
class Deliveries:
    """How often SQS has delivered a message (including this time), and the most deliveries that workers execute."""

    count: int
    limit: int

    @property
    def is_last(self) -> bool:
        """Return whether workers will execute no further delivery of the message."""
        return self.count >= self.limit


@dataclass(frozen=True)
class Done:
    """Delete the message."""


@dataclass(frozen=True)
class Continue:
    """Send the message again at once, behind others, for the rest of its work. This does not count as a delivery."""


@dataclass(frozen=True)
class Postpone:
    """Send the message again, with a random delay of at most `seconds`. This does not count as a delivery."""

    seconds: float


@dataclass(frozen=True)
class DeadLetter:
    """Move the message to the dead-letter queue with its `reason`, because executing it again would fail the same way."""

    reason: str


@dataclass(frozen=True)
class Redeliver:
    """Return the message to the queue. `gives_up` means that this was the last delivery, so the message is dead-lettered."""

    gives_up: bool


@dataclass(frozen=True)
class Pause:
    """Return the message to the queue because the deployment is broken: any other message would fail too."""

    gives_up: bool


Decision = Done | Continue | Postpone | DeadLetter | Redeliver | Pause


def decide(error: Exception | None, deliveries: Deliveries) -> Decision:
    """Decide what becomes of a message whose task raised `error`; None means that the task succeeded."""
    match error:
        case None:
            return Done()
        case LaneUnfinished():
            return Continue()
        case Unavailable():  # throttled or unreachable
            return Postpone(POSTPONED)
        case IntegrityError():  # forged or damaged
            return DeadLetter(str(error))
        case DeploymentBroken():
            return Pause(gives_up=deliveries.is_last)
        case _:
            return Redeliver(gives_up=deliveries.is_last)
