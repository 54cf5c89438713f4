"""A headless Chromium, controlled by its DevTools protocol."""

import base64
import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """One tab. `messages`: console output; `requests`: URLs requested from network or disk."""

    def __init__(self, socket: ClientConnection, session: str) -> None:
        self.socket, self.session, self.numbers = socket, session, itertools.count(100)
        self.url = ""
        self.messages: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events received before it are recorded."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters, "sessionId": self.session}))
        while (found := self.event()).get("id") != number:
            pass
        assert "error" not in found, found
        return dict(found["result"])

    def event(self) -> dict[str, Any]:
        """Return the next message of the browser: an event, or the result of a command."""
        found = dict(json.loads(self.socket.recv(timeout=60)))
        values = found.get("params", {})
        match found.get("method"):
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded":
                self.messages.append(json.dumps(values))
            case "Network.requestWillBeSent":
                self.requests.append(values["request"]["url"])
            case "Page.frameNavigated":
                self.url = values["frame"]["url"]
        return found

    def open(self, file: Path, *, width: int = 1280, dark: bool = False, scripts: bool = True, at: str = "") -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.messages, self.requests = [], []
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=file.resolve().as_uri() + at)
        self.loaded()
        if self.url == "about:blank":
            self.loaded()

    def loaded(self) -> None:
        """Wait until a page has loaded or reloaded."""
        while self.event().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> Any:
        """Evaluate a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def move(self, x: float, y: float) -> None:
        """Move the pointer to a position in the window, in pixels."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, file: Path) -> None:
        """Save a screenshot of the whole page."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def opened(profile: Path) -> Iterator[Page]:
    """Start a browser with its own profile and yield an empty page."""
    assert PROGRAM is not None
    options = [
        "--headless",
        "--hide-scrollbars",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--remote-debugging-port=0",
    ]
    stderr = profile.with_name(f"{profile.name}.log")  # not a pipe, which blocks its writer when it is full
    with stderr.open("wb") as log:
        process = subprocess.Popen([PROGRAM, *options, f"--user-data-dir={profile}", "about:blank"], stderr=log)
    try:
        deadline = time.monotonic() + 60
        while (found := re.search(r"listening on (ws://\S+)\s", stderr.read_text("utf-8", "replace"))) is None:
            assert process.poll() is None, stderr.read_text("utf-8", "replace")
            assert time.monotonic() < deadline, stderr.read_text("utf-8", "replace")
            time.sleep(0.05)
        address = found[1]
        with connect(address, max_size=None) as socket:

            def call(number: int, method: str, **parameters: Any) -> dict[str, Any]:
                socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
                while (found := json.loads(socket.recv(timeout=60))).get("id") != number:
                    pass
                return dict(found["result"])

            target = call(1, "Target.createTarget", url="about:blank")["targetId"]
            session = call(2, "Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            yield Page(socket, session)
    finally:
        process.kill()
        process.wait()
