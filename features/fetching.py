"""One address of an untrusted list -> the bytes of a picture, or the reason why there are none.

Only http and https, and only hosts on the public internet unless private ones are allowed: the IP address that is
connected to is the one that was checked, for every redirect too. All waits and sizes are bounded.
"""

import contextlib
import ipaddress
import random
import socket
import threading
import time
from dataclasses import dataclass
from urllib.parse import urljoin

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, LocationParseError, NewConnectionError, SSLError
from urllib3.util import connection, parse_url

from features.addresses import USER_AGENT
from features.kinds import HEAD, is_picture, what_else

MOST_BYTES = 32 << 20  # of a picture
MOST_REDIRECTS = 5
LONGEST_ADDRESS = 8192  # characters
TRIES = 3
BACKOFF, LONGEST_PAUSE = 0.5, 30.0  # seconds: before the second try, doubled for each further one; at most
PIECE = 1 << 16
BUSY = (429, 500, 502, 503, 504)  # HTTP statuses that are often temporary
FORBIDDEN = ("noai", "noimageai", "noindex", "none")  # X-Robots-Tag's words against use in training

NO_HOST = "the host does not exist"
UNKNOWN_HOST = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}  # not every system has both
UNREACHABLE = "the host cannot be reached"
SILENT = "the host does not answer in time"
SLOW = "too slow"
UNREADABLE = "an address that cannot be read"
OF_THE_HOST = (NO_HOST, UNREACHABLE, SILENT)
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the last 32 bits are the IPv4 address that is reached

_here = threading.local()  # `.asking`: the thread's _Asking


@dataclass
class Dead(Exception):  # noqa: N818  it is an outcome, and not always an error
    """There is no picture at an address.

    Args:
        reason: in a few words that many addresses share.
        again: whether a later try may help.
        wait: seconds that the host asks to wait before it.
    """

    reason: str
    again: bool = False
    wait: float = 0.0


def is_public(address):
    """Tell whether an IP address is on the public internet, and embeds no address that is not."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    if ip in NAT64:
        inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.is_global and not ip.is_multicast and (inner is None or is_public(str(inner)))


class _Asking:
    """One try of an address, redirects included; its socket is shut down when the time is over.

    A socket's own timeout starts again with each byte, so a server that sends bytes one by one would hold a thread for
    ever.
    """

    def __init__(self, seconds, allow_private):
        self.allow_private, self.socket, self.late = allow_private, None, False
        self.timer = threading.Timer(seconds, self._end)
        self.timer.daemon = True

    def __enter__(self):
        _here.asking = self
        self.timer.start()
        return self

    def __exit__(self, *_error):
        self.timer.cancel()

    def _end(self):
        self.late = True
        if self.socket:
            with contextlib.suppress(OSError):  # closed by now
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)  # SSLSocket's would break a read under way


class _Guarded:
    """Connects to the IP address that was checked, so the name is not resolved again; gives _Asking the socket."""

    def request(self, *words, **more):
        super().request(*words, **more)
        _here.asking.socket = self.sock
        if _here.asking.late:
            raise Dead(SLOW)

    def _new_conn(self):
        try:
            found = socket.getaddrinfo(self._dns_host, self.port, 0, socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            gone = not isinstance(error, socket.gaierror) or error.errno in UNKNOWN_HOST
            raise Dead(NO_HOST if gone else UNREACHABLE, again=not gone) from None
        addresses = list(dict.fromkeys(place[0] for *_, place in found))
        if not _here.asking.allow_private and not all(map(is_public, addresses)):
            raise Dead("a private address")
        for number, address in enumerate(addresses, 1):
            try:
                return connection.create_connection(
                    (address, self.port), self.timeout, self.source_address, self.socket_options
                )
            except TimeoutError:
                if number == len(addresses):
                    raise Dead(SILENT, again=True) from None
            except OSError as error:
                if number == len(addresses):
                    raise NewConnectionError(self, str(error)) from None
        raise Dead(NO_HOST)


class _GuardedHTTP(_Guarded, HTTPConnection):
    pass


class _GuardedHTTPS(_Guarded, HTTPSConnection):
    pass


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _GuardedHTTP


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _GuardedHTTPS


class Fetcher:
    """Fetches pictures; many threads may call at once, and share connections."""

    def __init__(self, timeout=10.0, per_host=4, allow_private=False, user_agent=USER_AGENT, most_bytes=MOST_BYTES):
        """Set the limits.

        Args:
            timeout: seconds to connect, and between two pieces of an answer; a whole picture may take six times that.
            per_host: connections that are kept open to a host.
            allow_private: take addresses of this machine and its networks too.
            user_agent: the User-Agent header.
            most_bytes: largest size of a picture.
        """
        self.whole, self.most_bytes, self.allow_private = 6 * timeout, most_bytes, allow_private
        # nothing is decompressed: compression does not make pictures smaller, and could hide a decompression bomb
        self.pools = urllib3.PoolManager(
            num_pools=256, maxsize=per_host, retries=False, timeout=urllib3.Timeout(connect=timeout, read=timeout),
            headers={"User-Agent": user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
        )  # fmt: skip
        self.pools.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}

    def fetch(self, address, stopped=None):
        """Fetch the picture at an address, in up to TRIES tries.

        Args:
            address: as the list has it.
            stopped: threading.Event that ends the pauses between tries.
        Returns: bytes that begin as a picture does.
        Raises: Dead.
        """
        for number in range(1, TRIES + 1):
            try:
                return self._try(address)
            except Dead as dead:
                # a host that was silent for that long is not asked a third time
                if not dead.again or number >= TRIES - (dead.reason == SILENT):
                    raise
                pause = min(LONGEST_PAUSE, max(dead.wait, BACKOFF * 2 ** (number - 1) * random.uniform(0.75, 1.25)))
                if stopped.wait(pause) if stopped else time.sleep(pause):
                    raise
        raise AssertionError("the last try returns or raises")

    def _try(self, address):
        """Ask once, for `whole` seconds at most."""
        with _Asking(self.whole, self.allow_private) as asking:
            try:
                body = self._follow(address)
            except Dead:
                if asking.late:  # the error comes from our own shutdown of the socket
                    raise Dead(SLOW) from None
                raise
        if asking.late:  # without Content-Length a cut answer looks complete
            raise Dead(SLOW)
        return body

    def _follow(self, address):
        """Return the body at an address, redirects followed."""
        for _ in range(MOST_REDIRECTS + 1):
            host_of(address)  # checks a redirect's address too
            answer = self._ask(address)
            try:
                place = answer.get_redirect_location()
                if not place:
                    return self._read(answer)
                answer.drain_conn() if int(answer.headers.get("Content-Length") or PIECE) < PIECE else answer.close()
            except ValueError:
                answer.close()
            finally:
                answer.release_conn()
            try:
                address = urljoin(address, place)
            except ValueError:  # such as http://[
                raise Dead(UNREADABLE) from None
        raise Dead("too many redirects")

    def _ask(self, address):
        """Return urllib3's answer, whose body is not read yet."""
        try:
            return self.pools.request("GET", address, preload_content=False, redirect=False)
        except LocationParseError:
            raise Dead(UNREADABLE) from None
        except SSLError:
            raise Dead("its certificate or encryption is not accepted") from None
        except HTTPError as error:
            raise _not_reached(error) from None
        except (ValueError, OSError):  # malformed headers
            raise Dead("its answer is not HTTP") from None

    def _read(self, answer):
        """Return the body of an answer that is a picture."""
        status, headers = answer.status, answer.headers
        if status != 200:
            raise Dead(f"HTTP {status}", status in BUSY, _seconds(headers.get("Retry-After")))
        words = {word.strip().lower() for word in headers.get("X-Robots-Tag", "").split(",")}
        if words.intersection(FORBIDDEN):
            raise Dead("its host forbids this use (X-Robots-Tag)")
        too_large = Dead(f"more than {self.most_bytes >> 20} MB")
        length = headers.get("Content-Length", "")
        if length.isdigit() and int(length) > self.most_bytes:
            answer.close()
            raise too_large
        body = bytearray()
        try:
            for piece in answer.stream(PIECE, decode_content=False):
                body += piece
                if len(body) > self.most_bytes:
                    answer.close()
                    raise too_large
                if len(body) >= HEAD:
                    _check_picture(body)  # before the rest of a page or a video is downloaded
        except HTTPError as error:
            raise _not_reached(error, begun=True) from None
        except OSError:
            raise Dead("truncated", again=True) from None
        _check_picture(body)
        return bytes(body)


def host_of(address):
    """Return the host of an address, in lower case.

    Raises: Dead for an address that is not fetched.
    """
    if len(address) > LONGEST_ADDRESS:
        raise Dead(f"an address of more than {LONGEST_ADDRESS:,} characters")
    if not address.isprintable() or " " in address:
        raise Dead("an address with control characters or blanks")
    try:
        parsed = parse_url(address)
    except (LocationParseError, ValueError):
        raise Dead(UNREADABLE) from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise Dead("no http or https address")
    if parsed.auth is not None:
        raise Dead("an address with a user name")
    if parsed.port == 0:
        raise Dead(UNREADABLE)
    return parsed.host.lower()


def _check_picture(body):
    """Raise Dead for bytes that begin as no picture does."""
    head = bytes(body[:HEAD])
    if not is_picture(head):
        kind = what_else(head)
        raise Dead(f"not an image ({kind.split(':')[0]})" if kind else "not an image")


def _not_reached(error, begun=False):
    """Return the Dead that an error of urllib3 means.

    Args:
        begun: whether the answer had begun.
    """
    if isinstance(error, urllib3.exceptions.NameResolutionError):
        return Dead(NO_HOST)
    if isinstance(error, NewConnectionError):  # urllib3 counts it among the timeouts
        return Dead(UNREACHABLE, again=True)
    if isinstance(error, urllib3.exceptions.TimeoutError):
        return Dead(SLOW if begun else SILENT, again=True)
    if begun:
        return Dead("truncated", again=True)
    return Dead(UNREACHABLE, again=True)


def _seconds(text):
    """Return the seconds of a Retry-After header; 0 where it says a date or nothing."""
    return float(text) if text and text.strip().isdigit() and len(text) < 9 else 0.0
