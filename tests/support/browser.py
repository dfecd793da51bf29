"""Chromium without a window, controlled through its own protocol over a pipe: no driver and no port are needed."""

import base64
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-extensions", "--no-first-run", "--disable-dev-shm-usage")


class Page:
    """One tab. ``events``: all events that it reported, as (method, parameters)."""

    def __init__(self, send: int, receive: Any) -> None:
        self.send, self.receive = send, receive
        self.events: list[tuple[str, dict]] = []
        self.count = 0
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.send, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.count:
            self.events.append((answer["method"], answer["params"]))
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict:
        content = bytearray()
        while (byte := self.receive.read(1)) != b"\0":
            assert byte, "the browser ended"
            content += byte
        return json.loads(content)

    def open(self, path: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Load the file, on a screen of this size in CSS pixels, and wait until it is complete."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in (method for method, _ in self.events):
            message = self._next()
            self.events.append((message["method"], message["params"]))

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    @property
    def requests(self) -> list[str]:
        """The resources that were fetched, in addition to those in the page itself."""
        asked = [event["request"]["url"] for method, event in self.events if method == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith("data:")]

    @property
    def complaints(self) -> list[dict]:
        """Errors and all other output on the console."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for method, event in self.events if method in kinds]


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A tab of a browser that keeps its files in ``profile``."""
    to_browser, send = os.pipe()
    receive, from_browser = os.pipe()
    command = [CHROMIUM or "", *OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    # The browser reads from descriptor 3 and writes to 4.
    files: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_DUP2, to_browser, 3), (os.POSIX_SPAWN_DUP2, from_browser, 4)]
    files += [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
    process = os.posix_spawn(command[0], command, os.environ, file_actions=files)
    os.close(to_browser)
    os.close(from_browser)
    try:
        with os.fdopen(receive, "rb") as answers:
            yield Page(send, answers)
    finally:
        os.close(send)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
