"""A real browser, driven over its DevTools protocol with nothing but the standard library."""

import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--remote-debugging-pipe")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on the PATH")
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "PageUp": 33, "PageDown": 34,
        "Tab": 9, " ": 32, "Enter": 13}
TYPED = {" ": " ", "Enter": "\r"}


class Browser:
    """One headless browser with one tab. It notes what the page asks the network for and what it complains about."""

    def __init__(self, executable: str, profile: Path):
        # The protocol's pipe is file descriptors 3 (to the browser) and 4 (from it): a shell moves stdin and stdout there.
        command = [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        shell = ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null']
        self.process = subprocess.Popen(shell + command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, start_new_session=True)
        self.buffer, self.count, self.session = b"", 0, {}
        self.requests, self.complaints, self.seen = [], [], []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def close(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def receive(self, deadline: float) -> dict:
        pipe = self.process.stdout.fileno()
        while b"\0" not in self.buffer:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser says nothing")
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                raise EOFError("the browser has closed its pipe: did it start?")
            self.buffer += chunk
        message, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(message)
        self.note(message.get("method"), message.get("params", {}))
        return message

    def note(self, method: str | None, params: dict):
        self.seen.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"])
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(params["args"])

    def send(self, method: str, **params) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params, **self.session}
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        deadline = time.monotonic() + 30
        while (reply := self.receive(deadline)).get("id") != self.count:
            pass
        assert "error" not in reply, (method, reply["error"])
        return reply["result"]

    def open(self, url: str):
        self.requests, self.complaints, self.seen = [], [], []
        self.look()
        self.send("Page.navigate", url=url)
        deadline = time.monotonic() + 30
        while "Page.loadEventFired" not in self.seen:
            self.receive(deadline)

    def look(self, scheme: str = "light", width: int = 1000, height: int = 900):
        """The colour scheme that the reader prefers, and the size of the window."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def run(self, function: str, *arguments):
        """function(*arguments) in the page. Numbers that JSON does not have come back as text, which float() reads."""
        text = json.dumps(arguments)            # its -Infinity is not JSON, but it is JavaScript
        finite = "(_, x) => typeof x === 'number' && !Number.isFinite(x) ? String(x) : x"
        reply = self.send("Runtime.evaluate", expression=f"JSON.stringify([({function})(...{text})], {finite})",
                          returnByValue=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return json.loads(reply["result"]["value"])[0]

    def texts(self) -> dict[str, str]:
        """{id: what is written in it}."""
        return self.run("""() => Object.fromEntries(
            [...document.querySelectorAll('[id]')].map(x => [x.id, x.textContent.trim()]))""")

    def settings(self) -> dict[str, float]:
        """{id of a slider: its value}, and "adv"."""
        return self.run("""() => ({
            ...Object.fromEntries([...document.querySelectorAll('input[type=range]')].map(x => [x.id, Number(x.value)])),
            adv: Number(document.querySelector('input[name=adv]:checked').value)})""")

    def box(self, selector: str) -> dict[str, float]:
        """Where an element is in the window, after scrolling to it."""
        return self.run("""selector => { const x = document.querySelector(selector); x.scrollIntoView({block: 'center'});
            return x.getBoundingClientRect(); }""", selector)

    def press(self, key: str, times: int = 1):
        for _ in range(times):
            event = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key]}
            self.send("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": TYPED[key]} if key in TYPED else {}))
            self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def keys(self, id: str, key: str, times: int = 1):
        """Focus a control, press a key."""
        self.run("id => document.getElementById(id).focus()", id)
        self.press(key, times)

    def mouse(self, kind: str, x: float, y: float):
        pressed = {"button": "left", "buttons": 0 if kind == "mouseReleased" else 1, "clickCount": 1}
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)

    def drag(self, id: str, shares: list[float], check: Callable[[], None]):
        """Drag a slider's handle over these shares of its width. `check` is called on the way."""
        box = self.box(f"#{id}")
        y = box["y"] + box["height"] / 2
        xs = [box["x"] + share * box["width"] for share in shares]
        self.mouse("mousePressed", xs[0], y)
        for x in xs:
            self.mouse("mouseMoved", x, y)
            check()
        self.mouse("mouseReleased", xs[-1], y)
