"""A headless Chromium driven over its DevTools pipe: no driver, no package, no network."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from itertools import count

BINARY = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_LAUNCH = "import os, sys; os.dup2({}, 3); os.dup2({}, 4); os.execv(sys.argv[1], sys.argv[1:])"
_KEYS = {
    "Tab": (9, ""),
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "Space": (32, " "),
    "PageUp": (33, ""),
    "PageDown": (34, ""),
    "End": (35, ""),
    "Home": (36, ""),
    "ArrowLeft": (37, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
}
_SHIFT = 8


class Chromium:
    """One browser with one page; keeps what the page complained about and what it asked for."""

    def __init__(self, profile):
        commands, self._send = os.pipe()
        self._receive, answers = os.pipe()
        # away from 3 and 4, where the browser wants its ends of the pipes
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]
        options = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--remote-debugging-pipe", "--no-first-run", "--disable-background-networking"),
            *(f"--user-data-dir={profile}", "--hide-scrollbars", "about:blank"),
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH.format(*ends), BINARY, *options],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (commands, answers, *ends):
            os.close(end)
        self._numbers, self._buffer, self._session = count(1), b"", None
        self.complaints, self.requests, self._loaded, self._saved = [], [], False, None
        target = self._page_target()
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Ask and wait for the answer; what happens meanwhile is noted."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def open(self, path, *, scheme="light", width=1200, height=900, motion=""):
        """Load a file or address under a colour scheme, a wish for less motion, and a width."""
        self.complaints, self.requests, self._loaded = [], [], False
        self._features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.call("Emulation.setEmulatedMedia", media="", features=self._features)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=path if isinstance(path, str) else path.as_uri())
        while not self._loaded:
            self._next()

    def run(self, script):
        """The value of a JavaScript expression."""
        settings = {"returnByValue": True, "awaitPromise": True}
        result = self.call("Runtime.evaluate", expression=script, **settings)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def wait(self, script, seconds=60):
        """Wait until a JavaScript expression is true; its value."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = self.run(script)
            if value:
                return value
            time.sleep(0.05)
        raise TimeoutError(f"never true: {script}")

    def choose_file(self, selector, path):
        """Give a file to an input of the page, as dropping or choosing it does."""
        document = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def click(self, selector):
        """Press the mouse in the middle of an element."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({selector!r});"
            " e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            place = {"x": x, "y": y, "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **place)

    def drag(self, path, *, touch=False, release=True):
        """Press at the first point of a path, move along it, and let go at the last one."""
        names = ("touchStart", "touchMove", "touchEnd")
        names = names if touch else ("mousePressed", "mouseMoved", "mouseReleased")
        steps = [(names[0], path[0]), *((names[1], point) for point in path[1:])]
        for kind, (x, y) in [*steps, (names[2], path[-1])] if release else steps:
            if touch:
                points = [] if kind == "touchEnd" else [{"x": x, "y": y}]
                self.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)
            else:
                place = {"x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1}
                self.call("Input.dispatchMouseEvent", type=kind, **place)

    def press(self, key, *, shift=False):
        """Press a key of the keyboard."""
        code, typed = _KEYS[key]
        name = " " if key == "Space" else key
        named = {"key": name, "code": key, "windowsVirtualKeyCode": code}
        named["modifiers"] = _SHIFT if shift else 0
        self.call("Input.dispatchKeyEvent", type="keyDown", text=typed, **named)
        self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def saved(self, folder, action):
        """The file that the page saves in a folder during an action."""
        self._saved = None
        settings = {"downloadPath": str(folder), "eventsEnabled": True}
        self.call("Browser.setDownloadBehavior", behavior="allow", **settings)
        action()
        while self._saved is None:
            self._next()
        return folder / self._saved

    def show_on_paper(self):
        """Apply the styles of print, as a print preview does."""
        self.run("dispatchEvent(new Event('beforeprint'))")
        self.call("Emulation.setEmulatedMedia", media="print", features=self._features)

    def roles(self):
        """Role and name of everything that a screen reader is told, in order."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]

    def screenshot(self, path, *, whole=True):
        """Write a picture of the page, all of it or what the window shows."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        self._session = None
        try:
            self.call("Browser.close")
        finally:
            os.close(self._send)
            os.close(self._receive)
            self._process.wait(timeout=20)

    def _page_target(self):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for target in self.call("Target.getTargets")["targetInfos"]:
                if target["type"] == "page":
                    return target["targetId"]
        raise TimeoutError("the browser opened no page")

    def _next(self):
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._receive], [], [], 60)
            part = os.read(self._receive, 1 << 20) if ready else b""
            if not part:
                raise TimeoutError("the browser has gone or does not answer")
            self._buffer += part
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(raw)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method, params):
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Browser.downloadWillBegin":
            self._name = params["suggestedFilename"]
        elif method == "Browser.downloadProgress" and params["state"] == "completed":
            self._saved = self._name
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["exception"]["description"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(params["args"]))
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
