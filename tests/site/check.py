"""Looks at every page of the built site in a headless Chromium, in light and in dark, wide and narrow.

    check.py CHROMIUM BOOK SCREENSHOTS

The windows have 1,300 pixels and, like a phone's, 390. No page is wider than its window, and in the wide one no block of
code is cut off. Every image loads, and its text stays readable. Text and links stand out from their background, blocks of
code have a language, and the console stays empty. Prints what is wrong, and exits 1 if anything is. Writes a screenshot of
each page, theme and width.
"""

import base64
import functools
import http.server
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

WIDTHS = (1300, 390)
HEIGHT = 900

SCHEMES = ("light", "dark")

# Runs in the page. Returns a list of problems.
LOOK = r"""
(async () => {
  const problems = [];
  const main = document.querySelector('main');
  for (const code of main.querySelectorAll('pre > code')) {
    const start = JSON.stringify(code.textContent.slice(0, 50));
    if (!/language-/.test(code.className)) problems.push(`a block of code has no language: ${start}`);
    const pre = code.parentElement;
    if (innerWidth >= 1300 && (code.scrollWidth > code.clientWidth + 1 || pre.scrollWidth > pre.clientWidth + 1))
      problems.push(`a block of code is cut off, ${code.scrollWidth} of ${code.clientWidth} pixels: ${start}`);
  }
  for (const image of main.querySelectorAll('img')) {
    try { await image.decode(); } catch { }
    if (!image.naturalWidth) problems.push(`an image does not load: ${image.src}`);
    if (!image.alt) problems.push(`an image has no text: ${image.src}`);
    if (image.checkVisibility() && image.clientWidth < 0.7 * image.naturalWidth)
      problems.push(`an image is small, ${image.clientWidth} of ${image.naturalWidth} pixels: ${image.src}`);
  }
  if (main.scrollWidth > main.clientWidth + 1 || document.documentElement.scrollWidth > innerWidth)
    problems.push('the page is wider than its place');
  const light = (color) => {
    const [r, g, b] = color.match(/[\d.]+/g).map(Number).map((c) => c / 255)
      .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = light(getComputedStyle(document.documentElement).backgroundColor);
  for (const [kind, element] of [['text', main], ['a link', main.querySelector('p a, li a, td a')]]) {
    if (!element) continue;
    const colors = [light(getComputedStyle(element).color), background];
    const contrast = (Math.max(...colors) + 0.05) / (Math.min(...colors) + 0.05);
    if (!(contrast >= 4.5)) problems.push(`${kind} has a contrast of ${contrast.toFixed(1)}`);
  }
  return {problems, height: document.documentElement.scrollHeight, dark: background < 0.2};
})()
"""


class Browser:
    """A Chromium, spoken to by its DevTools protocol over a pipe."""

    def __init__(self, program, profile):
        from_us, to_it = os.pipe()
        from_it, to_us = os.pipe()
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            # A container has 64 MiB there.
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        # The browser reads from descriptor 3 and writes to 4.
        words = f'exec "$@" 3<&{from_us} 4>&{to_us}'
        self.process = subprocess.Popen(
            ["bash", "-c", words, "bash", program, *flags],
            pass_fds=(from_us, to_us),
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self.input = os.fdopen(to_it, "wb", buffering=0)
        self.output = os.fdopen(from_it, "rb")
        self.number = 0
        self.events = []
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def read(self):
        message = bytearray()
        while (byte := self.output.read(1)) != b"\0":
            if not byte:
                raise SystemExit("the browser has ended: run it by hand with --headless --dump-dom about:blank")
            message += byte
        return json.loads(message)

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.input.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") != self.number:
                self.events.append(answer)
            elif "error" in answer:
                raise SystemExit(f"{method}: {answer['error']}")
            else:
                return answer["result"]

    def wait_for(self, event):
        while not any(each["method"] == event for each in self.events):
            self.events.append(self.read())

    def evaluate(self, script):
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise SystemExit(f"the script of the check failed: {result['exceptionDetails']}")
        return result["result"].get("value")

    def open(self, url, width, scheme):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=HEIGHT, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired")

    def complaints(self):
        for event in self.events:
            parameters = event.get("params", {})
            match event["method"]:
                case "Runtime.exceptionThrown":
                    yield f"an exception: {parameters['exceptionDetails'].get('exception', {}).get('description')}"
                case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                    yield f"the console: {parameters['args']}"
                case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                    yield f"the console: {parameters['entry']['text']} {parameters['entry'].get('url', '')}"
                case "Network.loadingFailed" if not parameters.get("canceled"):
                    yield f"a request failed: {parameters['errorText']}"

    def screenshot(self, path, width, height):
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, 8000), "scale": 1}
        image = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(image["data"]))

    def close(self):
        self.call("Browser.close")
        self.process.wait()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def look(program, book, pictures):
    """Yields the problems of all pages."""
    handler = functools.partial(Quiet, directory=book)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pages = [page.relative_to(book) for page in sorted(book.rglob("*.html"))]
    # The side bar's own page, the page of all pages, and the decisions, which are a book of plain text.
    pages = [page for page in pages if page.name not in ("toc.html", "print.html", "404.html")]
    pages = [page for page in pages if page.parts[0] != "decisions" or page.name == "index.html"]
    if len(pages) < 30:
        yield f"only {len(pages)} pages were built"
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(program, profile)
        for width, scheme, page in itertools.product(WIDTHS, SCHEMES, pages):
            browser.open(f"http://127.0.0.1:{server.server_port}/{page}", width, scheme)
            seen = browser.evaluate(LOOK)
            if seen["dark"] != (scheme == "dark"):
                seen["problems"].append("the page does not follow the preference of the system")
            for problem in [*seen["problems"], *browser.complaints()]:
                yield f"{page}, {width} pixels, {scheme}: {problem}"
            name = str(page.with_suffix("")).replace("/", "-")
            browser.screenshot(pictures / f"{name}-{width}-{scheme}.png", width, seen["height"])
        browser.close()
    print(f"{len(pages)} pages in {len(SCHEMES)} themes and {len(WIDTHS)} widths; screenshots are in {pictures}")


if __name__ == "__main__":
    program, book, pictures = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    pictures.mkdir(parents=True, exist_ok=True)
    problems = list(look(program, book, pictures))
    print("\n".join(problems))
    raise SystemExit(1 if problems else 0)
