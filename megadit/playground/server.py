"""The page over HTTP: to whoever sits at this machine, and to no other page of their browser.

    GET /            the page
    GET /page.js     what makes it move; and /favicon.ico, which browsers ask for
    GET /progress    {"done": 3, "steps": 20}, or {} while nothing is drawn
    GET /overlay     a PNG; ?drawing=NAME&layer=3&step=7 (from 0, or "mean"), and &branch=difference if not conditional
    POST /draw       a wish as JSON -> a drawing as JSON; see wish.py and drawing.py

What goes wrong is said as {"error": "..."}.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from megadit.playground.drawing import png_of
from megadit.playground.page import Page
from megadit.playground.studio import Busy, Studio
from megadit.playground.wish import wish_of

logger = logging.getLogger("megadit")

MOST_BYTES = 64 * 1024  # of what is posted
SCRIPT = Path(__file__).with_name("page.js")
ICON = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"><path fill="#3b528b" d="M0 0h2v2H0z"/>'
    b'<path fill="#5ec962" d="M1 0h1v1H1z"/><path fill="#21918c" d="M0 1h1v1H0z"/></svg>'
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Refused(Exception):
    """A request that is answered with a status and a message."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    """Listens from the start, so that a port in use is known before a model is loaded; answers once it is served."""

    daemon_threads = True
    studio: Studio
    page: Page

    def __init__(self, host: str, port: int) -> None:
        """Port 0: any free one. Raises ValueError naming the host and port that cannot be had."""
        try:
            self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            super().__init__((host, port), Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise ValueError(
                f"port {port} of {host} cannot be had: {why}; choose another one with --port, or 0 for any that is free"
            ) from error
        self.names = names_of(str(self.server_address[0]))

    def server_bind(self) -> None:
        """Without looking up this machine's full name, which may take seconds; see `names_of`."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    @property
    def url(self) -> str:
        host, port = str(self.server_address[0]), self.server_address[1]
        if ipaddress.ip_address(host).is_unspecified:  # every address of this machine, but none to go to
            host = socket.gethostname()
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    @property
    def answers_to(self) -> str:
        """The hosts of `is_own`, for people."""
        others = "loopback addresses" if is_loopback(str(self.server_address[0])) else "addresses"
        return f"{', '.join(self.names)} and {others}"

    def serve(self, studio: Studio, page: Page) -> None:
        """Answer requests, until the process ends."""
        self.studio, self.page = studio, page
        self.serve_forever()

    def is_own(self, host: str) -> bool:
        """Whether a browser that asks for this host may mean this server.

        A page from elsewhere can have its own name lead here (DNS rebinding), but not an address. Ports are not looked
        at: they may be forwarded.
        """
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in self.names:
            return True
        return is_loopback(name) if is_loopback(str(self.server_address[0])) else is_address(name)


def names_of(bound: str) -> list[str]:
    """The names of a server at this address: of one that other machines reach, this machine's, short and full."""
    if is_loopback(bound):
        return ["localhost"]
    named = socket.gethostname().lower()
    full = socket.getfqdn().lower()  # may take seconds
    return list(dict.fromkeys(["localhost", named.partition(".")[0], named, full]))


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(name: str) -> bool:
    return is_address(name) and ipaddress.ip_address(name).is_loopback


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "megadit"
    sys_version = ""
    timeout = 60  # seconds that a client may be silent
    server: Server

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, answer: Any) -> None:
        """What `answer` sends, or why it does not."""
        try:
            self._check_host()
            answer(urlsplit(self.path))
        except Refused as refusal:
            self._send_error(refusal.status, str(refusal))
        except Busy as busy:
            self._send_error(HTTPStatus.CONFLICT, str(busy))
        except ValueError as error:
            self._send_error(HTTPStatus.BAD_REQUEST, str(error))
        except ConnectionError:
            self.close_connection = True  # the browser has gone
        except Exception as error:
            logger.exception("a request failed, and the playground goes on")
            self._send_error(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")

    def _check_host(self) -> None:
        if not self.server.is_own(self.headers.get("Host", "")):
            where = f"the playground is at {self.server.url}, not at this host"
            raise Refused(HTTPStatus.FORBIDDEN, f"{where}; it answers to {self.server.answers_to}")

    def _get(self, url: Any) -> None:
        if url.path == "/":
            self._send("text/html; charset=utf-8", self.server.page.html.encode(), policy=self.server.page.policy)
        elif url.path == "/page.js":
            self._send("text/javascript; charset=utf-8", SCRIPT.read_bytes())
        elif url.path == "/favicon.ico":
            self._send("image/svg+xml", ICON)
        elif url.path == "/progress":
            done_of = self.server.studio.progress
            self._send_json({} if done_of is None else {"done": done_of[0], "steps": done_of[1]})
        elif url.path == "/overlay":
            # A drawing's maps do not change.
            self._send("image/png", self._overlay(url.query), cache="private, max-age=86400, immutable")
        else:
            raise Refused(HTTPStatus.NOT_FOUND, f"there is no {url.path}")

    def _overlay(self, query: str) -> bytes:
        """The PNG that a query asks for. Raises Refused for what there is not."""
        said = {key: values[-1] for key, values in parse_qs(query).items()}
        drawing = self.server.studio.kept.get(said.get("drawing", ""))
        if drawing is None:
            raise Refused(HTTPStatus.NOT_FOUND, "this drawing is not kept any more; draw it again")
        try:
            layer, step = int(said.get("layer", "")), None if said.get("step") == "mean" else int(said.get("step", ""))
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, "say layer=NUMBER and step=NUMBER, or step=mean") from error
        try:
            return png_of(drawing.overlay(said.get("branch", "conditional"), layer, step))  # type: ignore[arg-type]
        except ValueError as error:
            raise Refused(HTTPStatus.NOT_FOUND, str(error)) from error

    def _post(self, url: Any) -> None:
        if url.path != "/draw":
            raise Refused(HTTPStatus.NOT_FOUND, f"there is no {url.path} to post to")
        studio = self.server.studio
        wish = wish_of(self._posted(), studio.pipe.scheduler)
        name, drawing = studio.drawn(wish)
        self._send_json({"drawing": name, **drawing.told()})

    def _posted(self) -> bytes:
        """What is posted by a page of this server, or by no page. Raises Refused."""
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != self.headers.get("Host"):
            raise Refused(HTTPStatus.FORBIDDEN, f"pages of {origin} may not draw here")
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "post JSON, with Content-Type: application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()) or "Transfer-Encoding" in self.headers:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "say Content-Length")
        if len(length) > 9 or int(length) > MOST_BYTES:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"post at most {MOST_BYTES} bytes")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the client has gone")
        return body

    def _send(self, kind: str, content: bytes, status: HTTPStatus = HTTPStatus.OK, cache: str = "no-store",
              policy: str = "default-src 'none'") -> None:  # fmt: skip
        self.send_response(status)
        given = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": cache}
        for name, value in {**given, **HEADERS, "Content-Security-Policy": policy}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _send_json(self, content: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send("application/json", json.dumps(content).encode(), status)

    def _send_error(self, status: HTTPStatus, message: str) -> None:
        """The connection ends, for what was posted may not have been read."""
        self.close_connection = True
        self._send_json({"error": message}, status)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: the page asks how far a drawing is several times a second."""
