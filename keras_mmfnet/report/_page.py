"""A page of a report: headings over blocks, each a dict that the template `page.html.j2` shows."""

import base64
import io
import shlex
from pathlib import Path

import jinja2

from keras_mmfnet._files import write
from keras_mmfnet.evaluation import METRICS
from keras_mmfnet.plots import ERROR_COLOURS, PREDICTION_COLOUR, TRUTH_COLOUR, structure_colours


def write_page(path, title, facts, sections, structures=()):
    """Writes a page; `facts` are `(label, value, remark)`, `sections` are `(heading, blocks)`. Returns its path."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    legend = {
        "expert's contour": ("line", TRUTH_COLOUR),
        "predicted contour": ("line", PREDICTION_COLOUR),
        "missed tumour": ("area", ERROR_COLOURS["false negative"]),
        "false tumour": ("area", ERROR_COLOURS["false positive"]),
    }
    if len(structures) > 1:
        colours = {name: ("line", colour) for name, colour in structure_colours(structures).items()}
        legend = {**colours, "expert's contour": ("dots", "#999"), "predicted contour": ("line", "#999")}
    sections = [section for section in sections if section[1]]
    template = environment.get_template("page.html.j2")
    about = {"title": title, "facts": facts, "legend": legend, "structures": structures}
    write(path, template.render(**about, sections=sections, folder=shlex.quote(str(path.parent))))
    return path


def texts(*lines):
    return {"kind": "texts", "lines": lines}


def table(header, rows, left=1, foot=()):
    """A table whose first columns are texts, on the left; floats get two decimals."""
    rows, foot = (
        [["-" if x is None else f"{x:.2f}" if isinstance(x, float) else str(x) for x in row] for row in some]
        for some in (rows, foot)
    )
    return {"kind": "table", "header": header, "rows": rows, "left": left, "foot": foot}


def heading(text):
    return {"kind": "heading", "text": text}


def figure(drawn, caption):
    png = io.BytesIO()
    drawn.savefig(png, format="png", dpi=110)
    return {"kind": "figure", "picture": uri(png, "png"), "caption": caption}


def uri(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def explained(keys):
    better = {"higher": " Higher is better.", "lower": " Lower is better.", "": ""}
    terms = [(METRICS[key].title, METRICS[key].about + better[METRICS[key].better]) for key in keys]
    return {"kind": "terms", "terms": terms}
