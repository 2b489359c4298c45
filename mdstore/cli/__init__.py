"""The command line.

Results go to standard output, with `--json` as one JSON value. Progress and messages go to standard error. The help text of
`mdstore` lists the exit codes.
"""

from __future__ import annotations

import click

from mdstore.cli import deployment, load, processes, records, requests

_EXIT_CODES = (
    "Exit codes: 0 success; 1 an error, or an operation failed; 2 wrong usage; 3 some operations were refused;"
    " 4 no such record or request; 5 verification found a fault; 6 `load` stopped waiting for a request, which continues;"
    " 130 interrupted."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EXIT_CODES)
@click.version_option(package_name="mdstore")
def main() -> None:
    """A master data store on DynamoDB, fed through S3, SQS and Celery."""


for command in (
    processes.up, deployment.provision, processes.worker, processes.api, processes.flower,
    load.load, requests.status, requests.verify,
    records.get, records.export,
    deployment.key, deployment.config,
):  # fmt: skip
    main.add_command(command)
