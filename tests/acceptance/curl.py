"""A `curl` for the lines of READMEs: not every machine has the program, but its library, libcurl, comes with mdstore.

    python tests/acceptance/curl.py [-i] [-X METHOD] [-H HEADER]... [-d BODY] URL

The options mean to libcurl what they mean to curl, which is a thin front of it. A status of 400 or more is an error, as with
curl's `--fail`; an option that is not listed is an error, too.
"""

from __future__ import annotations

import argparse
import shlex
import sys

import pycurl

#: Defines `curl` for the commands of bash that follow.
BASH_FUNCTION = f'curl() {{ {shlex.quote(sys.executable)} {shlex.quote(__file__)} "$@"; }}\n'


def main() -> None:
    """Make one call, and print the body of its answer."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("-i", dest="with_head", action="store_true")
    parser.add_argument("-X", dest="method")
    parser.add_argument("-H", dest="headers", action="append", default=[])
    parser.add_argument("-d", dest="body")
    parser.add_argument("url")
    given = parser.parse_args()
    call = pycurl.Curl()
    call.setopt(pycurl.URL, given.url)
    call.setopt(pycurl.HTTPHEADER, given.headers)
    call.setopt(pycurl.HEADER, given.with_head)
    call.setopt(pycurl.FAILONERROR, 1)
    call.setopt(pycurl.WRITEDATA, sys.stdout.buffer)
    if given.body is not None:
        call.setopt(pycurl.POSTFIELDS, given.body.encode())
    if given.method is not None:
        call.setopt(pycurl.CUSTOMREQUEST, given.method)
    try:
        call.perform()
    except pycurl.error as error:
        sys.exit(f"curl: {error}")
    finally:
        call.close()


if __name__ == "__main__":
    main()
