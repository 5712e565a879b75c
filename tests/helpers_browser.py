"""Drives a page in a headless Chromium by the protocol of DevTools."""

import asyncio
import contextlib
import os
import re
import shutil
import signal

import pytest


def find_chromium() -> str | None:
    """Chromium or Chrome: what CHROMIUM names, or what is installed."""
    names = "chromium", "chromium-browser", "google-chrome", "chrome"
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


class Browser:
    """A page in a headless Chromium, which is told what to do by the protocol of DevTools."""

    def __init__(self, socket):
        self.socket = socket
        self.count = 0
        self.errors = []

    async def ask(self, method, **params) -> dict:
        self.count += 1
        await self.socket.send_json({"id": self.count, "method": method, "params": params})
        while (answer := await self.socket.receive_json()).get("id") != self.count:
            if answer["method"] == "Runtime.exceptionThrown":
                self.errors.append(answer["params"])
        return answer["result"]

    async def run(self, expression):
        """The value of an expression of JavaScript."""
        how = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = await self.ask("Runtime.evaluate", expression=expression, **how)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, condition) -> None:
        """Waits until an expression is true, or the page shows an error."""
        while not await self.run(condition):
            assert not (error := await self.run("$('error').textContent")), error
            await asyncio.sleep(0.05)

    async def take_file(self, path) -> None:
        """Chooses a file, and waits until the page has heard it."""
        found = await self.ask("Runtime.evaluate", expression="$('file')")
        await self.ask(
            "DOM.setFileInputFiles", files=[str(path)], objectId=found["result"]["objectId"]
        )
        await self.until("texts.length && !talk")


needs_browser = pytest.mark.skipif(
    not find_chromium(), reason="no Chromium here; CHROMIUM=PROGRAM names one"
)


@contextlib.asynccontextmanager
async def browser(session, url, microphone, folder):
    """Opens the url. The profile lies in the folder."""
    flags = [
        *("--headless", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"),
        *("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"),
        *(f"--use-file-for-fake-audio-capture={microphone}", f"--user-data-dir={folder}"),
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ]
    pipe = asyncio.subprocess.PIPE
    # Chromium's children outlive it unless their group is killed.
    process = await asyncio.create_subprocess_exec(
        find_chromium(), *flags, "about:blank", stderr=pipe, start_new_session=True
    )
    try:
        while not (found := re.search(rb"ws://([\w.:]+)/", await process.stderr.readline())):
            assert not process.stderr.at_eof()
        async with session.get(f"http://{found[1].decode()}/json/list") as answer:
            (page,) = [target for target in await answer.json() if target["type"] == "page"]
        async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            window = Browser(socket)
            await window.ask("Runtime.enable")
            await window.ask("Page.navigate", url=url)
            while not await window.run("document.readyState == 'complete' && location.port"):
                await asyncio.sleep(0.05)
            yield window
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
