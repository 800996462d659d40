"""Pages that are made when the site is built, because the README and the recipes' models have their text already."""

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import recipes_page

ROOT = Path(__file__).parent.parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs with the files of `docs/`; adds those that are made."""
    files.append(File.generated(config, "getting_started.md", content=getting_started()))
    files.append(File.generated(config, "recipes.md", content=recipes_page.page()))
    files.append(File.generated(config, "security.md", content=(ROOT / "SECURITY.md").read_text()))
    return files


def getting_started() -> str:
    """The README as a page of the site: links point to the site's pages, and the file list, which is for the source
    tree, is left out."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"^# .*$", "# Getting started", text, count=1, flags=re.MULTILINE)
    text = re.sub(r"^## Files\n.*", "", text, flags=re.MULTILINE | re.DOTALL)
    return text.replace("](docs/", "](").replace("](SECURITY.md)", "](security.md)")
