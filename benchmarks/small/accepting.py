"""Requests that are accepted and not yet applied: by the HTTP API, by one that only parses and answers, and by `seed-like`."""

from __future__ import annotations

import os
from unittest import mock

from benchmarks.alone import alone
from benchmarks.load import Answers, Order, make_calls
from benchmarks.peers.seed_like import Producer
from benchmarks.pipeline import provision_peers
from benchmarks.results import Row
from benchmarks.services import environ_of, http_api, memory_aws, server
from benchmarks.small import rates
from benchmarks.small.calls import api_key, post
from benchmarks.small.rates import LATENCY_MS, Submitted, requests_of_one, submit_all

_CLIENTS = 32
PARSE, SEED_LIKE = "parse and answer", f"{rates.SEED_LIKE}'s producer"


def rows(count: int) -> list[Row]:
    """Measure."""
    return [{"what": name, **measure(count)} for name, measure in _MEASURED.items()]


def _api(count: int) -> Row:
    with (
        memory_aws(LATENCY_MS) as settings,
        mock.patch.dict(os.environ, environ_of(settings)),
        http_api() as api,
    ):
        return _posts(api.port, post(api_key(settings)), count)


def _parse(count: int) -> Row:
    with server("benchmarks.small.parse_server") as found:
        return _posts(found.port, post("any"), count)


def _posts(port: int, call: str, count: int) -> Row:
    warm_up = 2 * _CLIENTS
    make_calls(Order(port=port, clients=_CLIENTS, call=call, calls=warm_up), expected=202)
    return _row(make_calls(Order(port=port, clients=_CLIENTS, call=call, calls=count, first=warm_up), expected=202))


def _seed_like(count: int) -> Row:
    return alone(_producer, count)


def _producer(count: int) -> Row:
    with memory_aws(LATENCY_MS) as settings, mock.patch.dict(os.environ, environ_of(settings)):
        provision_peers()
        submits = [Producer().submit] * _CLIENTS
        submit_all(submits, requests_of_one(2 * _CLIENTS))
        return _row(submit_all(submits, requests_of_one(count)))


def _row(found: Answers | Submitted) -> Row:
    return {
        "accepted_per_s": found.rate,
        "p50_ms": found.milliseconds(0.5),
        "p99_ms": found.milliseconds(0.99),
    }


_MEASURED = {PARSE: _parse, "mdstore api": _api, SEED_LIKE: _seed_like}
