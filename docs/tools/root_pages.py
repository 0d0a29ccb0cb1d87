"""Pages that stand outside of docs/, with their links as the site needs them.

CONTRIBUTING.md and its like are read in the repository too. In the site a link to a
page leads to the page, one to any other file becomes its path as code.
"""

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

PAGES = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "guides/launchers.md": "launch/README.md",
}
"""Where each is in the site, and the file that it is made of."""

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def pages() -> dict[str, str]:
    """Returns the pages by their path under docs/."""
    return {
        place: moved((ROOT / file).read_text(), file, place)
        for place, file in PAGES.items()
        if (ROOT / file).exists()
    }


def moved(text: str, file: str, place: str) -> str:
    """Returns a page with its links as they must be in its new place.

    Args:
      text: The page.
      file: Where it stands in the repository.
      place: Where it comes to stand in docs/.
    """
    homes = {file: place for place, file in PAGES.items()}

    def link(found: re.Match[str]) -> str:
        mark, label, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path, hash_, anchor = target.partition("#")
        whole = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
        page = homes.get(whole)
        if page is None and whole.startswith("docs/"):
            page = whole.removeprefix("docs/")
        if page is None:
            return label if "`" in label else f"{label} (`{whole}`)"
        there = posixpath.relpath(page, posixpath.dirname(place) or ".")
        return f"{mark}[{label}]({there}{hash_}{anchor})"

    return _LINK.sub(link, text)
