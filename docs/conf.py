"""How Sphinx builds the pages: `python -m sphinx -W docs docs/_build`."""

import inspect
import re

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

from keras_mmfnet import __version__

project = "keras-mmfnet"
author = "the keras-mmfnet authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "keras-mmfnet"
html_show_copyright = False
html_math_renderer = "mathml"

# The docstrings mark code by single backticks, as Markdown does.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
# Keras' own are written for Keras' own tools.
autodoc_inherit_docstrings = False
autodoc_typehints = "none"
napoleon_custom_sections = [("Call arguments", "params_style")]


def as_restructured_text(app, what, name, obj, options, lines):
    """What is Markdown in a docstring, blocks of code and tables, as reStructuredText."""
    text = "\n".join(lines)
    text = re.sub(r"```(\w+)\n(.*?)```", _code, text, flags=re.DOTALL)
    text = re.sub(r"^\|.*\n\|[-:].*\n?(?:^\|.*\n?)*", _table, text, flags=re.MULTILINE)
    # Napoleon would take what is before the first colon for a type.
    text = re.sub(r"^Returns:\n( +)", r"Returns:\n\1: ", text, flags=re.MULTILINE)
    # Nothing may follow the end of code at once.
    text = re.sub(r"(`[^`]+`)(\w?)", lambda match: rf"{match[1]}\ {match[2]}" if match[2] else match[1], text)
    lines[:] = text.split("\n")


def _code(match):
    body = "\n".join(f"    {line}".rstrip() for line in match[2].splitlines())
    return f"\n.. code-block:: {match[1]}\n\n{body}\n"


def _table(match):
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in match[0].split("\n") if line]
    cells = [f"   {'*' if first else ' '} - {cell}" for row in [head, *rows] for first, cell in _marked(row)]
    return "\n".join(["", ".. list-table::", "   :header-rows: 1", "", *cells, ""]) + "\n"


def _marked(row):
    return [(number == 0, cell) for number, cell in enumerate(row)]


def constructor(app, what, name, obj, options, signature, annotation):
    """The arguments of a class of Keras, whose `__new__` hides them."""
    if signature != "(*args, **kwargs)":
        return None
    _, *arguments = inspect.signature(obj.__init__).parameters.values()
    return str(inspect.Signature(arguments)), annotation


def inline_formula(writer, node):
    """As below, within a line."""
    writer.body.append(tex2mathml(node.astext()))
    raise SkipNode


def formula(writer, node):
    """Written by the browser itself, so that the pages need no script from elsewhere."""
    text, tag = re.match(r"(.*?)(?:\\tag\{(\d+)\})?$", node.astext().strip(), flags=re.DOTALL).groups()
    number = f'<span class="eqno">({tag})</span>' if tag else ""
    writer.body.append(f'<div class="math" style="margin: 1em 0">{number}{tex2mathml(text, as_block=True)}</div>')
    raise SkipNode


def setup(app):
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
    # Before Napoleon.
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
    app.connect("autodoc-process-signature", constructor)
