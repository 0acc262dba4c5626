"""JSON over HTTP with a server that may be away for a while."""

import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from abkd.errors import InputError, ServerLost

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
_FIRST_PATIENCE_S = 10.0  # with a server that never answered: the address is more likely wrong than the server away
_PASSES = (408, 429, 500, 502, 503, 504)  # statuses that another try may see gone
_SHOWN = 300  # characters of what a server says
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Malformed(Exception):
    """An answer that makes no sense: what is wrong, and the way out. Whoever knows which example it was says so."""

    def __init__(self, what: str, way_out: str = "ask a server of the kind that teacher.api names, or set teacher.api"):
        super().__init__(what)
        self.what, self.way_out = what, way_out


class Refused(Exception):
    """A status that another try would meet again, and what the server says to it."""

    def __init__(self, status: int, said: str):
        super().__init__(f"{status}: {said}")
        self.status, self.said = status, said


class Connection:
    """`num_connections` of them. No redirect is followed, and no proxy or .netrc of the environment is used.

    Args:
        url: http or https, host and port, a path before /v1 if there is one; /v1 at its end is left out.
        api_key: sent as `Authorization: Bearer`, and in no message, even where the server repeats it.
        timeout_s: without a byte from the server, until a try counts as failed.
        patience_s: how long tries without an answer go on, from the start of the first to the start of the last; 10 s
            at most while the server has never answered, as its address is more likely wrong.

    Raises:
        InputError: `url` is none, or holds a password; an api_key that no header can hold.
    """

    def __init__(self, url: str, *, num_connections: int, timeout_s: float, patience_s: float, api_key: str | None):
        self.url = _checked(url)
        if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
            raise InputError("teacher.api_key must be one word of visible ASCII characters; it is not shown here")
        self._num_connections, self._timeout_s, self._patience_s = num_connections, timeout_s, patience_s
        self._api_key, self._has_answered, self._is_over = api_key, False, threading.Event()
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers.update({"Authorization": f"Bearer {api_key}"} if api_key else {})
        adapter = HTTPAdapter(pool_maxsize=num_connections)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def map(self, ask: Callable[[Item], Answer], items: Iterable[Item]) -> list[Answer]:
        """`[ask(item) for item in items]`, `num_connections` at a time; the first that fails ends the others."""
        self._is_over.clear()
        with ThreadPoolExecutor(self._num_connections) as pool:
            futures = [pool.submit(ask, item) for item in items]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                failed = [future for future in futures if future in done and future.exception()]
                return [future.result() for future in failed or futures]
            except BaseException:
                self._is_over.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server answers to a POST of `body`, or to a GET where there is none.

        Connections that fail, time-outs and the statuses 408, 429, 500, 502, 503 and 504 are tried again, after a pause
        that doubles, and not before Retry-After (in seconds) is over.

        Raises:
            ServerLost: patience is over, or Retry-After goes beyond it.
            Refused: another status than 200.
            Malformed: no JSON.
        """
        started, longest_s, num_tries = time.monotonic(), _FIRST_PAUSE_S, 0
        while True:
            num_tries += 1
            answer, trouble, asked_s = self._try(path, body)
            if answer is not None:
                return self._read(answer)
            elapsed_s = time.monotonic() - started
            patience_s = self._patience_s if self._has_answered else min(self._patience_s, _FIRST_PATIENCE_S)
            left_s = patience_s - elapsed_s
            pause_s = max(asked_s, min(longest_s * random.uniform(0.5, 1), left_s))
            if left_s <= 0 or asked_s > left_s or self._is_over.wait(pause_s):
                raise ServerLost(
                    f"teacher.url: the server at {self.url} does not answer ({trouble}), tried {num_tries} times in "
                    f"{elapsed_s:.0f} s; {'start it again' if self._has_answered else 'start it, or correct the url'}"
                )
            longest_s = min(2 * longest_s, _LONGEST_PAUSE_S)

    def finds(self, path: str, *keys: str | int) -> bool:
        """Whether a GET answers with something at `keys`."""
        try:
            read(self.ask(path), *keys)
        except (Refused, Malformed):
            return False
        return True

    def without_key(self, text: str) -> str:
        """`text`, for a message."""
        return text.replace(self._api_key, "***") if self._api_key else text

    def _try(self, path: str, body: dict[str, Any] | None) -> tuple[requests.Response | None, str, float]:
        """The answer, or what went wrong, and how many seconds the server asks to be left alone."""
        method = "GET" if body is None else "POST"
        try:
            answer = self._session.request(
                method, self.url + path, json=body, timeout=self._timeout_s, allow_redirects=False
            )
        except requests.Timeout:
            return None, f"nothing within {self._timeout_s:g} s", 0.0
        except requests.exceptions.SSLError as error:
            what = f"{self.url} has no certificate that this machine trusts ({_reason(error)})"
            raise InputError(f"teacher.url: {what}; give it one, or use http") from None
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            return None, _reason(error), 0.0
        except requests.RequestException as error:
            raise InputError(f"teacher.url: {self.url} cannot be asked ({type(error).__name__}); correct it") from None
        self._has_answered = True
        if answer.status_code not in _PASSES:
            return answer, "", 0.0
        asked = answer.headers.get("Retry-After", "")
        return None, f"{answer.status_code}: {self._said(answer)}", float(asked) if asked.isdecimal() else 0.0

    def _read(self, answer: requests.Response) -> Any:
        if answer.is_redirect:
            raise Refused(answer.status_code, f"go to {answer.headers['Location']}, which is not followed")
        if answer.status_code != 200:
            raise Refused(answer.status_code, self._said(answer))
        try:
            return json.loads(answer.content)
        except (ValueError, RecursionError):
            kind = answer.headers.get("Content-Type", "nothing")
            raise Malformed(f"answers with {kind} that is no JSON: {self._said(answer)!r}") from None

    def _said(self, answer: requests.Response) -> str:
        """The message in an answer, on one line, without the key."""
        try:
            said = json.loads(answer.content)
        except (ValueError, RecursionError):
            said = answer.text
        for key in ("error", "message", "detail"):
            said = said.get(key, said) if isinstance(said, dict) else said
        line = self.without_key(" ".join(str(said).split()))
        return line if len(line) <= _SHOWN else line[:_SHOWN] + "..."


def read(answer: Any, *keys: str | int) -> Any:
    """`answer[key][key]...`. Raises Malformed where there is no such thing."""
    found = answer
    for place, key in enumerate(keys):
        is_there = key in found if isinstance(found, dict) else isinstance(found, list) and isinstance(key, int)
        if not is_there or (isinstance(found, list) and not -len(found) <= int(key) < len(found)):
            raise Malformed(f"its answer has no {'.'.join(map(str, keys[: place + 1]))}")
        found = found[key]
    return found


@contextmanager
def expecting(what: str) -> Iterator[None]:
    """Raises Malformed where an answer, which is taken apart inside, is not made like `what`."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise Malformed(f"its answer has no {what}") from None


def read_list(answer: Any, *keys: str | int) -> Sequence[Any]:
    """As `read`, where there is a list."""
    found = read(answer, *keys)
    if not isinstance(found, list):
        raise Malformed(f"{'.'.join(map(str, keys))} of its answer is no list but {str(found)[:40]!r}")
    return found


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"teacher.url must be like http://127.0.0.1:8000, got {url!r}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError("teacher.url holds a name, a password or a query; give the address alone, and teacher.api_key")
    return url.rstrip("/").removesuffix("/v1")


def _reason(error: BaseException) -> str:
    """The system's words for what broke, from the innermost exception that has some."""
    found, words = error, type(error).__name__
    while found is not None:
        words = found.strerror if isinstance(found, OSError) and found.strerror else words
        found = found.__cause__ or found.__context__  # type: ignore[assignment]
    return words
