"""microburst as a process of its own: a proxy that answers with AWS's own errors, or damages the answers of its upstream.

`python -m tests.chaos.faults PORT UPSTREAM` runs it. Its pitfalls: if several rules match, only one applies; a misspelt key of
a rule is accepted and ignored; `abort_bytes` has no effect on an answer without a body; `resource` does not match the tables
of a transaction; and every answer is sent in chunks, so none can be shorter than its Content-Length.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mdstore.local.emulator import free_port
from mdstore.local.stack import kill_group
from tests.waiting import until

ROOT = Path(__file__).parents[2]
#: Bytes. aiohttp refuses bodies over 1 MiB by default; a transaction has up to 4 MB.
MAX_BODY = 2**27
Rule = dict[str, Any]


class Faults:
    """A microburst in front of `upstream`. Use it as a context manager."""

    def __init__(self, upstream: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._upstream = upstream
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.chaos.faults", str(self.port), self._upstream]
        self._process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        until(self._is_up, within=30, what="microburst answers")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            kill_group(self._process)

    def set(self, *rules: Rule) -> list[int]:
        """Replace all rules; returns the ids of the new ones."""
        return [rule["id"] for rule in self._control("rules", list(rules))]

    def times_applied(self, rule: int) -> int:
        """Return how often a rule was applied, even if it has been replaced since."""
        return next((one["fired"] for one in self._control("stats")["by_rule"] if one["id"] == rule), 0)

    def _is_up(self) -> bool:
        try:
            return bool(self._control("health"))
        except urllib.error.URLError:
            return False

    def _control(self, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(  # noqa: S310  our own child
            f"{self.url}/_microburst/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return json.load(answer)


def main(port: int, upstream: str) -> None:
    """Run microburst until SIGTERM."""
    from aiohttp import web  # noqa: PLC0415  the tests themselves need neither
    from microburst.control import CONTROL_PREFIX  # type: ignore[import-untyped]  # noqa: PLC0415
    from microburst.core.pipeline import Microburst  # type: ignore[import-untyped]  # noqa: PLC0415

    proxy = Microburst(upstream)
    app = web.Application(client_max_size=MAX_BODY)
    app.on_startup.append(proxy.start)
    app.on_cleanup.append(proxy.stop)
    app.router.add_route("*", CONTROL_PREFIX + "/{tail:.*}", proxy.handle_control)
    app.router.add_route("*", "/{tail:.*}", proxy.handle_proxy)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
