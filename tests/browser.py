"""Headless Chromium, driven over its DevTools protocol: open a page, evaluate JavaScript, read its console."""

import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """Path of an installed Chromium or Chrome."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. Use as a context manager; `profile` is an empty folder."""

    def __init__(self, program: str, profile: Path) -> None:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server"]
        flags += [f"--user-data-dir={profile}", "--remote-debugging-port=0", "--window-size=1400,900", "about:blank"]
        self._process = subprocess.Popen([program, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._profile, self._ids = profile, itertools.count(1)
        self.messages: list[str] = []  # what the page wrote to its console, and exceptions nobody caught

    def __enter__(self) -> "Browser":
        try:
            self._connection = self._connect().__enter__()
            for domain in ("Runtime", "Log", "Page"):
                self._call(f"{domain}.enable")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()
        self._end()

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        """The JSON value of an expression; promises are awaited. Raises RuntimeError with the page's exception."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:1000])
        return answer["result"].get("value")

    def wait_for(self, condition: str, timeout_s: float = 30.0) -> Any:
        """The first true value of an expression. Raises AssertionError with the console's messages if there is none."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            value = self.evaluate(condition)
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(f"never true: {condition}\nconsole: {self.messages}")

    def screenshot(self, path: Path) -> None:
        import base64

        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _connect(self):
        """To the first tab: Chromium writes its port into the profile, and lists its tabs over HTTP."""
        import httpx

        until, port_file = time.monotonic() + 60, self._profile / "DevToolsActivePort"
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise RuntimeError(f"the browser ended with exit code {self._process.returncode}")
            if port_file.exists() and port_file.read_text().count("\n") >= 1:
                port = port_file.read_text().splitlines()[0]
                with httpx.Client(verify=False, trust_env=False) as client:
                    tabs = client.get(f"http://127.0.0.1:{port}/json/list").json()
                pages = [tab for tab in tabs if tab["type"] == "page"]
                if pages:
                    return connect(pages[0]["webSocketDebuggerUrl"], max_size=None, proxy=None)
            time.sleep(0.05)
        raise RuntimeError("the browser did not open its DevTools port within 60 s")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(timeout=60))
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        match message.get("method"):
            case "Runtime.consoleAPICalled":
                self.messages.append(" ".join(str(part.get("value")) for part in parameters["args"]))
            case "Runtime.exceptionThrown":
                self.messages.append(json.dumps(parameters["exceptionDetails"])[:500])
            case "Log.entryAdded":
                self.messages.append(f"{parameters['entry']['level']}: {parameters['entry']['text']}")

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
