"""A headless Chromium, driven over the two pipes of its DevTools protocol: no package beside the browser."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-extensions", "--hide-scrollbars",
    "--allow-pre-commit-input", "--remote-debugging-pipe",
)  # fmt: skip
FRAMES = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


def found() -> str | None:
    """The browser to use: $CHROME, else the first of the usual names on the PATH."""
    return os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. `call` is one command of the protocol; what the browser says unasked stands in `events`."""

    def __init__(self, profile: Path):
        to_browser, self.write = os.pipe()
        self.read, from_browser = os.pipe()
        os.set_inheritable(to_browser, True)
        pipes = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        self.process = subprocess.Popen(
            ["bash", "-c", pipes, found(), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.answers, self.sent, self.session = os.fdopen(self.read, "rb"), 0, None
        self.events: list[dict] = []
        self.rest = b""
        targets = self.call("Target.getTargets")["targetInfos"]
        (tab,) = [target["targetId"] for target in targets if target["type"] == "page"]
        self.session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict:
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.sent:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict:
        while b"\0" not in self.rest:
            more = self.answers.read1(1 << 20)
            assert more, "the browser has ended"
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, fragment: str = "", *, width: int = 1280, height: int = 900) -> None:
        """Shows a file at a window width in CSS pixels and waits until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        for url in ("about:blank", path.as_uri() + fragment):  # another fragment alone would load nothing
            self.events.clear()
            self.call("Page.navigate", url=url)
            while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
                self.events.append(self._next())
        self.run(FRAMES)  # before its first picture a page hears no mouse

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, or of the promise that it is."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """Brings an element into view and clicks on its middle, as a hand would."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center'}}); {FRAMES}")
        x, y = self.run(
            f"(() => {{ const b = {element}.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.run(FRAMES)  # what a click moves has moved before the next one aims

    def press(self, key: str, text: str = "") -> None:
        """One key, as `Enter` with the text `\\r`."""
        extra = {"text": text, "windowsVirtualKeyCode": ord(text)} if text else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **extra)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def requests(self) -> list[str]:
        """The addresses that the page shown has asked for."""
        asked = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in asked]

    def close(self) -> None:
        os.close(self.write)
        self.answers.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
