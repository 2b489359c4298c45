"""The command line. Results go to standard output (with `--json` as one JSON value), progress and messages to standard error.

Exit codes: 0 done; 1 an error, or an operation failed; 2 wrong usage; 3 some operations were refused; 4 no such record
or request; 5 verification found a fault; 130 interrupted.
"""

from __future__ import annotations

import click

from mdstore.cli import deployment, processes, records, requests


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mdstore")
def main() -> None:
    """A master data store on DynamoDB, fed through S3, SQS and Celery."""


for command in (
    processes.up, deployment.provision, processes.worker, processes.api, processes.flower,
    requests.load, requests.status, requests.verify,
    records.get, records.export,
    deployment.key, deployment.config,
):  # fmt: skip
    main.add_command(command)
