"""The study as a site: `make site`. Sphinx's source folder is the repository's root, so that the
links of the README, docs and notebooks to one another hold on the site as they do on disk.
"""

import inspect
import json
import re
import shutil
from pathlib import Path

import pandas as pd
from docutils import nodes
from sphinx.application import Sphinx

import svdlib

ROOT = Path(__file__).parents[1]

project = "svdlib"
author = "the authors of svdlib"
html_title = "svdlib"
root_doc = "README"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "notebooks/*.ipynb",
]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

nb_execution_mode = "off"  # the notebooks are shown as they are committed
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 70
python_use_unqualified_type_names = True
add_module_names = False
default_role = "py:obj"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_show_search_summary = False  # would fetch pages, which browsers refuse on file://
colors = {"color-brand-primary": "#005a8e", "color-brand-content": "#005a8e"}
dark = {"color-brand-primary": "#7cc4f0", "color-brand-content": "#7cc4f0"}
html_theme_options = {"light_css_variables": colors, "dark_css_variables": dark}

# The README is the front page; on GitHub it is read alone, so its contents are listed here.
CONTENTS = """

```{toctree}
:hidden:
:caption: The study
:glob:
notebooks/*
docs/explorer
docs/gallery
docs/speed
```

```{toctree}
:hidden:
:caption: The library
docs/library
docs/reference
docs/reference_study
```

```{toctree}
:hidden:
:caption: Working with it
docs/sweeps
docs/architecture
CONTRIBUTING
CHANGELOG
```
"""


def front_page(app: Sphinx, name: str, source: list[str]) -> None:
    """The README, with the contents."""
    if name == root_doc:
        source[0] += CONTENTS


def named_pictures(app: Sphinx, document: nodes.document) -> None:
    """A notebook's figure is called what its section is called, where nothing else says it."""
    for picture in document.findall(nodes.image):
        section = picture
        while section is not None and not isinstance(section, nodes.section):
            section = section.parent
        if not picture.get("alt") and section is not None:
            picture["alt"] = f"Figure: {section[0].astext()}"


# In a docstring: a section that Napoleon reads, code; in prose: x_i, x_{i+1}, x^q, x^{2q}, x^(−q).
SECTION = re.compile(r"(Args|Returns|Raises|Yields):$")
CODE = re.compile(r"\w\.\w+\(")
SCRIPT = re.compile(
    r"(?<![^\W_]{2})(?<=[^\W\d_]|‖)(_)([^\W_])(?=[ᵀ²]|\W|$)"
    r"|([_^])\{([^{}]*)\}|(\^)\(([^()]*)\)|(\^)([½\w])(?!\w)"
)


def plain_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are read in an editor; here they become reStructuredText.

    Indented blocks outside Args, Returns and Raises are formulas, or code; what is special to
    reStructuredText and not in backticks is escaped; public names in backticks are linked, but for
    arguments of the same name.
    """
    arguments = inspect.signature(obj).parameters if inspect.isfunction(obj) else ()
    public = set(svdlib.__all__) - set(arguments)
    found: list[str] = []
    kind = ""  # of the paragraph or section that the line is in
    for number, line in enumerate(lines):
        indented = line.startswith("    ")
        if line.startswith(">>>"):
            kind = "example"
        elif line and not indented:
            kind = kind if kind == "example" and found[-1] else "text"
            kind = "section" if SECTION.match(line) else kind
        elif indented and kind == "text":
            rest = "\n".join(lines[number:]).split("\n\n")[0]
            kind = "code" if CODE.search(rest) else "formula"
            found += ["::" if kind == "code" else ".. container:: formula", ""]
        if kind == "example" or kind == "code":
            found.append(line)
        elif line == "Returns:":  # its first line may hold a colon, which Napoleon takes for a type
            found.append(":returns:")
        elif kind == "formula" and line:
            found.append(f"    | {escaped(line[4:], public)}")
        else:
            found.append(escaped(line, public))
    lines[:] = found


def escaped(line: str, public: set[str]) -> str:
    """Without what reStructuredText would take for markup; public names in backticks linked."""
    parts = re.split(r"(``.*?``|`[^`]*`)", line)
    parts[::2] = [re.sub(r"(\||\*|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
    for place in range(1, len(parts), 2):
        if parts[place].strip("`") in public:
            parts[place] = f":py:obj:`~svdlib.{parts[place].strip('`')}`"
    return "".join(parts)


def scripts(app: Sphinx, document: nodes.document, name: str) -> None:
    """In prose, x_i, x_{i+1}, x^q and x^{2q} as subscripts and superscripts."""
    for text in list(document.findall(nodes.Text)):
        above = text.parent
        if not SCRIPT.search(text) or isinstance(above, (nodes.literal, nodes.literal_block)):
            continue
        if above.tagname.startswith("desc_") or isinstance(above, (nodes.raw, nodes.doctest_block)):
            continue
        made, end = [], 0
        for match in SCRIPT.finditer(text):
            sign, inner = [group for group in match.groups() if group]
            kind = nodes.subscript if sign == "_" else nodes.superscript
            made += [nodes.Text(text[end : match.start()]), kind("", inner)]
            end = match.end()
        above.replace(text, [*made, nodes.Text(text[end:])])


def bundle(app: Sphinx, error: Exception | None) -> None:
    """Put the explorer's table where a script finds it without a server, and name the front page.

    The table is ``figures/06_joint.csv`` as columns, in a script of its own.
    """
    if error or app.builder.name != "html":
        return
    table = pd.read_csv(ROOT / "figures/06_joint.csv")
    columns = json.dumps({name: table[name].tolist() for name in table}, separators=(",", ":"))
    Path(app.outdir, "_static/joint.js").write_text(f"const JOINT = {columns};\n")
    shutil.copy(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", front_page)
    app.connect("doctree-read", named_pictures)
    app.connect("autodoc-process-docstring", plain_docstring, priority=100)  # before Napoleon
    app.connect("doctree-resolved", scripts)
    app.connect("build-finished", bundle)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
