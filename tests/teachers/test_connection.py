"""Questions that are tried again, and those that are not."""

import os
import socket
import time

import pytest
from conftest import make_llama
from stand_in import StandIn

from abkd import InputError
from abkd.errors import ServerLost
from abkd.teachers import connection
from abkd.teachers.connection import Connection, Malformed, Refused, read

BODY = {"prompt": [1, 2, 3], "prompt_logprobs": 2}


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_llama(len(tokenizer))


@pytest.fixture
def server(model, tokenizer):
    with StandIn("vllm", model, tokenizer) as stand_in:
        yield stand_in


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(connection, "_FIRST_PAUSE_S", 0.02)


def connect(url, patience_s=5.0, timeout_s=5.0, api_key=None):
    return Connection(url, num_connections=2, timeout_s=timeout_s, patience_s=patience_s, api_key=api_key)


@pytest.mark.parametrize("trouble", [(503, {}, "Loading model"), (429, {}, "busy"), (500, {}, "{}"), "drop"])
def test_what_may_pass_is_tried_again(server, trouble):
    server.troubles.extend([trouble, trouble])
    assert "choices" in connect(server.url).ask("/v1/completions", BODY)
    assert len(server.asked) == 1 and not server.troubles


def test_a_question_that_hangs_is_asked_again(server):
    server.troubles.append(0.6)
    assert "choices" in connect(server.url, timeout_s=0.2).ask("/v1/completions", BODY)


def test_retry_after_is_waited_for(server):
    server.troubles.append((429, {"Retry-After": "1"}, "busy"))
    started = time.monotonic()
    connect(server.url).ask("/v1/completions", BODY)
    assert time.monotonic() - started >= 1


def test_retry_after_beyond_patience_ends_it(server):
    server.troubles.append((429, {"Retry-After": "600"}, '{"message": "come back tomorrow"}'))
    with pytest.raises(ServerLost, match=r"\(429: come back tomorrow\), tried 1 times in 0 s; start it again$"):
        connect(server.url).ask("/v1/completions", BODY)


def test_patience_ends(server):
    server.troubles.extend([(503, {}, "Loading model")] * 100)
    with pytest.raises(
        ServerLost, match=rf"{server.url} does not answer \(503: Loading model\), tried \d+ times"
    ) as raised:
        connect(server.url, patience_s=0.2).ask("/v1/completions", BODY)
    assert isinstance(raised.value, InputError) and "\n" not in str(raised.value)
    assert 1 < 100 - len(server.troubles) < 20


def test_a_server_that_never_answered_is_given_less_time(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setattr(connection, "_FIRST_PATIENCE_S", 0.1)
        with pytest.raises(ServerLost, match=r"Connection refused.*; start it, or correct the url$"):
            connect(f"http://127.0.0.1:{closed.getsockname()[1]}", patience_s=3600).ask("/v1/models")


@pytest.mark.parametrize("status", [400, 401, 404, 422, 501])
def test_a_refusal_is_no_matter_of_time(server, status):
    server.troubles.append((status, {}, '{"error": {"message": "not\\n so"}}'))
    with pytest.raises(Refused) as raised:
        connect(server.url).ask("/v1/completions", BODY)
    assert (raised.value.status, raised.value.said) == (status, "not so")


def test_redirects_are_not_followed(server):
    server.troubles.append((307, {"Location": f"{server.url}/v1/models"}, ""))
    with pytest.raises(Refused, match="not followed"):
        connect(server.url).ask("/v1/completions", BODY)


@pytest.mark.parametrize("text", ["<html>hello</html>", "", "{", "[" * 100_000])
def test_what_is_no_json_is_malformed(server, text):
    server.troubles.append((200, {"Content-Type": "text/html"}, text))
    with pytest.raises(Malformed, match="text/html that is no JSON"):
        connect(server.url).ask("/v1/completions", BODY)


def test_proxies_of_the_environment_are_not_used(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setitem(os.environ, name, "http://127.0.0.1:9")
    assert read(connect(server.url + "/v1/").ask("/v1/models"), "data", 0, "id") == "tiny"


def test_the_key_is_sent_and_never_shown(server):
    server.troubles.extend([(400, {}, "your key was Bearer se-cret, a bad one"), (503, {}, '{"detail": "se-cret"}')])
    asking = connect(server.url, patience_s=0.0, api_key="se-cret")
    for error in (Refused, ServerLost):
        with pytest.raises(error) as raised:
            asking.ask("/v1/completions", BODY)
        assert "se-cret" not in f"{raised.value!r} {raised.value}" and "***" in str(raised.value)
    assert server.keys == {"Bearer se-cret"} and "se-cret" not in repr(asking)


def test_no_more_questions_than_connections_and_answers_in_order(server):
    server.delay_s = 0.02
    bodies = [{"prompt": [1, 2, 3][:n], "prompt_logprobs": 1} for n in (1, 2, 3, 1, 2, 3)]
    asking = connect(server.url)
    answers = asking.map(lambda body: asking.ask("/v1/completions", body), bodies)
    assert [len(read(answer, "choices", 0, "prompt_logprobs")) for answer in answers] == [1, 2, 3, 1, 2, 3]
    assert server.most_at_work == 2


def test_one_that_is_refused_ends_those_that_wait(server):
    """Without that, the first question would try for an hour."""
    server.troubles.extend([(503, {"Retry-After": "3000"}, "busy"), (400, {}, "no")])
    asking = connect(server.url, patience_s=3600)
    with pytest.raises(Refused):
        asking.map(lambda body: asking.ask("/v1/completions", body), [BODY] * 8)
    assert len(server.asked) < 6


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "", "http://"])
def test_addresses_that_are_none(url):
    with pytest.raises(InputError, match=r"teacher\.url must be like"):
        connect(url)


def test_a_password_in_the_address_is_refused_and_not_shown():
    with pytest.raises(InputError, match=r"teacher\.api_key") as raised:
        connect("http://me:se-cret@host")
    assert "se-cret" not in str(raised.value)


@pytest.mark.parametrize("key", ["se cret", "se\ncret", "sécret", ""])
def test_keys_that_no_header_holds(key):
    with pytest.raises(InputError, match="not shown") as raised:
        connect("http://host", api_key=key)
    assert not key or key not in str(raised.value)


def test_read_says_how_far_it_came():
    assert read({"a": [{"b": 1}]}, "a", 0, "b") == 1
    for answer in ({"a": []}, {"a": {}}, {"a": None}, [], None, {"a": "text"}):
        with pytest.raises(Malformed, match=r"its answer has no a(\.0)?$"):
            read(answer, "a", 0, "b")
