"""The page and its numbers over HTTP, for this machine alone: it listens on 127.0.0.1 and answers GET only.

A number that JSON lacks is a string: "Infinity", "-Infinity", "NaN", as `float` of Python and `Number` of JavaScript
read them.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs

from torch import Tensor

from abkd.divergences import CIFAR, EUCLIDEAN, FORWARD_KL, HELLINGER, LLM, REVERSE_KL, alpha_beta
from abkd.errors import InputError
from abkd.explore.effects import effects, hardness
from abkd.explore.landing import land, overlap, width
from abkd.explore.rows import Row
from abkd.explore.sentences import largest_change, sentences
from abkd.explore.toys import TOYS

PAGE = Path(__file__).with_name("page.html")
LARGEST = 4.0
"""Of |alpha| and |beta| in a query: every named member of the family lies within 2."""
POINTS = {
    "forward KL": FORWARD_KL,
    "CIFAR-100": CIFAR,
    "Hellinger": HELLINGER,
    "language models": LLM,
    "reverse KL": REVERSE_KL,
    "squared Euclid": EUCLIDEAN,
}
"""Marked on the plane; CIFAR and LLM are the paper's choices."""
_LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


class Server(ThreadingHTTPServer):
    """`make_server` makes one; `serve_forever()` and `shutdown()` as in `http.server`."""

    server_bind = TCPServer.server_bind  # without HTTPServer's look-up of the host's name, which can wait for a network

    def __init__(self, rows: Sequence[Row], port: int):
        super().__init__(("127.0.0.1", port), _Answer)
        self.rows = rows

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request, client_address) -> None:
        """A browser that goes away is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def make_server(rows: Sequence[Row] = (), port: int = 0) -> Server:
    """A server of the page on 127.0.0.1, listening but not yet answering.

    Args:
        rows: the user's own, as of `rows_of`; they stand before the built-in ones.
        port: 0 to 65535; 0 takes a free one, see `Server.url`.

    Raises:
        InputError: the port is out of range, taken, or not allowed.
    """
    try:
        return Server((*rows, *TOYS), port)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "must lie between 0 and 65535"
        raise InputError(f"port: {port} cannot be used ({reason}); give another, or 0 for a free one") from None


def serve(rows: Sequence[Row] = (), port: int = 0, say: Callable[[str], object] = print) -> None:
    """Answers until Ctrl-C, then returns. Arguments and errors as in `make_server`; `say` gets the address."""
    with make_server(rows, port) as server:
        say(f"the alpha-beta plane is at {server.url} (end with Ctrl-C)")
        try:
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            say("stopped")


class _Answer(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; the second would wait for the browser's ACK
    timeout = 60  # seconds of silence on a connection
    server_version, sys_version = "abkd", ""
    error_message_format, error_content_type = "%(message)s\n", "text/plain; charset=utf-8"

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not _LOOPBACK.fullmatch(hosts[0]):  # a page elsewhere may have its name point here
            self._refuse(403, f"Host: {', '.join(hosts)[:60]!r} is refused; open {self.server.url}")
        elif path == "/":
            self._send(200, "text/html", PAGE.read_bytes())
        elif path not in ANSWERS:
            self._refuse(404, f"{path[:60]!r} is not here; see /, {', '.join(ANSWERS)}")
        else:
            try:
                self._send(200, "application/json", _json(ANSWERS[path](self.server.rows, query)))
            except InputError as error:
                self._refuse(400, str(error))

    def _refuse(self, status: int, line: str) -> None:
        self._send(status, "application/json", _json({"error": line}))

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{content_type}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *arguments) -> None:
        """Nothing: a drag over the plane is hundreds of requests."""


def _start(rows: Sequence[Row], query: str) -> Any:
    _fields(query, ())
    points = [{"name": name} | point.parameters for name, point in POINTS.items()]
    return {"points": points, "largest": LARGEST, "rows": [_beliefs(row) for row in rows]}


def _beliefs(row: Row) -> dict[str, Any]:
    return (
        {"name": row.name, "about": row.about, "is_own": row.is_own, "labels": row.labels}
        | {"teacher": row.teacher.exp(), "student": row.student.exp()}
        | {"teacher_width": width(row.teacher), "student_width": width(row.student)}
        | {"overlap": overlap(row, row.student)}
    )


def _point(rows: Sequence[Row], query: str) -> Any:
    row, alpha, beta = _row_and_point(rows, query)
    found = effects(student=row.student, teacher=row.teacher, alpha=alpha, beta=beta)
    forward_kl = hardness(student=row.student, teacher=row.teacher, alpha=1.0)
    return vars(found) | {
        "alpha": alpha,
        "beta": beta,
        "forward_kl_hardness": forward_kl,
        "largest_change": largest_change(found.shift),
        "says": sentences(row, found),
    }


def _landing(rows: Sequence[Row], query: str) -> Any:
    row, alpha, beta = _row_and_point(rows, query)
    points = {"here": (alpha, beta), "forward_kl": (1.0, 0.0), "reverse_kl": (0.0, 1.0)}
    landings = {name: land(row, *point) for name, point in points.items()}
    return {
        name: found
        and asdict(found)
        | {"student": found.student.exp()}
        | {"value_here": alpha_beta(student=found.student, teacher=row.teacher, alpha=alpha, beta=beta)}
        for name, found in landings.items()
    }


ANSWERS: dict[str, Callable[[Sequence[Row], str], Any]] = {"/start": _start, "/point": _point, "/landing": _landing}
"""Path -> what it answers to a query string."""


def _row_and_point(rows: Sequence[Row], query: str) -> tuple[Row, float, float]:
    fields = _fields(query, ("row", "alpha", "beta"))
    if fields["row"] not in {str(number) for number in range(len(rows))}:
        raise InputError(f"row: {fields['row'][:40]!r} is none of 0 to {len(rows) - 1}; see /start")
    return rows[int(fields["row"])], _exponent(fields, "alpha"), _exponent(fields, "beta")


def _exponent(fields: dict[str, str], name: str) -> float:
    try:
        number = float(fields[name])
    except ValueError:
        number = math.nan
    if not abs(number) <= LARGEST:
        raise InputError(f"{name}: {fields[name][:40]!r} is no number from {-LARGEST:g} to {LARGEST:g}; give one")
    return number


def _fields(query: str, names: tuple[str, ...]) -> dict[str, str]:
    """Each of the names once, and nothing else."""
    wanted = f"give {', '.join(names)}, once each" if names else "give none"
    try:
        found = parse_qs(query, keep_blank_values=True, max_num_fields=10)
    except ValueError:
        raise InputError(f"query: too many fields; {wanted}") from None
    for name in dict.fromkeys([*found, *names]):
        if name not in names:
            raise InputError(f"{name[:40]!r} is no field here; {wanted}")
        if (number := len(found.get(name, ()))) != 1:
            raise InputError(f"{name}: given {number} times; {wanted}")
    return {name: values[0] for name, values in found.items()}


def _json(content: Any) -> bytes:
    return json.dumps(_encoded(content), allow_nan=False, ensure_ascii=False).encode()


def _encoded(content: Any) -> Any:
    """Tensors as lists, numbers that are not finite as strings."""
    if isinstance(content, dict):
        return {key: _encoded(value) for key, value in content.items()}
    if isinstance(content, Tensor):
        content = content.tolist()
    if isinstance(content, (list, tuple)):
        return [_encoded(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return "NaN" if math.isnan(content) else "Infinity" if content > 0 else "-Infinity"
    return content
