"""moto as a process: `python -m tests.conformance.moto_process` prints its port and runs until its standard input ends."""

from __future__ import annotations

import logging
import os
import sys

from moto.server import ThreadedMotoServer


def main() -> None:
    """Run moto's server on a free port of the loopback address."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # by default it logs a line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)  # the parent waits for it
    sys.stdin.read()
    os._exit(0)  # there is nothing to clean up, and an orderly exit takes seconds


if __name__ == "__main__":
    main()
