"""The server over real sockets on the loopback, with numbers checked against a formula written here."""

import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from abkd import InputError, alpha_beta
from abkd.explore import make_server, rows_of
from abkd.explore.server import LARGEST
from abkd.explore.toys import TOYS

IMPOSSIBLE = 1 + [row.name for row in TOYS].index("Impossible classes")
ARRAYS = ("class_values", "gradient", "shift", "hardness", "forward_kl_hardness", "confidence")


@pytest.fixture(scope="module")
def server():
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(1, 50, generator=generator) for _ in range(2))
    rows = rows_of(student_logits=student, teacher_logits=teacher, names=["mine"])
    with make_server(rows) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


@pytest.fixture
def connection(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
    yield connection
    connection.close()


def ask(connection, path, method="GET", **headers):
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def numbers(connection, path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    status, body = ask(connection, path)
    assert status == 200, body
    return json.loads(body, parse_constant=refuse)


def test_it_listens_on_the_loopback_alone(server):
    assert server.socket.getsockname()[0] == "127.0.0.1" and server.server_address[1] > 0
    assert server.url == f"http://127.0.0.1:{server.server_address[1]}/"


def test_the_page_comes_with_rules_that_keep_it_to_itself(connection):
    connection.request("GET", "/?row=0&alpha=0.2&beta=0.7")
    answer = connection.getresponse()
    assert answer.status == 200 and "<title>The α-β plane</title>" in answer.read().decode()
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "http" not in policy
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_the_start_lists_own_rows_first_and_the_named_points(connection):
    start = numbers(connection, "/start")
    assert [row["name"] for row in start["rows"]] == ["mine", *(row.name for row in TOYS)]
    assert [row["is_own"] for row in start["rows"]] == [True] + [False] * len(TOYS)
    assert sum(start["rows"][0]["teacher"]) == pytest.approx(1) and start["rows"][0]["labels"][-1] == "rest"
    points = {point["name"]: (point["alpha"], point["beta"]) for point in start["points"]}
    assert points == {
        "forward KL": (1, 0),
        "CIFAR-100": (0.8, 0.3),
        "Hellinger": (0.5, 0.5),
        "language models": (0.2, 0.7),
        "reverse KL": (0, 1),
        "squared Euclid": (1, 1),
    }


@pytest.mark.parametrize("alpha, beta", [(0.2, 0.7), (0.8, 0.3), (1.3, -0.2), (-0.4, 1.1)])
@pytest.mark.parametrize("number", range(5))
def test_the_numbers_are_those_of_alpha_beta_and_of_the_definition(connection, number, alpha, beta):
    row = numbers(connection, "/start")["rows"][number]
    found = numbers(connection, f"/point?row={number}&alpha={alpha}&beta={beta}")
    p, q, s = np.array(row["teacher"]), np.array(row["student"]), alpha + beta
    expected = -(p**alpha * q**beta - alpha / s * p**s - beta / s * q**s).sum() / (alpha * beta)
    assert found["value"] == pytest.approx(expected, rel=1e-8)
    log_q, log_p = (torch.tensor(values, dtype=torch.float64).log() for values in (row["student"], row["teacher"]))
    logits = log_q.requires_grad_()
    value = alpha_beta(student=logits.log_softmax(-1), teacher=log_p, alpha=alpha, beta=beta)
    value.backward()
    assert found["value"] == pytest.approx(value.item(), rel=1e-9)
    np.testing.assert_allclose(found["gradient"], logits.grad, rtol=1e-7, atol=1e-9 * abs(logits.grad).max().item())
    w = np.array(found["hardness"]) * found["confidence"] * np.sign(p - q)
    np.testing.assert_allclose(found["gradient"], q * w.sum() - w, rtol=1e-7, atol=1e-9 * abs(w).max())
    assert (found["alpha"], found["beta"]) == (alpha, beta) and all(len(found[name]) == len(p) for name in ARRAYS)
    assert found["largest_change"] == np.argmax(np.abs(found["shift"])) and len(found["says"]) == 3


def test_landings_come_with_both_kls_beside_them(connection):
    row = numbers(connection, "/start")["rows"][1]
    found = numbers(connection, "/landing?row=1&alpha=0.2&beta=0.7")
    assert set(found) == {"here", "forward_kl", "reverse_kl"}
    p, place = np.array(row["teacher"]), np.arange(40)
    landed = {name: np.array(landing["student"]) for name, landing in found.items()}
    assert (landed["forward_kl"] * place).sum() == pytest.approx((p * place).sum(), rel=1e-5)
    for name, q in landed.items():
        assert q.sum() == pytest.approx(1) and found[name]["overlap"] == pytest.approx(np.minimum(p, q).sum())
        assert found[name]["width"] == pytest.approx(np.exp(-(q * np.log(q)).sum()))
        here = -(p**0.2 * q**0.7 - 0.2 / 0.9 * p**0.9 - 0.7 / 0.9 * q**0.9).sum() / 0.14
        assert found[name]["value_here"] == pytest.approx(here)
    assert found["here"]["value"] == found["here"]["value_here"] == min(each["value_here"] for each in found.values())


def test_what_is_infinite_is_a_string_that_float_reads(connection):
    status, body = ask(connection, f"/point?row={IMPOSSIBLE}&alpha=0&beta=-0.5")
    assert status == 200 and '"value": "Infinity"' in body and "NaN" not in body
    found = numbers(connection, f"/point?row={IMPOSSIBLE}&alpha=0&beta=-0.5")
    assert float(found["value"]) == np.inf and found["confidence"][6] == "Infinity"
    assert [i for i, size in enumerate(found["hardness"]) if size == "Infinity"] == [0, 1, 6, 11]
    assert numbers(connection, f"/landing?row={IMPOSSIBLE}&alpha=1&beta=0") == dict.fromkeys(
        ("here", "forward_kl", "reverse_kl")
    )


@pytest.mark.parametrize(
    "query, field",
    [
        ("", "row"),
        ("row=0&alpha=1", "beta"),
        ("row=0&alpha=nan&beta=0", "alpha"),
        ("row=0&alpha=0&beta=-inf", "beta"),
        ("row=0&alpha=1e9&beta=0", "alpha"),
        (f"row=0&alpha={LARGEST + 1e-9}&beta=0", "alpha"),
        ("row=0&alpha=1e999&beta=0", "alpha"),
        ("row=0&alpha=&beta=0", "alpha"),
        ("row=0&alpha=one%0D%0AX-Evil:1&beta=0", "alpha"),
        ("row=99&alpha=1&beta=0", "row"),
        ("row=-1&alpha=1&beta=0", "row"),
        ("row=0000000000000000000&alpha=1&beta=0", "row"),
        ("row=1.0&alpha=1&beta=0", "row"),
        ("row=0&alpha=1&alpha=0&beta=0", "alpha"),
        ("row=0&alpha=1&beta=0&gamma=3", "'gamma'"),
        ("&".join(f"a{n}=1" for n in range(50)), "query"),
        ("row=%FF%00&alpha=1&beta=0", "row"),
        ("row=0&alpha=" + "9" * 5000 + "&beta=0", "alpha"),
    ],
)
@pytest.mark.parametrize("path", ["/point", "/landing"])
def test_a_bad_query_gets_one_line(connection, capfd, path, query, field):
    status, body = ask(connection, f"{path}?{query}")
    assert status == 400
    line = json.loads(body)["error"]
    assert line.startswith(field) and "\n" not in line and "\r" not in line and len(line) < 200
    assert ask(connection, "/start")[0] == 200  # the connection goes on
    assert capfd.readouterr() == ("", "")


def test_limits_are_answered(connection):
    for alpha, beta in ((LARGEST, -LARGEST), (-LARGEST, -LARGEST), (LARGEST, LARGEST)):
        for row in range(1 + len(TOYS)):
            found = numbers(connection, f"/point?row={row}&alpha={alpha}&beta={beta}")
            assert "NaN" not in [found["value"], *(value for name in ARRAYS for value in found[name])]
    numbers(connection, f"/landing?row=0&alpha={LARGEST}&beta={-LARGEST}")


@pytest.mark.parametrize("path", ["/nope", "/../abkd/cli.py", "/point/", "/page.html", "/start.json"])
def test_there_is_nothing_else(connection, path):
    status, body = ask(connection, path)
    assert status == 404 and "\n" not in json.loads(body)["error"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "BREW"])
def test_only_get(connection, method):
    status, body = ask(connection, "/start", method)
    assert status == 501 and body.count("\n") <= 1 and "rows" not in body


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:9", "[::1]:8000", "127.0.0.1"])
def test_hosts_of_this_machine_are_answered(connection, host):
    assert ask(connection, "/start", Host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "", "0.0.0.0", "127.0.0.1:",
     "localhost:1@evil.example", "user@localhost", "192.168.0.1", "localhost\t.evil"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/start", "/point?row=0&alpha=1&beta=0", "/nope"])
def test_other_hosts_are_refused(connection, host, path):
    status, body = ask(connection, path, Host=host)
    assert status == 403 and json.loads(body)["error"].startswith("Host: ")


@pytest.mark.parametrize("hosts", [b"", b"Host: localhost\r\nHost: evil.example\r\n"])
def test_no_host_or_two_are_refused(server, hosts):
    with socket.create_connection(server.server_address) as raw:
        raw.sendall(b"GET /start HTTP/1.1\r\n" + hosts + b"Connection: close\r\n\r\n")
        assert raw.makefile("rb").readline().split()[1] == b"403"


def test_a_browser_that_goes_away_is_no_error(server, capfd):
    for _ in range(3):
        raw = socket.create_connection(server.server_address)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not a farewell
        raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
        raw.close()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
    assert ask(connection, "/start")[0] == 200
    connection.close()
    assert capfd.readouterr().err == ""


def test_a_port_that_cannot_be_used_is_named(server):
    for port, reason in ((server.server_address[1], "in use"), (70000, "between 0 and 65535"), (-1, "between")):
        with pytest.raises(InputError, match=f"port: {port} cannot be used .*{reason}"):
            make_server(port=port)


def test_ctrl_c_ends_it_with_exit_code_0():
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "from abkd.explore import serve; serve()"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    address = process.stdout.readline()
    port = int(address.split("127.0.0.1:")[1].split("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port)
    assert ask(connection, "/start")[0] == 200  # and the connection stays open
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    connection.close()
    assert (process.returncode, err, out) == (0, "", "stopped\n")
