"""A headless Chromium, driven through its own protocol over two pipes: no library is needed, only the browser."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 60  # seconds
WITHOUT = "no Chromium is installed, so that no page is opened in a browser"


def _answers(command: str) -> bool:
    """Some systems have a command of that name which only says how to install the browser."""
    try:
        return subprocess.run([command, "--version"], capture_output=True, timeout=PATIENCE).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


CHROMIUM = next((found for name in NAMES if (found := shutil.which(name)) and _answers(found)), None)


class Browser:
    """One browser with one page; ``scripts=False`` opens it as for a reader who has switched JavaScript off."""

    def __init__(self, page: Path, *, width: int = 1000, dark: bool = False, scripts: bool = True) -> None:
        assert CHROMIUM, WITHOUT
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        ours, theirs = os.pipe(), os.pipe()
        # The browser reads its file descriptor 3 and writes 4.
        command = f'exec 3<&{ours[0]} 4>&{theirs[1]}; exec "$0" "$@"'
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        options += [f"--user-data-dir={self._profile.name}", "--disable-dev-shm-usage", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *options],
            pass_fds=(ours[0], theirs[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._write, self._read = os.fdopen(ours[1], "wb", 0), os.fdopen(theirs[0], "rb", 0)
        self._number, self._session, self._buffer = 0, "", b""
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.resize(width)
        if dark:
            features = [{"name": "prefers-color-scheme", "value": "dark"}]
            self._send("Emulation.setEmulatedMedia", features=features)
        self._send("Emulation.setScriptExecutionDisabled", value=not scripts)
        self._send("Page.enable")
        self.open(page)

    def open(self, page: Path) -> None:
        """Go to another page, and wait until it is loaded."""
        self._send("Page.navigate", url=page.resolve().as_uri())
        self._until("Page.loadEventFired")

    def resize(self, width: int) -> None:
        """Another width of the window, in pixels."""
        size = {"width": width, "height": 1400, "deviceScaleFactor": 1, "mobile": False}
        self._send("Emulation.setDeviceMetricsOverride", **size)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._write.close()
        self._read.close()
        self._profile.cleanup()

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], PATIENCE)
            more = os.read(self._read.fileno(), 65536) if ready else b""
            if not more:
                raise RuntimeError("the browser has gone" if ready else f"the browser is silent for {PATIENCE} s")
            self._buffer += more
        first, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(first))

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        said = {"id": self._number, "method": method, "params": params}
        if self._session:
            said["sessionId"] = self._session
        self._write.write(json.dumps(said).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return dict(message["result"])

    def _until(self, event: str) -> None:
        while self._message().get("method") != event:
            pass

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression, or what it promises; it works where the page's own scripts are off."""
        result = self._send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def text(self, selector: str) -> str:
        """What an element says."""
        return str(self.ask(f"document.querySelector({json.dumps(selector)}).textContent"))

    def press(self, key: str, times: int = 1) -> None:
        """A key, sent to what has the focus."""
        codes = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35, "Tab": 9, "Enter": 13}
        for _ in range(times):
            about: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
            if key == "Enter":
                about["text"] = "\r"
            self._send("Input.dispatchKeyEvent", type="keyDown", **about)
            self._send("Input.dispatchKeyEvent", type="keyUp", **about)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """The left mouse button, pressed at ``start`` and let go at ``end``."""
        held = {"button": "left", "buttons": 1, "clickCount": 1}
        self._send("Input.dispatchMouseEvent", type="mousePressed", x=start[0], y=start[1], **held)
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        for x, y in (middle, end):
            self._send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, button="left", buttons=1)
        self._send("Input.dispatchMouseEvent", type="mouseReleased", x=end[0], y=end[1], **held)

    def picture(self, path: Path) -> None:
        """A screenshot of the whole page."""
        data = self._send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))
