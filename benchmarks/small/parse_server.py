"""The least that the HTTP API could do: `python -m benchmarks.small.parse_server PORT`.

The server is that of `mdstore api` with all its settings, but its application only parses a JSON body and answers 202.
"""

from __future__ import annotations

import sys
import uuid
from unittest import mock

import msgspec
from starlette.types import Receive, Scope, Send

from mdstore.api import server
from mdstore.api.connections import Connections
from mdstore.settings import Settings, load_settings


class ParseAndAnswer:
    """The application."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call, or the lifespan."""
        if scope["type"] == "lifespan":
            scope["state"].update(connections=Connections(self._settings))
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
            return
        body, is_more = b"", True
        while is_more:
            message = await receive()
            body += message["body"]
            is_more = message.get("more_body", False)
        msgspec.json.decode(body)
        request_id = str(uuid.uuid4())
        text = msgspec.json.encode({"request_id": request_id, "status_url": f"/v1/requests/{request_id}"})
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": 202, "headers": headers})
        await send({"type": "http.response.body", "body": text})


def main(port: int) -> None:
    """Serve until the process is stopped."""
    with mock.patch.object(server, "create_api", ParseAndAnswer):
        server.serve(load_settings().settings, host="127.0.0.1", port=port)


if __name__ == "__main__":
    main(int(sys.argv[1]))
