"""What mkdocs asks for while it builds: pages that are made, and the navigation."""

import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from docs.tools import api_pages, commands_page, config_page, root_pages  # noqa: E402


def made_pages() -> dict[str, str]:
    """Returns every page that is not a file of docs/, by its path there."""
    return {
        "reference/config.md": config_page.page(),
        "reference/commands.md": commands_page.page(),
        **api_pages.pages(),
        **root_pages.pages(),
    }


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made, and puts folders of pages into the navigation."""
    try:
        pages = made_pages()
    except (RuntimeError, ValueError) as error:
        raise PluginError(str(error)) from error
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    paths = [file.src_uri for file in files.documentation_pages()]
    config.nav = expanded(config.nav, sorted(paths, key=_rank), made=list(pages))
    return files


def _rank(path: str) -> tuple[bool, str]:
    """The order in a folder: its index, then by name."""
    return not path.endswith("/index.md"), path


def expanded(nav: Any, paths: list[str], made: list[str]) -> Any:
    """Returns the navigation with the pages of a folder in the place of its name.

    Args:
      nav: As in mkdocs.yml, or a part of it.
      paths: All pages, in the order that they have in a folder.
      made: Those of them that are made, which keep the order in which they are.

    Raises:
      PluginError: A folder has no page.
    """
    if isinstance(nav, list):
        return [expanded(item, paths, made) for item in nav]
    if isinstance(nav, dict):
        return {title: expanded(item, paths, made) for title, item in nav.items()}
    if not nav.endswith("/"):
        return nav
    ordered = [path for path in made if path.startswith(nav)]
    found = ordered or [path for path in paths if path.startswith(nav)]
    if not found:
        raise PluginError(
            f"mkdocs.yml: nav: {nav} must hold a page, got none. Drop it."
        )
    return found
