"""The text of pages: links, of Markdown files and of a built site; flags it names."""

import html.parser
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

_LINK = re.compile(r"\]\(<?([^()\s>]+)>?(?:\s+\"[^\"]*\")?\)")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$")


def without_blocks(text: str) -> str:
    """Returns a Markdown page without its fenced blocks."""
    return re.sub(r"^( *)(`{3,}).*?^\1\2\s*$", "", text, flags=re.M | re.S)


def flags_in_prose(text: str) -> list[str]:
    """Lists the flags that the text of a page names, blocks left out.

    Args:
      text: Of the page.
    """
    spans = re.findall(r"`([^`]+)`", without_blocks(text))
    return [f for span in spans for f in re.findall(r"(?<!\S)--(\w+)(?!\w*-)", span)]


def anchors(text: str) -> set[str]:
    """Returns the anchors that the headings of a Markdown page have on GitHub."""
    found: set[str] = set()
    for line in without_blocks(text).splitlines():
        if heading := _HEADING.match(line):
            words = re.sub(r"[^\w\- ]", "", heading[1].lower())
            found.add(words.replace(" ", "-"))
    return found


def dead_links(page: Path) -> list[str]:
    """Lists the links of a Markdown file whose files or anchors are not there.

    Args:
      page: The file; links to other hosts are not followed.
    """
    text, dead = page.read_text(), []
    prose = re.sub(r"`[^`\n]+`", "", without_blocks(text))
    for target in _LINK.findall(prose):
        if urlsplit(target).scheme:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / unquote(path)) if path else page
        if not there.exists():
            dead.append(f"{page.name}: {target}: no such file")
        elif anchor and there.suffix == ".md":
            if anchor not in anchors(there.read_text()):
                dead.append(f"{page.name}: {target}: no such heading")
    return dead


ASSETS = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "link": "href",
    "object": "data",
    "script": "src",
    "source": "src",
    "video": "src",
}
"""What a browser loads by itself, by tag."""

_PLAIN_LINKS = ("alternate", "canonical", "next", "prev")
"""What a `link` tag may name without anything being loaded."""


class Page(NamedTuple):
    """What is in a built page.

    Args:
      links: Where it leads.
      assets: What it loads.
      ids: Its anchors.
    """

    links: list[str]
    assets: list[str]
    ids: set[str]


class _Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page([], [], set())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.page.ids.update(values[n] for n in ("id", "name") if n in values)
        if tag == "a" and "href" in values:
            self.page.links.append(values["href"])
        source = values.get(ASSETS.get(tag, ""), "")
        if source and values.get("rel") not in _PLAIN_LINKS:
            self.page.assets.append(source)


def read(text: str) -> Page:
    """Reads a built page."""
    reader = _Reader()
    reader.feed(text)
    return reader.page


def foreign_assets(site: Path) -> list[str]:
    """Lists what pages and style sheets of a site load from other hosts.

    Args:
      site: Its folder.
    """
    found = []
    for file in sorted(site.rglob("*.html")):
        found += [
            f"{file.name}: {a}" for a in read(file.read_text()).assets if _host(a)
        ]
    for file in sorted(site.rglob("*.css")):
        urls = re.findall(r"(?:url\(|@import\s+)['\"]?([^'\")\s;]+)", file.read_text())
        found += [f"{file.name}: {url}" for url in urls if _host(url)]
    return found


def dead_in_site(site: Path) -> list[str]:
    """Lists links and assets of a site whose files or anchors are not there.

    Args:
      site: Its folder.
    """
    pages = {file: read(file.read_text()) for file in sorted(site.rglob("*.html"))}
    dead = []
    for file, page in pages.items():
        if file.name == "404.html":  # it is shown at any address
            continue
        for target in (*page.links, *page.assets):
            if urlsplit(target).scheme or _host(target):
                continue
            path, _, anchor = target.partition("#")
            there = (file.parent / unquote(path.partition("?")[0])).resolve()
            there = file if not path else there
            there = there / "index.html" if there.is_dir() else there
            if not there.is_file():
                dead.append(f"{file.relative_to(site)}: {target}")
            elif anchor and there in pages and unquote(anchor) not in pages[there].ids:
                dead.append(f"{file.relative_to(site)}: {target}: no such anchor")
    return dead


def _host(target: str) -> str:
    return urlsplit(target).netloc
