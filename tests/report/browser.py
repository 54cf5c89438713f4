"""A headless Chromium, spoken to in its DevTools protocol: pages are opened, looked at and touched as a reader does."""

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
    """One tab. `said` is what was written to the console, `asked` what was asked for over the network or from the disk."""

    def __init__(self, socket: ClientConnection, session: str) -> None:
        self.socket, self.session, self.numbers = socket, session, itertools.count(100)
        self.place = ""  # the address of the page
        self.said: list[str] = []
        self.asked: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command, and its result; events that come before it are noted."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters, "sessionId": self.session}))
        while (found := self.event()).get("id") != number:
            pass
        assert "error" not in found, found
        return dict(found["result"])

    def event(self) -> dict[str, Any]:
        """What the browser says next: an event, or the answer to a command."""
        found = dict(json.loads(self.socket.recv(timeout=60)))
        values = found.get("params", {})
        match found.get("method"):
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded":
                self.said.append(json.dumps(values))
            case "Network.requestWillBeSent":
                self.asked.append(values["request"]["url"])
            case "Page.frameNavigated":
                self.place = values["frame"]["url"]
        return found

    def open(self, file: Path, *, width: int = 1280, dark: bool = False, scripts: bool = True, at: str = "") -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.said, self.asked = [], []
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=file.resolve().as_uri() + at)
        self.loaded()
        if self.place == "about:blank":
            self.loaded()

    def loaded(self) -> None:
        """Wait for a page to have loaded, or to have loaded itself anew."""
        while self.event().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript is."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def move(self, x: float, y: float) -> None:
        """The pointer to a place in the window, in pixels."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, file: Path) -> None:
        """The page from its beginning to its end."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def opened(profile: Path) -> Iterator[Page]:
    """An empty page of a browser that starts with a profile of its own."""
    assert PROGRAM is not None
    options = [
        "--headless",
        "--hide-scrollbars",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--remote-debugging-port=0",
    ]
    said = profile.with_name(f"{profile.name}.log")  # not a pipe, which stops who writes to it once it is full
    with said.open("wb") as log:
        process = subprocess.Popen([PROGRAM, *options, f"--user-data-dir={profile}", "about:blank"], stderr=log)
    try:
        patience = time.monotonic() + 60
        while (found := re.search(r"listening on (ws://\S+)\s", said.read_text("utf-8", "replace"))) is None:
            assert process.poll() is None, said.read_text("utf-8", "replace")
            assert time.monotonic() < patience, said.read_text("utf-8", "replace")
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
