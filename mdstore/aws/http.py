"""Signed HTTP calls to one AWS service. libcurl keeps the connections, signs (Signature Version 4) and sends.

botocore supplies credentials and endpoints. The rest of a call runs inside libcurl, without Python's lock, and takes a sixth of
the CPU that botocore's signer and session take (`docs/adr/0010-libcurl.md`).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from io import BytesIO
from typing import IO, Any, NamedTuple, Protocol, TypeVar

import pycurl
from botocore.exceptions import BotoCoreError
from botocore.httpsession import get_cert_path

from mdstore.aws.forks import note_socket
from mdstore.aws.transfers import ThreadTransfers, Transfers
from mdstore.errors import ConfigurationError, Unavailable

#: The oldest libcurl whose signatures we found equal to botocore's. Version 7.88 signs a header that it does not send.
_OLDEST = (8, 11, 1)
T = TypeVar("T")
_BYTES_PER_MS = 1_000  # the lowest upload rate that time limits allow for: 1 MB a second
_DATE_TOLERANCE = 2.0  # seconds: a `Date` header has whole seconds, and its response takes some time


class Credentials(Protocol):
    """The part of botocore's refreshable credentials that is used here."""

    def get_frozen_credentials(self) -> Any:
        """Return access key, secret key and token, after refreshing them if they are about to expire."""


class Response(NamedTuple):
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


class Upload(NamedTuple):
    """The body of a PUT: `size` bytes from the start of `content`."""

    content: IO[bytes]
    size: int


#: A request's body: None makes it a GET, bytes a POST.
Body = bytes | Upload | None


class SignedHttp:
    """Calls to one service, whose connections are kept for reuse. Threads may share it; forked processes may not.

    A call ends within `timeout` seconds; an upload gets one more second per megabyte.

    Raises `ConfigurationError` if pycurl's libcurl is too old or has no TLS.
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
            pycurl.AWS_SIGV4: f"aws:amz:{region}:{service}",
            pycurl.CAINFO: os.environ.get("AWS_CA_BUNDLE") or get_cert_path(True),
            pycurl.USERAGENT: "mdstore",
            pycurl.SOCKOPTFUNCTION: note_socket,
        }
        self._timeout_ms = round(timeout * 1000)
        self._idle: deque[pycurl.Curl] = deque()
        # Not `_idle`: libcurl closes the connection of a handle when the handle joins concurrent calls.
        self._idle_in_concurrent: deque[pycurl.Curl] = deque()
        self._idle_concurrent: deque[ConcurrentCalls] = deque()
        self._last_headers: tuple[float, list[bytes]] | None = None  # when they arrived (monotonic), and the lines

    def send(self, url: str, headers: Sequence[str] = (), body: Body = None) -> Response:
        """Make a call and return its response. Raises `Unavailable` if none arrives; the call may have taken effect."""
        call = self._prepare(self._idle, url, headers, body)
        try:
            call.curl.perform()
        except pycurl.error as error:
            call.curl.close()
            raise _unavailable(*error.args) from error
        answer = call.completed()
        if isinstance(answer, Unavailable):
            raise answer
        self._last_headers = time.monotonic(), answer.headers
        return answer

    @contextmanager
    def concurrent_calls(self) -> Iterator[ConcurrentCalls]:
        """Lend a `ConcurrentCalls` to one thread. Later callers reuse it with its connections."""
        idle = _pop(self._idle_concurrent)
        concurrent_calls = ConcurrentCalls(self) if idle is None else idle  # not `or`: it is false while no calls run
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
        value = Response(0, headers, b"").header(b"date:") or b""
        try:
            date = parsedate_to_datetime(value.decode("latin-1")).timestamp()
        except ValueError:  # the `Date` is missing or malformed
            return now
        server_now = date + time.monotonic() - came_at
        return now if abs(server_now - now) <= _DATE_TOLERANCE else server_now

    def must_renew_keys(self) -> bool:
        """Return whether the next call renews the keys of a role first, which blocks its thread."""
        refresh_needed = getattr(self._credentials, "refresh_needed", None)  # fixed keys have no such method
        return refresh_needed is not None and bool(refresh_needed())

    def renew_keys(self) -> None:
        """Renew the keys of a role if they are about to expire. A failure shows in the next call."""
        with suppress(BotoCoreError):
            self._credentials.get_frozen_credentials()

    def close(self) -> None:
        """Close all idle connections."""
        while self._idle_concurrent:
            self._idle_concurrent.pop().close()
        for idle in (self._idle, self._idle_in_concurrent):
            while idle:
                idle.pop().close()

    def _prepare(self, idle: deque[pycurl.Curl], url: str, headers: Sequence[str], body: Body) -> _Call:
        try:
            keys = self._credentials.get_frozen_credentials()
        except BotoCoreError as error:  # the keys of a role could not be renewed
            raise Unavailable(str(error), code=type(error).__name__) from error
        lines = list(headers)
        if keys.token:
            lines.append(f"X-Amz-Security-Token: {keys.token}")
        call = _Call(idle, _pop(idle) or self._new(), is_upload=isinstance(body, Upload))
        curl = call.curl
        curl.setopt(pycurl.URL, url)
        curl.setopt(pycurl.USERPWD, f"{keys.access_key}:{keys.secret_key}")
        curl.setopt(pycurl.HEADERFUNCTION, call.headers.append)
        curl.setopt(pycurl.WRITEFUNCTION, call.content.write)
        if isinstance(body, Upload):
            self._give_upload(curl, body)
        else:
            # "Expect: 100-continue" would cost a round trip. libcurl sends it with uploads of more than 1 MB.
            lines.append("Expect:")
            curl.setopt(pycurl.TIMEOUT_MS, self._timeout_ms)
            curl.setopt(*((pycurl.HTTPGET, 1) if body is None else (pycurl.POSTFIELDS, body)))
        curl.setopt(pycurl.HTTPHEADER, lines)
        return call

    def _give_upload(self, curl: pycurl.Curl, body: Upload) -> None:
        def seek(offset: int, origin: int) -> int:
            # libcurl sends the body again if a kept connection turns out to be closed.
            body.content.seek(offset, origin)
            return pycurl.SEEKFUNC_OK

        body.content.seek(0)
        curl.setopt(pycurl.TIMEOUT_MS, self._timeout_ms + body.size // _BYTES_PER_MS)
        curl.setopt(pycurl.UPLOAD, 1)
        curl.setopt(pycurl.READFUNCTION, body.content.read)
        curl.setopt(pycurl.SEEKFUNCTION, seek)
        curl.setopt(pycurl.INFILESIZE_LARGE, body.size)

    def _new(self) -> pycurl.Curl:
        curl = pycurl.Curl()
        for option, value in self._options.items():
            curl.setopt(option, value)
        return curl


class RunningCalls:
    """Calls that run at the same time."""

    def __init__(self, http: SignedHttp, transfers: Transfers) -> None:
        self._http = http
        self._transfers = transfers
        self._running: dict[pycurl.Curl, tuple[Any, _Call]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def start(self, tag: Any, url: str, headers: Sequence[str], body: Body, *, http: SignedHttp | None = None) -> None:
        """Start a call. `ended` returns `tag` with the call's response.

        A call to another service than the others' is signed by `http`.
        """
        signer = http or self._http
        call = signer._prepare(signer._idle_in_concurrent, url, headers, body)
        self._running[call.curl] = tag, call
        self._transfers.start(call.curl)

    def ended(self) -> list[tuple[Any, Response | Unavailable]]:
        """Return the calls that have ended since, as `(tag, response or error)`."""
        found: list[tuple[Any, Response | Unavailable]] = []
        for curl, error in self._transfers.ended():
            tag, call = self._running.pop(curl)
            if error is None:
                found.append((tag, call.completed()))
            else:
                curl.close()
                found.append((tag, _unavailable(*error)))
        return found

    def close(self) -> None:
        """Close all connections and abandon the calls that are running."""
        for curl in self._running:
            self._transfers.abandon(curl)
            curl.close()
        self._running.clear()
        self._transfers.close()


class ConcurrentCalls(RunningCalls):
    """Calls that run at the same time, driven by the one thread that waits for them. `start` sends a call at once."""

    def __init__(self, http: SignedHttp) -> None:
        self._driven = ThreadTransfers()
        super().__init__(http, self._driven)

    def completed(self, timeout: float) -> list[tuple[Any, Response | Unavailable]]:
        """Return ended calls as `ended` does, after waiting up to `timeout` seconds for the first one."""
        found = self.ended()
        if not found and self._running:
            self._driven.wait(timeout)
            found = self.ended()
        return found


class _Call:
    """One prepared or running call. Its handle returns to `idle`."""

    __slots__ = ("_idle", "_is_upload", "content", "curl", "headers")

    def __init__(self, idle: deque[pycurl.Curl], curl: pycurl.Curl, *, is_upload: bool) -> None:
        self.curl = curl
        self._idle = idle
        self._is_upload = is_upload
        self.content = BytesIO()
        self.headers: list[bytes] = []

    def completed(self) -> Response | Unavailable:
        """Return the response, and put the handle back among the idle ones."""
        status = self.curl.getinfo(pycurl.RESPONSE_CODE)
        if not _are_whole(self.headers):  # libcurl treats such a response as complete
            self.curl.close()
            return Unavailable(f"the response ended within its headers, after status {status}", code="NoAnswer")
        self._forget_bodies()
        self._idle.append(self.curl)
        return Response(status, self.headers, self.content.getvalue())

    def _forget_bodies(self) -> None:
        """Make the handle release both bodies. Otherwise an idle handle would keep megabytes in memory."""
        self.curl.setopt(pycurl.POSTFIELDS, b"")
        self.curl.setopt(pycurl.WRITEFUNCTION, _nothing)
        if self._is_upload:
            self.curl.setopt(pycurl.READFUNCTION, _nothing)
            self.curl.setopt(pycurl.SEEKFUNCTION, _nothing)
            self.curl.setopt(pycurl.INFILESIZE_LARGE, -1)  # after an upload of 0 bytes, libcurl signs any body as empty


def _pop(idle: deque[T]) -> T | None:
    """Take an idle object, or return None. A check before `pop` would be a race: another thread may take the last object."""
    try:
        return idle.pop()
    except IndexError:
        return None


def _are_whole(headers: list[bytes]) -> bool:
    """Return whether the last response's headers ended with a blank line. Lines after that are trailers of a chunked body."""
    for line in reversed(headers):
        if line.isspace():
            return True
        if line.startswith(b"HTTP/"):
            break
    return False


def _nothing(*_: Any) -> None:
    """Stand in for a callback of a handle that is idle."""


def _check_libcurl() -> None:
    number, protocols = pycurl.version_info()[2], pycurl.version_info()[8]
    if (number >> 16, number >> 8 & 0xFF, number & 0xFF) < _OLDEST or "https" not in protocols:
        expected = "libcurl {}.{}.{} or later with TLS, as in the wheels of pycurl 7.45.4 and later".format(*_OLDEST)
        raise ConfigurationError(key="pycurl", value=pycurl.version, expected=expected)


def _code(code: int) -> str:
    return f"Curl{code}"


#: The code of `Unavailable` if the connection was refused.
NO_CONNECTION = _code(pycurl.E_COULDNT_CONNECT)


def _unavailable(code: int, message: str) -> Unavailable:
    return Unavailable(message, code=_code(code))
