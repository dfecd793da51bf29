"""A hook of MkDocs: pages that lie outside of docs/, and links between files of the repository as links between pages."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Page of the site -> file of the repository.
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    **{f"plugins/{name}.md": f"plugins/{name}/README.md" for name in ("onnxruntime", "quantizer", "tensorrt", "cuda", "mpi")},
}
PAGES = {source: page for page, source in OUTSIDE.items()}
REFERENCE = "# API reference\n\n::: rq_compile.api\n"
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "reference.md", content=REFERENCE))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links name files of the repository. A link to any other file, for example a source file, becomes plain text."""
    here = page.file.src_uri
    folder = posixpath.dirname(OUTSIDE.get(here, f"docs/{here}"))

    def on_site(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if "://" in target:
            return link[0]
        source = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / source).exists():
            return link[0]  # MkDocs says so, and fails
        if (ROOT / source / "README.md").is_file():
            source = f"{source}/README.md"
        found = PAGES.get(source, source.removeprefix("docs/"))
        if files.get_file_from_path(found) is None:
            return text
        return f"[{text}]({posixpath.relpath(found, posixpath.dirname(here) or '.')}{anchor})"

    return LINK.sub(on_site, markdown)
