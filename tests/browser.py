"""A headless Chromium, driven over a pipe in the DevTools protocol: JSON messages that end in NUL.

Two descriptors and json are all it takes; no browser driver and no websocket library.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
    "--remote-debugging-pipe"
).split()
SILENCE = 60  # seconds without a message after which chromium is given up
KEYS = dict(ArrowLeft=37, ArrowUp=38, ArrowRight=39, ArrowDown=40, Escape=27)


def unusable() -> str | None:
    """Why there is no chromium to test with; None if there is one. Distributions install a script
    of this name that only says where to get it, so its exit status counts."""
    if CHROMIUM is None:
        return "it is not installed"
    try:
        subprocess.run([CHROMIUM, "--version"], capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None


class Browser:
    """One page at a time, opened by `open`; `problems` and `requests` are those since then."""

    def __init__(self, profile: Path):
        to_child, self.out = os.pipe()
        self.inn, from_child = os.pipe()
        # Chromium reads messages from descriptor 3 and writes them to 4.
        quiet = [(os.POSIX_SPAWN_OPEN, k, os.devnull, os.O_RDWR, 0) for k in (1, 2)]
        pipes = [(os.POSIX_SPAWN_DUP2, to_child, 3), (os.POSIX_SPAWN_DUP2, from_child, 4)]
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        self.pid = os.posix_spawn(CHROMIUM, command, os.environ, file_actions=quiet + pipes)
        os.close(to_child), os.close(from_child)
        self.buffer, self.count, self.session = b"", 0, None
        self.problems, self.requests, self.loaded = [], [], False

    def begin(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Inspector"):
            self.call(f"{domain}.enable")

    def close(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.out), os.close(self.inn)

    def _message(self) -> dict:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.inn], [], [], SILENCE)
            assert ready, f"chromium has said nothing for {SILENCE} s"
            data = os.read(self.inn, 1 << 20)
            assert data, "chromium has gone"
            self.buffer += data
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        kind, values = message.get("method"), message.get("params", {})
        assert kind not in ("Inspector.targetCrashed", "Target.targetCrashed"), values
        if kind == "Runtime.exceptionThrown":
            self.problems.append(values["exceptionDetails"])
        elif kind in ("Log.entryAdded", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening"):
            self.problems.append(values)
        elif kind == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif kind == "Page.loadEventFired":
            self.loaded = True
        return message

    def call(self, method: str, **values) -> dict:
        self.count += 1
        message = dict(id=self.count, method=method, params=values)
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.out, data) :]
        while (answer := self._message()).get("id") != self.count:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _navigate(self, url: str):
        self.loaded = False
        self.call("Page.navigate", url=url)
        while not self.loaded:
            self._message()

    def timed(self, action: Callable) -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    def open(self, path: Path) -> float:
        """Loads the file; returns the seconds until its load event."""
        self._navigate("about:blank")
        self.problems, self.requests = [], []
        return self.timed(lambda: self._navigate(path.as_uri()))

    def js(self, expression: str):
        values = dict(expression=expression, returnByValue=True, awaitPromise=True)
        answer = self.call("Runtime.evaluate", **values)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, key: str, shift: bool = False):
        values = dict(key=key, code=key, windowsVirtualKeyCode=KEYS[key], modifiers=8 * shift)
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **values)
        self.settle()

    def settle(self):
        """Until what happened has been handled and painted."""
        self.js("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")

    def _middle(self, element: str) -> dict:
        """Where the element, a JavaScript expression, is after scrolling to it."""
        return self.js(
            f"(async () => {{ const it = {element}; it.scrollIntoView({{block: 'center'}});"
            "await new Promise(requestAnimationFrame);"
            "const {x, y, width, height} = it.getClientRects()[0];"
            "return {x: x + width / 2, y: y + height / 2}; })()"
        )

    def hover(self, element: str):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **self._middle(element))
        self.settle()

    def click(self, element: str):
        place = self._middle(element)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)
        self.settle()

    def size(self, width: int, height: int, dark: bool = False):
        metrics = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self) -> bytes:
        """A PNG of the window."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    chromium = Browser(profile)
    try:
        chromium.begin()
        yield chromium
    finally:
        chromium.close()
