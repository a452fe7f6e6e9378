"""Chromium without a window, over its DevTools protocol through two pipes: one start serves many checks."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One tab. `problems` are what its console, its network and its scripts complained about since `show`."""

    def __init__(self, to_chromium: int, from_chromium: int) -> None:
        self._to, self._from = to_chromium, from_chromium
        self._unread, self._count, self._session = b"", 0, ""
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def show(self, page: Path, width: int, *, dark: bool = False) -> None:
        """Loads the page as a window of that width would show it, and waits until it is there."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.problems.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> object:
        """The value of some JavaScript on the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """A key, on what has the focus."""
        code = {"ArrowRight": 39, "Tab": 9, " ": 32}[key]
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if kind == "keyDown" and len(key) == 1 else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def screenshot(self) -> bytes:
        """PNG of what is in the window."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def call(self, method: str, **parameters: object) -> dict:
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._count, "method": method, "params": parameters, **session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self._unread:
            received = os.read(self._from, 1 << 20)
            assert received, "chromium is gone"
            self._unread += received
        text, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(text)
        match message.get("method"):
            case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled" | "Log.entryAdded":
                self.problems.append(json.dumps(message["params"]))
            case "Network.requestWillBeSent" if not message["params"]["request"]["url"].startswith(("file:", "data:")):
                self.problems.append(f"requests {message['params']['request']['url']}")
        return message


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser that has no other state than in the folder `profile`."""
    assert CHROMIUM is not None
    from_us, to_chromium = os.pipe()
    from_chromium, to_us = os.pipe()

    def as_three_and_four() -> None:
        read, write = os.dup(from_us), os.dup(to_us)
        os.dup2(read, 3)
        os.dup2(write, 4)

    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
    command = [CHROMIUM, *flags, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, preexec_fn=as_three_and_four, close_fds=False, stdout=subprocess.DEVNULL
    )
    os.close(from_us)
    os.close(to_us)
    opened = Browser(to_chromium, from_chromium)
    try:
        yield opened
    finally:
        opened.call("Browser.close")
        process.wait(timeout=20)
