"""What the site needs beside mkdocs' own: pages from elsewhere in the repository, and their links.

The READMEs of folders stay where they are read first; the site shows them as pages of its own.
Links in all pages are written as they work in the repository, and turned into the site's here. A
link to what the site does not have becomes the path as text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]

# Where a page's source is in the repository → its place in the site.
ELSEWHERE = {
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "README.md": "index.md",  # for links: the site has a first page of its own
    "bench/README.md": "bench.md",
    "eval/README.md": "evaluation.md",
    "kernels/README.md": "kernels.md",
}
_SOURCE = {page: source for source, page in ELSEWHERE.items() if source != "README.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
# Docstrings name things as Sphinx does; the page shows the name alone.
_ROLE = re.compile(r":(?:func|class|mod|data|meth|attr):(?=<code)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from elsewhere."""
    for page, source in _SOURCE.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages."""
    here = page.file.src_uri
    source = _SOURCE.get(here, f"docs/{here}")

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        found = ELSEWHERE.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(found) is None:
            if not (ROOT / path).exists():
                return match[0]  # mkdocs says that it leads nowhere
            return text if text.strip("`") == path else f"{text} (`{path}`)"
        relative = posixpath.relpath(found, posixpath.dirname(here) or ".")
        return f"[{text}]({relative}{anchor or ''})"

    return _LINK.sub(link, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Drop the roles of docstrings."""
    return _ROLE.sub("", html)
