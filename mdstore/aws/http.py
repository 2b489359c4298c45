"""Signed HTTP calls to one AWS service: libcurl keeps the connections, signs (Signature Version 4) and sends.

botocore brings credentials and endpoints. The rest of a call happens inside libcurl, without Python's lock: a sixth of the CPU
that botocore's signer and session take (`docs/adr/0010-libcurl.md`).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, NamedTuple, Protocol

import pycurl
from botocore.exceptions import BotoCoreError
from botocore.httpsession import get_cert_path

from mdstore.errors import ConfigurationError, Unavailable

#: The oldest libcurl whose signatures were seen to be botocore's: 7.88 signs a header that it does not send.
_OLDEST = (8, 11, 1)


class Credentials(Protocol):
    """Botocore's refreshable credentials."""

    def get_frozen_credentials(self) -> Any:
        """Access key, secret key and token, refreshed when they are due."""


class Answer(NamedTuple):
    """What the service said, whatever its status. `headers` are the lines as they came."""

    status: int
    headers: list[bytes]
    body: bytes

    def header(self, name: bytes) -> bytes | None:
        """The value of header `name`, given in lower case with its colon."""
        for line in self.headers:
            if line[: len(name)].lower() == name:
                return line[len(name) :].strip()
        return None


class SignedHttp:
    """Calls to one service. Safe to share between threads, not across a fork; connections are kept.

    Raises `ConfigurationError` where the libcurl that pycurl brings cannot do it.
    """

    def __init__(
        self,
        *,
        service: str,
        region: str,
        credentials: Credentials,
        connect_timeout: float = 5.0,
        timeout: float = 20.0,
    ) -> None:
        _check_libcurl()
        self._credentials = credentials
        self._options: dict[int, Any] = {
            pycurl.NOSIGNAL: 1,  # a signal handler belongs to the main thread
            pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
            pycurl.TCP_NODELAY: 1,  # else a call waits 40 ms for the peer's delayed acknowledgement
            pycurl.CONNECTTIMEOUT_MS: round(connect_timeout * 1000),
            pycurl.TIMEOUT_MS: round(timeout * 1000),
            pycurl.AWS_SIGV4: f"aws:amz:{region}:{service}",
            pycurl.CAINFO: os.environ.get("AWS_CA_BUNDLE") or get_cert_path(True),
            pycurl.USERAGENT: "mdstore",
        }
        self._idle: deque[pycurl.Curl] = deque()
        self._parked: deque[ConcurrentCalls] = deque()

    def send(self, url: str, headers: Sequence[str] = (), body: bytes | None = None) -> Answer:
        """POST `body`, or GET. Raises `Unavailable` where there is no answer: the call may have taken effect."""
        call = self._prepare(url, headers, body)
        try:
            call.curl.perform()
        except pycurl.error as error:
            call.curl.close()
            raise _unavailable(*error.args) from error
        return self._completed(call)

    @contextmanager
    def concurrent_calls(self) -> Iterator[ConcurrentCalls]:
        """For calls that are under way at the same time."""
        concurrent_calls = self._parked.pop() if self._parked else ConcurrentCalls(self)
        try:
            yield concurrent_calls
        finally:
            if concurrent_calls:
                concurrent_calls.close()
            else:
                self._parked.append(concurrent_calls)

    def close(self) -> None:
        """Close the connections that are idle."""
        while self._parked:
            self._parked.pop().close()
        while self._idle:
            self._idle.pop().close()

    def _prepare(self, url: str, headers: Sequence[str], body: bytes | None) -> _Call:
        try:
            keys = self._credentials.get_frozen_credentials()
        except BotoCoreError as error:  # a role's keys could not be renewed
            raise Unavailable(str(error), code=type(error).__name__) from error
        lines = ["Expect:", *headers]  # "Expect: 100-continue" would cost a round trip
        if keys.token:
            lines.append(f"X-Amz-Security-Token: {keys.token}")
        call = _Call(self._idle.pop() if self._idle else self._new())
        curl = call.curl
        curl.setopt(pycurl.URL, url)
        curl.setopt(pycurl.USERPWD, f"{keys.access_key}:{keys.secret_key}")
        curl.setopt(pycurl.HTTPHEADER, lines)
        curl.setopt(pycurl.HEADERFUNCTION, call.headers.append)
        curl.setopt(pycurl.WRITEDATA, call.content)
        if body is None:
            curl.setopt(pycurl.HTTPGET, 1)
        else:
            curl.setopt(pycurl.POSTFIELDS, body)
        return call

    def _new(self) -> pycurl.Curl:
        curl = pycurl.Curl()
        for option, value in self._options.items():
            curl.setopt(option, value)
        return curl

    def _completed(self, call: _Call) -> Answer:
        status = call.curl.getinfo(pycurl.RESPONSE_CODE)
        self._idle.append(call.curl)
        return Answer(status, call.headers, call.content.getvalue())


class ConcurrentCalls:
    """Calls under way at the same time, driven by the one thread that waits for them."""

    def __init__(self, http: SignedHttp) -> None:
        self._http = http
        self._multi = pycurl.CurlMulti()
        self._under_way: dict[pycurl.Curl, tuple[Any, _Call]] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def start(self, tag: Any, url: str, headers: Sequence[str], body: bytes) -> None:
        """Begin a call; `tag` comes back with its answer."""
        call = self._http._prepare(url, headers, body)
        self._under_way[call.curl] = tag, call
        self._multi.add_handle(call.curl)
        self._multi.perform()  # what is written now need not wait for what is computed next

    def completed(self, timeout: float) -> list[tuple[Any, Answer | Unavailable]]:
        """The calls that have ended, as `(tag, answer or error)`; waits up to `timeout` seconds for the first."""
        found = self._collect()
        if not found and self._under_way:
            # At least once a second libcurl looks at its own timeouts; while it looks up a name there is nothing to select on.
            if self._multi.select(min(timeout, 1.0)) == -1:
                time.sleep(0.005)
            found = self._collect()
        return found

    def close(self) -> None:
        """Drop all, also what is under way."""
        for curl in self._under_way:
            self._multi.remove_handle(curl)
            curl.close()
        self._under_way.clear()
        self._multi.close()

    def _collect(self) -> list[tuple[Any, Answer | Unavailable]]:
        self._multi.perform()
        found: list[tuple[Any, Answer | Unavailable]] = []
        more = 1
        while more:
            more, ended, broken = self._multi.info_read()
            for curl in ended:
                tag, call = self._take(curl)
                found.append((tag, self._http._completed(call)))
            for curl, code, message in broken:
                tag, _ = self._take(curl)
                curl.close()
                found.append((tag, _unavailable(code, message)))
        return found

    def _take(self, curl: pycurl.Curl) -> tuple[Any, _Call]:
        self._multi.remove_handle(curl)
        return self._under_way.pop(curl)


class _Call:
    """A call to be, or under way."""

    __slots__ = ("content", "curl", "headers")

    def __init__(self, curl: pycurl.Curl) -> None:
        self.curl = curl
        self.content = BytesIO()
        self.headers: list[bytes] = []


def _check_libcurl() -> None:
    number, protocols = pycurl.version_info()[2], pycurl.version_info()[8]
    if (number >> 16, number >> 8 & 0xFF, number & 0xFF) < _OLDEST or "https" not in protocols:
        expected = "libcurl {}.{}.{} or later with TLS, as the wheels of pycurl 7.45.4 and later have it".format(
            *_OLDEST
        )
        raise ConfigurationError(key="pycurl", value=pycurl.version, expected=expected)


def _code(code: int) -> str:
    return f"Curl{code}"


#: The code of `Unavailable` where nothing listens.
NO_CONNECTION = _code(pycurl.E_COULDNT_CONNECT)


def _unavailable(code: int, message: str) -> Unavailable:
    return Unavailable(message, code=_code(code))
