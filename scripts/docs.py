"""Checks the documents and renders them: `make docs`, then open build-docs/index.html.

The checks are tests/python/api/test_documents.py: examples run, links lead somewhere, targets
exist, the table of types is that of the core.
"""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build-docs"

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ max-width: 52rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 sans-serif; }}
pre {{ background: #f4f4f4; padding: .7rem; overflow-x: auto; }}
code {{ font-size: 90%; }} table {{ border-collapse: collapse; }}
td, th {{ border: 1px solid #ccc; padding: .2rem .6rem; text-align: left; }}
</style>
<p><a href="README.html">README</a> · <a href="index.html">documents</a></p>
{body}
</html>
"""


def render(source: Path) -> str:
    from markdown_it import MarkdownIt

    text = source.read_text(encoding="utf-8")
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    # All pages lie in one folder here.
    body = re.sub(r'href="(?!https?:)(?:docs/|\.\./)?([\w./-]+)\.md(#[\w-]*)?"', _link, body)
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    title = html.escape(heading[1] if heading else source.stem)
    return PAGE.format(title=title, body=body)


def _link(match: re.Match[str]) -> str:
    return f'href="{match[1].split("/")[-1]}.html{match[2] or ""}"'


def main() -> int:
    tests = ROOT / "tests" / "python" / "api" / "test_documents.py"
    status = subprocess.run([sys.executable, "-m", "pytest", "-q", str(tests)], cwd=ROOT).returncode
    if status:
        return status
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    sources = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
    for source in sources:
        (OUT / f"{source.stem}.html").write_text(render(source), encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", OUT)
    print(f"{len(sources)} pages in {OUT.relative_to(ROOT)}/; start at index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
