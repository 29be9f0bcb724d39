"""How Sphinx builds the manual; ``python scripts/make_docs.py`` calls it."""

import re

from docutils import nodes
from latex2mathml.converter import convert

project = "ppl_vae"
author = "ppl_vae contributors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]  # the equations of the notebooks
nb_execution_mode = "off"  # pages show the outputs that the notebooks hold
html_theme = "furo"
html_title = "ppl_vae"
html_static_path = ["static"]
html_css_files = ["manual.css"]
html_copy_source = False
html_math_renderer = "mathml"  # which browsers draw without a script from the network
autodoc_typehints = "none"
autodoc_member_order = "bysource"
suppress_warnings = ["ref.python", "ref.term", "ref.ref"]  # names in docstrings that more than one module defines

SECTION = re.compile(r"\s*(Args|Returns|Raises|Yields|Attributes|Example|Examples)\b.*:")


def indentation(line):
    return len(line) - len(line.lstrip())


def escape(line):
    """Plain text as reStructuredText: what looks like markup, outside of ``code``, is taken as it is written."""
    markup = re.compile(r"[*|`]|(?<=\w)_(?!\w)|(?<=: [A-Z])\.$")  # the last would begin a numbered list
    parts = re.split(r"(``.*?``)", line)
    return "".join(part if part.startswith("``") else markup.sub(r"\\\g<0>", part) for part in parts)


def mark_up(app, what, name, obj, options, lines):
    """Docstrings are plain text in which an indented paragraph is an equation or code."""
    marked, last, literal = [], "", False
    for k, line in enumerate(lines):
        begins = k > 0 and not lines[k - 1].strip() and line.strip()
        if literal and line.strip() and indentation(line) <= indentation(last):
            literal = False
        if begins and not literal and indentation(line) > indentation(last) and not SECTION.fullmatch(last):
            literal = True
            marked += [" " * indentation(last) + "::", ""]
        if not literal:
            last = line if line.strip() else last
        keep = literal or line.lstrip().startswith((">>>", "..."))
        marked.append(line if keep else escape(line))
    lines[:] = marked


def write_mathml(translator, node):
    """An equation as MathML."""
    is_block = isinstance(node, nodes.math_block)
    equation = convert(node.astext(), display="block" if is_block else "inline")
    equation = re.sub(r"(?<!<msub>)<mi>log</mi>", r'\g<0><mspace width="0.17em"/>', equation)
    translator.body.append(f'<div class="equation">{equation}</div>' if is_block else equation)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (write_mathml, None), (write_mathml, None))
    app.connect("autodoc-process-docstring", mark_up, priority=1)  # before napoleon's
