"""The page in a real browser, driven over the pipe of Chromium's DevTools protocol. Skips where there is none."""

import fcntl
import itertools
import json
import os
import re
import shutil
import subprocess
import threading
from urllib.request import urlopen

import numpy as np
import pytest
import torch

from abkd.explore import make_server, rows_of
from abkd.explore.server import PAGE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
KINDS = {"here": "here", "forward": "forward_kl", "reverse": "reverse_kl"}
DRAWN = """new Promise((done, failed) => {
  const drawn = () => document.documentElement.dataset.drawn;
  const end = setTimeout(() => failed(new Error(drawn())), 120000);
  const look = () => drawn() === STATE ? (clearTimeout(end), done(true)) : setTimeout(look, 5);
  look();
})"""


class Browser:
    """One page of a headless Chromium."""

    def __init__(self, folder):
        (to_read, self._write), (self._read, to_write) = os.pipe(), os.pipe()
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
        ]

        def as_3_and_4():  # where Chromium looks for the pipe; by way of others, which may be 3 and 4 themselves
            for number, copy in enumerate(
                [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read, to_write)], start=3
            ):
                os.dup2(copy, number)

        self._process = subprocess.Popen(
            [CHROMIUM, *options], preexec_fn=as_3_and_4, close_fds=False, stderr=subprocess.DEVNULL
        )
        os.close(to_read), os.close(to_write)
        self._numbers, self._rest, self._session, self.complaints = itertools.count(), b"", {}, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Runtime", "Log", "Page"):
            self(f"{domain}.enable")

    def __call__(self, method, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.complaints.append(answer["params"])
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self):
        while b"\0" not in self._rest:
            read = os.read(self._read, 2**16)
            assert read, "the browser is gone"
            self._rest += read
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)

    def value(self, expression):
        found = self("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, row, alpha, beta):
        self.value(DRAWN.replace("STATE", json.dumps(f"{row} {alpha:g} {beta:g}")))

    def open(self, url, row=0, alpha=0.2, beta=0.7, width=1280, scheme="light"):
        """Waits for `row` at the point to be drawn."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self("Page.navigate", url="about:blank")
        self("Page.navigate", url=url)
        self.value("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))")
        self.wait_for(row, alpha, beta)

    def press(self, key, shift=False):
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=8 * shift)

    def mouse(self, kind, x, y):
        self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def centre_of(self, selector):
        box = f"document.querySelector('{selector}').getBoundingClientRect()"
        return self.value(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")

    def close(self):
        os.close(self._write), os.close(self._read)
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def url():
    logits = torch.randn(2, 1, 60, generator=torch.Generator().manual_seed(0)) * 3
    rows = rows_of(student_logits=logits[0], teacher_logits=logits[1], names=["a <b>row</b>"], label_of="<i>{}".format)
    with make_server(rows) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server.url
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def attributes(browser, selector, name):
    return browser.value(f"[...document.querySelectorAll('{selector}')].map(e => e.getAttribute('{name}'))")


def test_the_page_is_one_file_without_mathematics_of_its_own():
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<script[^>]+src|<link[^>]+stylesheet|@import|innerHTML", text)
    assert not re.search(r"Math\.(exp|log|pow|sqrt|log2|expm1|log1p)\(", text)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_draws_every_row_in_every_shape(browser, url, width, scheme):
    browser.complaints.clear()
    for row, (alpha, beta) in enumerate([(0.2, 0.7), (1, 0), (-0.3, 0.1), (0, 0), (1.5, -0.5), (0, 1)]):
        browser.open(f"{url}?row={row}&alpha={alpha}&beta={beta}", row, alpha, beta, width, scheme)
        assert browser.value("document.body.scrollWidth <= innerWidth"), "it scrolls sideways"
        drawn = browser.value("document.querySelector('main').innerHTML")
        assert "NaN" not in drawn and drawn.count('class="bar') > 40
    assert browser.complaints == []
    assert browser.value("document.querySelector('b, i i') === document.querySelector('#readout b')"), (
        "a label became HTML"
    )


@needs_browser
def test_it_shows_what_the_server_computed(browser, url):
    browser.open(url + "?row=1&alpha=0.2&beta=0.7", row=1)
    assert browser.value("document.querySelector('#value').textContent") == "D = 2.17 nats at (0.2, 0.7)"
    landings = browser.value("[...document.querySelectorAll('#landings tr')].map(r => r.innerText)")
    assert [line.split("\t")[0] for line in landings] == [
        "teacher",
        "student now",
        "lands at (0.2, 0.7)",
        "under forward KL",
        "under reverse KL",
    ]
    browser.open(url + "?row=5&alpha=1&beta=0", row=5, alpha=1, beta=0)
    assert browser.value("document.querySelector('#value').textContent") == "D = ∞ at (1, 0)"
    assert "nowhere" in browser.value("document.querySelector('#landings').innerText")


@needs_browser
@pytest.mark.parametrize("row, alpha, beta", [(1, 0.2, 0.7), (5, 0.2, 0.7), (5, 0, 0.5)])
def test_the_picture_is_of_the_numbers(browser, url, row, alpha, beta):
    browser.open(f"{url}?row={row}&alpha={alpha}&beta={beta}", row, alpha, beta)
    query = f"row={row}&alpha={alpha}&beta={beta}"
    start, point, landing = (json.load(urlopen(url + path)) for path in ("start", f"point?{query}", f"landing?{query}"))
    one_each = "e => ['y', 'height', 'class'].map(name => e.getAttribute(name))"
    bars = {
        name: browser.value(f"[...document.querySelectorAll('#{name} .bar:is(rect)')].map({one_each})")
        for name in ("mass", "hardness", "confidence", "push")
    }
    shown = {name: np.array([float(height) for _, height, _ in each]) for name, each in bars.items()}
    teacher = np.array(start["rows"][row]["teacher"])
    np.testing.assert_allclose(shown["mass"] / shown["mass"].max(), teacher / teacher.max(), atol=1e-6)
    assert {kind for *_, kind in bars["mass"]} == {"bar teacher"}
    for name in ("hardness", "confidence"):
        expected = np.array([float(value) for value in point[name]])
        infinite = np.isinf(expected)
        assert [kind == "bar infinite" for *_, kind in bars[name]] == infinite.tolist()
        expected, found = expected[~infinite], shown[name][~infinite]
        np.testing.assert_allclose(found / found.max(), expected / expected.max(), atol=1e-6)
    push, shift = -np.array(point["gradient"]), np.array(point["shift"])
    np.testing.assert_allclose(shown["push"] / shown["push"].max(), abs(push) / abs(push).max(), atol=1e-6)
    base = max(float(y) for y, *_ in bars["push"])  # where the bars that point down begin
    for (y, height, kind), up, gain in zip(bars["push"], push, shift, strict=True):
        assert abs(float(y) + (float(height) if up > 0 else 0) - base) < 1e-6
        assert kind == ("bar " if gain > 0 else "bar hollow" if gain < 0 else "bar still")
    curves = {"student": start["rows"][row]["student"]}
    curves |= {kind: landing[name]["student"] for kind, name in KINDS.items() if landing[name]}
    assert browser.value("document.querySelectorAll('#mass polyline').length") == len(curves)
    bottom = max(float(y) + float(height) for y, height, _ in bars["mass"])
    scale = shown["mass"].max() / teacher.max()
    for kind, expected in curves.items():
        points = browser.value(f"document.querySelector('#mass polyline.{kind}').getAttribute('points')").split()
        found = [(bottom - float(pair.split(",")[1])) / scale for pair in points]
        np.testing.assert_allclose(found, expected, atol=1e-6)


@needs_browser
def test_every_control_moves_the_point_and_the_picture(browser, url):
    browser.complaints.clear()
    browser.open(url + "?row=1", row=1)
    set_to = "(id, to) => {{ const e = document.getElementById(id); e.value = to; e.dispatchEvent(new Event('{}')); }}"
    pictures = []

    def changed(alpha, beta):
        browser.wait_for(1, alpha, beta)
        bars = attributes(browser, "#push rect", "height") + attributes(browser, "#mass .here", "points")
        assert bars not in pictures
        pictures.append(bars)
        assert browser.value("location.search") == f"?row=1&alpha={alpha:g}&beta={beta:g}"
        assert browser.value("document.getElementById('handle').getAttribute('aria-valuetext')") == (
            f"alpha {alpha:g}, beta {beta:g}"
        )
        for name, value in (("alpha", alpha), ("beta", beta)):
            assert float(browser.value(f"document.getElementById('{name}-slider').value")) == value

    browser.value(f"({set_to.format('input')})('alpha-slider', 0.6)")
    changed(0.6, 0.7)
    browser.value(f"({set_to.format('input')})('beta', 0.25)")
    changed(0.6, 0.25)
    browser.value("[...document.querySelectorAll('#points button')].find(b => b.textContent === 'reverse KL').click()")
    changed(0, 1)
    browser.value("document.getElementById('handle').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowDown", shift=True)
    changed(0.05, 0.99)
    x, y = browser.centre_of("#handle")
    unit = browser.value("document.querySelector('#plane .range').getBoundingClientRect().width")
    browser.mouse("mousePressed", x, y)
    browser.mouse("mouseMoved", x + 0.25 * unit, y + 0.19 * unit)
    browser.mouse("mouseReleased", x + 0.25 * unit, y + 0.19 * unit)
    changed(0.3, 0.8)
    browser.mouse("mousePressed", x + 0.94 * unit, y + 0.98 * unit)  # near a named point it takes that
    browser.mouse("mouseReleased", x + 0.94 * unit, y + 0.98 * unit)
    changed(1, 0)
    assert browser.complaints == []


@needs_browser
def test_a_finger_drags_the_point_or_taps_beside_it(browser, url):
    browser.open(url + "?row=1", row=1, width=390)
    browser("Emulation.setTouchEmulationEnabled", enabled=True)
    browser.value("document.getElementById('plane').scrollIntoView()")
    x, y = browser.centre_of("#handle")
    unit = browser.value("document.querySelector('#plane .range').getBoundingClientRect().width")
    scrolled = browser.value("scrollY")
    browser("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    for step in range(1, 9):
        point = {"x": x + 0.05 * step * unit, "y": y + 0.04 * step * unit}
        browser("Input.dispatchTouchEvent", type="touchMove", touchPoints=[point])
    browser("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.wait_for(1, 0.6, 0.38)
    assert browser.value("scrollY") == scrolled
    browser("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    browser("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.wait_for(1, 0.2, 0.7)
    browser("Emulation.setTouchEmulationEnabled", enabled=False)


@needs_browser
def test_a_page_that_is_too_narrow_to_read_does_not_break(browser, url):
    browser.complaints.clear()
    browser.open(url + "?row=1", row=1, width=60)
    assert browser.complaints == []


@needs_browser
def test_classes_are_chosen_by_keys_and_rows_by_the_menu(browser, url):
    browser.open(url + "?row=1", row=1)
    browser.value("document.getElementById('mass').focus()")
    before = int(browser.value("document.getElementById('mass').getAttribute('aria-valuenow')"))
    browser.press("ArrowRight")
    assert browser.value("document.querySelector('#readout b').textContent") == f"class {before + 1}"
    assert browser.value("document.querySelectorAll('.band').length") == 4
    browser.complaints.clear()
    to_row = "(e => {{ e.value = {}; e.dispatchEvent(new Event('change')); }})(document.getElementById('row'))"
    browser.value(to_row.format(5))  # of fewer classes than the one that was chosen
    browser.wait_for(5, 0.2, 0.7)
    assert int(browser.value("document.querySelector('#readout b').textContent").removeprefix("class ")) < 12
    browser.value(to_row.format(0))
    browser.wait_for(0, 0.2, 0.7)
    assert browser.complaints == []
    assert browser.value("document.querySelector('#readout b').textContent").startswith("class “<i>")
    assert browser.value("document.querySelector('#row option').textContent") == "a <b>row</b>"


@needs_browser
def test_what_is_refused_is_said(browser, url):
    browser.open(url)
    browser.value("(e => { e.value = 9; e.dispatchEvent(new Event('input')); })(document.getElementById('alpha'))")
    trouble = "document.getElementById('trouble').textContent"
    assert browser.value(trouble) == "alpha: give a number from −4 to 4"
    browser.value("(e => { e.value = 0.3; e.dispatchEvent(new Event('input')); })(document.getElementById('alpha'))")
    browser.wait_for(0, 0.3, 0.7)
    assert browser.value(trouble) == ""
