"""Opens pages in a browser, takes screenshots and tells what is wrong with them.

    python tests/browser/pages.py --out build/screenshots report.html docs/frontier.svg home=site:index.html

Every page is opened 390 and 1280 pixels wide, in light and dark colours. What is wrong: errors and warnings on the console,
requests that leave the page's own folder or site, a page wider than its window, texts of a chart that overlap or are cut.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

SIZES = {"narrow": (390, 844), "wide": (1280, 900)}
_OF_SITE = "site:"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]

_AROUND = "<style>figure {{ margin: 8px }} svg {{ max-width: 100%; height: auto }}</style><figure>{}</figure>"

# Pairs of texts of one chart whose boxes share more than a pixel, and texts that reach out of it.
OVERLAPS = """() => {
  return [...document.querySelectorAll("figure svg")].flatMap((svg) => {
    const found = [], outer = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")]
      .filter((text) => text.textContent.trim() && text.getClientRects().length)
      .map((text) => ({ said: text.firstChild.nodeValue ?? text.textContent, box: text.getBoundingClientRect() }));
    texts.forEach(({ said, box }, index) => {
      if (box.left < outer.left - 1 || box.right > outer.right + 1 || box.top < outer.top - 1 || box.bottom > outer.bottom + 1)
        found.push(`a text reaches out of its chart: ${said}`);
      texts.slice(index + 1).forEach((other) => {
        const across = Math.min(box.right, other.box.right) - Math.max(box.left, other.box.left);
        const down = Math.min(box.bottom, other.box.bottom) - Math.max(box.top, other.box.top);
        if (across > 1 && down > 2) found.push(`texts overlap: ${said} and ${other.said}`);
      });
    });
    return found;
  });
}"""


def find_browser() -> str | None:
    """The path of a Chromium on this machine."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextmanager
def open_browser(path: str) -> Iterator[Any]:
    """A headless browser, without the network."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS, chromium_sandbox=False)
        try:
            yield browser
        finally:
            browser.close()


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The address of a folder that this machine shows itself, as a site: its search does not work from files."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Silent, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def check_page(browser: Any, file: Path, out: Path | None = None, name: str | None = None, site: str = "") -> list[str]:
    """What is wrong with a page, a line each; screenshots go to a folder ``out``, if there is one.

    ``site`` is the address that a ``file`` is asked from, in the place of the folder that it lies in.
    """
    problems, home = [], site or file.resolve().parent.as_uri()
    for size, (width, height) in SIZES.items():
        for theme in ("light", "dark"):
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
            context.set_default_timeout(120_000)  # a busy machine is not what is looked for here
            page = context.new_page()
            found: list[str] = []
            page.on("console", lambda message, found=found: _note(found, message))
            page.on("pageerror", lambda error, found=found: found.append(f"error: {error}"))
            page.on("request", lambda request, found=found: _note_request(found, request.url, home))
            if file.suffix == ".svg":  # on a page, as documents show it
                page.set_content(_AROUND.format(file.read_text()))
            else:
                page.goto(f"{site}/{file}" if site else file.resolve().as_uri())
            page.wait_for_timeout(200)
            found += page.evaluate(OVERLAPS)
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > width:
                found.append(f"the page is {wide} pixels wide")
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=out / f"{name or file.stem}-{size}-{theme}.png", full_page=True)
            problems += [f"{file.name}, {width} pixels, {theme}: {problem}" for problem in dict.fromkeys(found)]
            context.close()
    return problems


def _note(found: list[str], message: Any) -> None:
    if message.type in ("error", "warning"):
        found.append(f"console: {message.text}")


def _note_request(found: list[str], url: str, home: str) -> None:
    if not url.startswith((home, "data:", "blob:")):
        found.append(f"request: {url}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the screenshots")
    parser.add_argument("pages", nargs="+", help="files, or NAME=FILE; NAME=site:FILE for one of the documentation")
    parser.add_argument("--site", type=Path, default=Path("build/site"), help="folder of the documentation")
    arguments = parser.parse_args()
    path = find_browser()
    if path is None:
        print(f"no screenshots: no browser of {', '.join(BROWSERS)} is on this machine", file=sys.stderr)
        return 0
    problems = []
    with open_browser(path) as browser, serve(arguments.site) as site:
        for given in arguments.pages:
            name, _, file = given.rpartition("=")
            of_site = file.startswith(_OF_SITE)
            page, address = Path(file.removeprefix(_OF_SITE)), site if of_site else ""
            problems += check_page(browser, page, arguments.out, name or None, address)
    print("\n".join(problems) or f"{len(arguments.pages)} pages: no errors, no requests, no overlaps; {arguments.out}")
    return min(1, len(problems))


if __name__ == "__main__":
    sys.exit(main())
