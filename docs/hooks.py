"""Called by mkdocs: pages and files that lie outside docs/ join the site, and links lead to them as in the repository."""

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff", "Dockerfile", "benchmarks/*.md",
    "examples/*.py", "recipes/*.yaml", "sft_recipes/**/*.py", "tools/**/*.py",
)  # fmt: skip
LINK = re.compile(r"(?<=\]\()(?!https://|#)[^)#\s]+")


def place(path: str) -> str:
    """Where a file of the repository is in the site: what is in docs/ at its top, the README as the first page."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in OUTSIDE:
        for path in ROOT.glob(pattern):
            inside = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, place(inside), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    assert page.file.abs_src_path is not None
    here = dirname(Path(page.file.abs_src_path).relative_to(ROOT).as_posix())

    def there(link: re.Match[str]) -> str:
        return relpath(place(normpath(join(here, link[0]))), dirname(page.file.src_uri) or ".")

    return LINK.sub(there, markdown)
