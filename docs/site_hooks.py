"""
What `make docs` does to the pages beside mkdocs-material's own: formulas become MathML, links to the sources keep
their text, and docstrings in TRL's dialect become ones that mkdocstrings reads.
"""

import html
import posixpath
import re
from typing import Any

import griffe
from latex2mathml.converter import convert


_MATH = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
_ROW = re.compile(r"^\|.*$", re.MULTILINE)
_SECTION = re.compile(r"^(\s*)(Args|Parameters|Attributes):\s*$")
_ENTRY = re.compile(r"^([\w*]+(?:, [\w*]+)*) \((.*)\):(.*)$")


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: Any) -> str:
    """Links that leave the documentation lead to the repository, where the site knows one, and are text otherwise; a
    number of a table stays on a line with its error."""
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(found: re.Match) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, found[3]))
        if target.startswith("docs/") and posixpath.splitext(target)[1] in (".md", ".png", ".gz", ".ipynb"):
            return found[0]
        repository = config["repo_url"]
        return f"[{found[2]}]({repository.rstrip('/')}/blob/main/{target})" if repository else found[2]

    return _ROW.sub(lambda row: row[0].replace(" \u00b1 ", "\u00a0\u00b1\u00a0"), _LINK.sub(replaced, markdown))


def on_page_content(html_text: str, **kwargs: Any) -> str:
    """Formulas as MathML, which browsers draw without a script or a network."""

    def replaced(found: re.Match) -> str:
        display = "block" if found["tag"] == "div" else "inline"
        tex = html.unescape(found["tex"]).replace("\\lVert", "\\|").replace("\\rVert", "\\|")
        tex = tex.replace("\\lvert", "|").replace("\\rvert", "|").replace("\\Vert", "\\|")
        return convert(tex, display=display)

    return _MATH.sub(replaced, html_text)


class TrlDocstrings(griffe.Extension):
    """Docstrings in TRL's dialect as Google's: types without marks, one name an entry, no headings between entries."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of an object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = google(obj.docstring.value)


def google(text: str) -> str:
    """A docstring in TRL's dialect as one in Google's."""
    text = re.sub(r"\[`~?([^`\]]+)`\](?!\()", r"`\1`", text)
    lines, depth = [], -1
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        section = _SECTION.match(line)
        if section:
            depth = len(section[1])
            line = f"{section[1]}{'Attributes' if section[2] == 'Attributes' else 'Args'}:"
        elif line.strip() and indent <= depth:
            depth = -1
        entry = _ENTRY.match(line.strip()) if depth >= 0 and indent == depth + 4 else None
        if entry:
            kind = re.sub(r", \*optional\*.*|^\*optional\*.*", "", entry[2]).replace("`", "").replace(" or ", " | ")
            kind = kind.replace("~", "")
            lines += [f"{' ' * indent}{name} ({kind or 'Any'}):{entry[3]}" for name in entry[1].split(", ")[:-1]]
            if lines and len(entry[1].split(", ")) > 1:
                shared = f"{' ' * (indent + 4)}As `{entry[1].split(', ')[-1]}`."
                lines[-1:] = [item for line_ in lines[-1:] for item in (line_, shared)]
            line = f"{' ' * indent}{entry[1].split(', ')[-1]} ({kind or 'Any'}):{entry[3]}"
        elif depth >= 0 and line.strip().startswith("> "):
            continue
        elif depth >= 0 and not line.strip() and (not lines[-1].strip() or _SECTION.match(lines[-1])):
            continue  # the empty line below a heading: under the section's own name it would end the section
        lines.append(line)
    return "\n".join(lines)
