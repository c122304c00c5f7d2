import base64
import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.figure import Figure

from keras_mmfnet.data import Case, five_folds, preprocess_case
from keras_mmfnet.evaluation import metrics_csv, metrics_json
from keras_mmfnet.models import MMFNet
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.report import figure_html, report_html, table_html, text_html, write_run_report

RECIPE = Recipe.small().replace({"data.spacing": 3.0, "training.folds": 3, "training.steps_per_epoch": 5})


class Page(html.parser.HTMLParser):
    """What a browser would see: tags that close as they were opened, attributes and texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.texts, self.headings = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *attribute) for attribute in attributes]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)

    @property
    def pictures(self):
        sources = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [base64.b64decode(source.split(",")[1], validate=True) for source in sources]


def test_whatever_the_user_named_is_only_text():
    nasty = "<script>alert('&')</script>\""
    figure = Figure(figsize=(1, 1))
    content = text_html(nasty) + text_html(nasty, nasty) + table_html([nasty], [[nasty]]) + figure_html(figure, nasty)
    page = Page(report_html(nasty, [(nasty, content)]))
    # The title twice, the heading, three texts, two cells and the caption.
    assert page.texts.count(nasty) == 9
    assert page.headings == [nasty]
    assert ("img", "alt", nasty) in page.attributes
    assert page.pictures[0].startswith(b"\x89PNG")


def test_numbers_are_on_the_right_with_the_same_decimals():
    page = table_html(["name", "score", "mm", "count"], [["a", 0.5, 12.0, 3], ["b", None, 3.14159, 20]])
    cells = re.findall(r"<t[dh]( class=\"number\")?>(.*?)</t[dh]>", page)
    right = [(' class="number"', text) for text in ("score", "mm", "count", "0.5000", "12.00", "3", "-", "3.14", "20")]
    assert [cell for cell in cells if cell[0]] == right
    assert [text for kind, text in cells if not kind] == ["name", "a", "b"]
    assert "<th>name</th>" in table_html(["name"], [])


@pytest.fixture(scope="module")
def finished(tiny_cohort, tmp_path_factory):
    """A folder as a run of two folds leaves it, and its cases; one patient has no AP."""
    folder = tmp_path_factory.mktemp("run") / "<run>"
    names = sorted(path.name for path in tiny_cohort.iterdir())
    files = {name: tiny_cohort / name for name in names}
    cases = [
        Case(f"<{name}>", {m: str(path / f"{m}.nii.gz") for m in RECIPE.data.modalities}, str(path / "mask.nii.gz"))
        for name, path in files.items()
    ]
    folds = five_folds([case.name for case in cases], 3, RECIPE.training.validation_fraction, 0)
    folder.mkdir()
    (folder / "recipe.json").write_text(RECIPE.to_json())
    cohort = {
        "patients": {case.name: ["a <note>"] if number == 2 else [] for number, case in enumerate(cases)},
        "skipped": {"someone": "has no <mask>"},
        "folds": [dataclasses.asdict(fold) for fold in folds],
    }
    (folder / "cohort.json").write_text(json.dumps(cohort))
    rows, dsc = [], iter((0.9, 0.2, 0.7, 0.5))
    for number in (0, 1):
        (folder / f"fold_{number}" / "masks").mkdir(parents=True)
        for name in folds[number].test:
            mask = sitk.ReadImage(str(files[name[1:-1]] / "mask.nii.gz"))
            sitk.WriteImage(mask, str(folder / f"fold_{number}" / "masks" / f"{name}.nii.gz"))
            numbers = {
                "dsc": next(dsc),
                "ap": 0.5 if rows else float("nan"),
                "dice_loss": 0.5,
                "hd95": 1.0,
                "assd": 1.0,
            }
            rows.append({"patient": name, "fold": number, **numbers, "seconds": 1.0})
        for network in ("t1", "mmfnet"):
            numbers = {"loss": 0.5, "val_loss": 0.6, "dice_score": 0.4, "val_dice_score": 0.3, "learning_rate": 1e-3}
            history = [{"epoch": epoch, "stage": "all", **numbers} for epoch in range(3)]
            (folder / f"fold_{number}" / f"{network}_history.csv").write_text(metrics_csv(history))
    network = MMFNet(RECIPE.data.modalities, RECIPE.patches.shape, (2, 3), reduction=2)
    network.save(folder / "fold_1" / "mmfnet.keras")
    (folder / "metrics.json").write_text(metrics_json(rows))
    return folder, cases, rows


def test_the_report_of_a_run(finished):
    folder, cases, rows = finished
    path = write_run_report(folder, cases)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.headings == [
        "Results",
        "Best, median and worst patient",
        "Which modality is listened to",
        "Training",
        "Patients",
        "Recipe",
        "Software",
    ]
    # Nothing is fetched from anywhere, and nothing runs.
    assert "http" not in text
    assert "<script" not in text
    # Boxes, three patients, attention of the one fold whose network is there, MMFNet in two folds, the others in one.
    assert len(page.pictures) == 8
    assert len(set(page.pictures)) >= 7
    assert all(picture.startswith(b"\x89PNG") and picture.endswith(b"IEND\xaeB`\x82") for picture in page.pictures)
    for rank, row in (("Best", rows[0]), ("Median", rows[3]), ("Worst", rows[1])):
        caption = f"{rank}: {row['patient']}, fold {row['fold']}, DSC {row['dsc']:.4f} in three dimensions."
        assert caption in page.texts
    assert {row["patient"] for row in rows} < set(page.texts)
    assert {"mean", "0.5750", "has no <mask>", "a <note>", "-"} < set(page.texts)
    assert {"spacing", "3.0", "0.5", "keras", "backend of Keras"} < set(page.texts)
    assert sum(text.startswith("Fold 1: each modality's share") for text in page.texts) == 1
    # No half of a file is left.
    assert not list(folder.glob(".*"))


def test_what_the_cohort_is_like(finished):
    folder, cases, _ = finished
    page = Page(write_run_report(folder, cases).read_text(encoding="utf-8"))
    patients = [preprocess_case(case, RECIPE.data) for case in cases]
    volumes = [patient.mask.sum() * 3 * 3 * 4 / 1000 for patient in patients]
    start = page.texts.index("tumour, ml")
    shown = [text for text in page.texts[start + 1 :] if text.strip()][:3]
    assert shown == [f"{number:.2f}" for number in (np.median(volumes), min(volumes), max(volumes))]
    assert page.texts[page.texts.index("slices") + 1] == "20.00"
    assert any(text.startswith("6 patients.") for text in page.texts)


def test_one_patient_is_shown_once(finished, tmp_path):
    folder, cases, rows = finished
    for name in ("recipe.json", "cohort.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / "metrics.json").write_text(metrics_json(rows[:1]))
    (tmp_path / "fold_0").symlink_to(folder / "fold_0")
    page = Page(write_run_report(tmp_path, cases).read_text(encoding="utf-8"))
    assert len(page.pictures) == 4
    assert f"Best, Median, Worst: {rows[0]['patient']}, fold 0, DSC 0.9000 in three dimensions." in page.texts
