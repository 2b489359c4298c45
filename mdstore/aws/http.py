"""Signed HTTP calls to one AWS service. libcurl keeps the connections, signs (Signature Version 4) and sends.

botocore supplies credentials and endpoints. The rest of a call runs inside libcurl, without Python's lock, and takes a sixth of
the CPU that botocore's signer and session take (`docs/adr/0010-libcurl.md`).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from io import BytesIO
from typing import Any, NamedTuple, Protocol

import pycurl
from botocore.exceptions import BotoCoreError
from botocore.httpsession import get_cert_path

from mdstore.errors import ConfigurationError, Unavailable

#: The oldest libcurl whose signatures we found equal to botocore's. Version 7.88 signs a header that it does not send.
_OLDEST = (8, 11, 1)
_DATE_TOLERANCE = 2.0  # seconds: a `Date` header has whole seconds, and its response takes some time


class Credentials(Protocol):
    """The part of botocore's refreshable credentials that is used here."""

    def get_frozen_credentials(self) -> Any:
        """Return access key, secret key and token, after refreshing them if they are about to expire."""


class Answer(NamedTuple):
    """The service's response, whatever its status. `headers` holds the header lines unparsed."""

    status: int
    headers: list[bytes]
    body: bytes

    def header(self, name: bytes) -> bytes | None:
        """Return the value of header `name`, which is given in lower case and with its colon."""
        for line in self.headers:
            if line[: len(name)].lower() == name:
                return line[len(name) :].strip()
        return None


class SignedHttp:
    """Calls to one service, whose connections are kept for reuse. Threads may share it; forked processes may not.

    Raises `ConfigurationError` where pycurl's libcurl is too old or has no TLS.
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
            pycurl.TCP_NODELAY: 1,  # otherwise a call waits 40 ms for the peer's delayed acknowledgement
            pycurl.CONNECTTIMEOUT_MS: round(connect_timeout * 1000),
            pycurl.TIMEOUT_MS: round(timeout * 1000),
            pycurl.AWS_SIGV4: f"aws:amz:{region}:{service}",
            pycurl.CAINFO: os.environ.get("AWS_CA_BUNDLE") or get_cert_path(True),
            pycurl.USERAGENT: "mdstore",
        }
        self._idle: deque[pycurl.Curl] = deque()
        self._idle_concurrent: deque[ConcurrentCalls] = deque()
        self._last_headers: tuple[float, list[bytes]] | None = None  # and when they came, by the monotonic clock

    def send(self, url: str, headers: Sequence[str] = (), body: bytes | None = None) -> Answer:
        """POST `body`, or GET if it is None. Raises `Unavailable` if no response arrives; the call may have taken effect."""
        call = self._prepare(url, headers, body)
        try:
            call.curl.perform()
        except pycurl.error as error:
            call.curl.close()
            raise _unavailable(*error.args) from error
        return self._completed(call)

    @contextmanager
    def concurrent_calls(self) -> Iterator[ConcurrentCalls]:
        """Lend a `ConcurrentCalls` to one thread. Later callers reuse it with its connections."""
        concurrent_calls = self._idle_concurrent.pop() if self._idle_concurrent else ConcurrentCalls(self)
        try:
            yield concurrent_calls
        finally:
            if concurrent_calls:
                concurrent_calls.close()
            else:
                self._idle_concurrent.append(concurrent_calls)

    def server_time(self) -> float:
        """Return the time in Unix seconds by the `Date` of the service's last response.

        Return this machine's time if it agrees, and before the first response.
        """
        now = time.time()
        if self._last_headers is None:
            return now
        came_at, headers = self._last_headers
        value = Answer(0, headers, b"").header(b"date:") or b""
        try:
            date = parsedate_to_datetime(value.decode("latin-1")).timestamp()
        except ValueError:  # there is none, or it is no date
            return now
        server_now = date + time.monotonic() - came_at
        return now if abs(server_now - now) <= _DATE_TOLERANCE else server_now

    def close(self) -> None:
        """Close all idle connections."""
        while self._idle_concurrent:
            self._idle_concurrent.pop().close()
        while self._idle:
            self._idle.pop().close()

    def _prepare(self, url: str, headers: Sequence[str], body: bytes | None) -> _Call:
        try:
            keys = self._credentials.get_frozen_credentials()
        except BotoCoreError as error:  # the keys of a role could not be renewed
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
        self._last_headers = time.monotonic(), call.headers
        return Answer(status, call.headers, call.content.getvalue())


class ConcurrentCalls:
    """Calls that run at the same time, driven by the one thread that waits for them."""

    def __init__(self, http: SignedHttp) -> None:
        self._http = http
        self._multi = pycurl.CurlMulti()
        self._running: dict[pycurl.Curl, tuple[Any, _Call]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def start(self, tag: Any, url: str, headers: Sequence[str], body: bytes) -> None:
        """Start a call. `completed` returns `tag` with the call's response."""
        call = self._http._prepare(url, headers, body)
        self._running[call.curl] = tag, call
        self._multi.add_handle(call.curl)
        self._multi.perform()  # send now, before the caller goes on computing

    def completed(self, timeout: float) -> list[tuple[Any, Answer | Unavailable]]:
        """Return ended calls as `(tag, response or error)`, after waiting up to `timeout` seconds for the first one."""
        found = self._collect()
        if not found and self._running:
            # libcurl must run at least once a second to check its timeouts. During a DNS lookup, `select` returns -1 at once.
            if self._multi.select(min(timeout, 1.0)) == -1:
                time.sleep(0.005)
            found = self._collect()
        return found

    def close(self) -> None:
        """Close all connections and abandon the calls that are running."""
        for curl in self._running:
            self._multi.remove_handle(curl)
            curl.close()
        self._running.clear()
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
        return self._running.pop(curl)


class _Call:
    """One prepared or running call."""

    __slots__ = ("content", "curl", "headers")

    def __init__(self, curl: pycurl.Curl) -> None:
        self.curl = curl
        self.content = BytesIO()
        self.headers: list[bytes] = []


def _check_libcurl() -> None:
    number, protocols = pycurl.version_info()[2], pycurl.version_info()[8]
    if (number >> 16, number >> 8 & 0xFF, number & 0xFF) < _OLDEST or "https" not in protocols:
        expected = "libcurl {}.{}.{} or later with TLS, as in the wheels of pycurl 7.45.4 and later".format(*_OLDEST)
        raise ConfigurationError(key="pycurl", value=pycurl.version, expected=expected)


def _code(code: int) -> str:
    return f"Curl{code}"


#: The code of `Unavailable` where the connection was refused.
NO_CONNECTION = _code(pycurl.E_COULDNT_CONNECT)


def _unavailable(code: int, message: str) -> Unavailable:
    return Unavailable(message, code=_code(code))
