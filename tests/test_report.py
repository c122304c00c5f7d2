import base64
import csv
import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from keras_mmfnet._files import csv_text
from keras_mmfnet.data import preprocess_case
from keras_mmfnet.data.labels import split_labels
from keras_mmfnet.evaluation import (
    METRICS,
    evaluate_case,
    mean_over_structures,
    metrics_json,
    rows_by_structure,
    summarise,
)
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.report import write_comparison, write_report, write_tables
from keras_mmfnet.report._comparison import compare_results, transfer_curves
from keras_mmfnet.run import Run

RECIPE = Recipe.small().replace({"data.spacing": 3.0, "training.folds": 3, "training.steps_per_epoch": 5})
NASTY = "<script>alert('&')<"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


class Page(html.parser.HTMLParser):
    """What a browser would see: tags that close as they were opened, attributes and texts."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.texts, self.headings = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script") and data.strip():
            self.texts.append(data.strip())
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)

    def pictures(self, kind):
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        start = f"data:image/{kind};base64,"
        return [base64.b64decode(s.removeprefix(start), validate=True) for s in sources if s.startswith(start)]

    def after(self, text, count=1):
        start = self.texts.index(text) + 1
        return self.texts[start : start + count]


@pytest.fixture(scope="module")
def run(tiny_cohort, tmp_path_factory):
    """A run of two folds of three, as `cross_validate` leaves it, whose masks are shifted; one patient has no AP."""
    parent = tmp_path_factory.mktemp("runs")
    data = shutil.copytree(tiny_cohort, parent / "data")
    (data / "patient_00").rename(data / NASTY)
    run = Run.start(parent / "<run>", data, RECIPE)
    run.cohort["patients"][NASTY].append("a <note>")
    run.cohort["skipped"]["someone"] = "has no <mask>"
    run.cohort_file.write_text(json.dumps(run.cohort))
    run.log_file.write_text("10:00 Command: mmfnet train <data> --out run\n10:01 Computing in float32\n")
    write_results(run)
    return run


@pytest.fixture(scope="module")
def regions(tiny_cohort, tmp_path_factory):
    """Such a run of three regions that overlap; half of the patients have no enhancing tumour."""
    parent = tmp_path_factory.mktemp("regions")
    data = shutil.copytree(tiny_cohort, parent / "data")
    for number, folder in enumerate(sorted(data.iterdir())):
        image = sitk.ReadImage(str(folder / "mask.nii.gz"))
        whole = sitk.GetArrayFromImage(image)
        core, inner = (ndimage.binary_erosion(whole, iterations=n) for n in (1, 2))
        labels = sitk.GetImageFromArray(
            np.select([inner * (number in (1, 2, 5)) > 0, core, whole > 0], [4, 1, 2]).astype(np.uint8)
        )
        labels.CopyInformation(image)
        sitk.WriteImage(labels, str(folder / "mask.nii.gz"))
    structures = {"whole": (1, 2, 4), "core": (1, 4), "enhancing": (4,)}
    run = Run.start(parent / "run", data, RECIPE.replace({"data.structures": structures}))
    write_results(run)
    return run


def write_results(run):
    rates = {"learning_rate": 1e-3, "seconds": 2000.0}
    for fold in (0, 1):
        rows, history = [], []
        for number, patient in enumerate(run.patients(run.folds[fold].test)):
            image = sitk.ReadImage(run.cases[patient.name].mask)
            truth = sitk.GetArrayFromImage(image)
            predicted = np.roll(truth, 1 + 2 * fold + number, axis=2)
            predicted[0, 1, 1] = 1
            path = run.masks(fold, "mmfnet", patient.name)[None]
            path.parent.mkdir(parents=True, exist_ok=True)
            written = sitk.GetImageFromArray(predicted)
            written.CopyInformation(image)
            sitk.WriteImage(written, str(path))
            found, wanted = (split_labels(labels, run.recipe.data.structures) for labels in (predicted, truth))
            for name in found:
                numbers = evaluate_case(found[name].astype(np.float32), wanted[name], image.GetSpacing()[::-1])
                rows.append({"patient": patient.name, "structure": name, **numbers, "seconds": 1.0})
        rows[0]["ap"] = float("nan")
        for epoch in range(3):
            losses = {"loss": 0.5, "val_loss": 0.6, "dice_score": 0.4, "val_dice_score": 0.3}
            history.append({"epoch": epoch, "stage": "all", **losses, **rates})
        for network in ("unet3d_t1", "mmfnet"):
            run.history(fold, network).write_text(csv_text(history))
        shares = {f"fusion{level}": {"t1": [0.5, 0.7], "t2": [0.3, 0.2], "cet1": [0.2, 0.1]} for level in (1, 2)}
        result = {"method": "mmfnet", "title": "MMFNet", "paper": {}, "fold": fold, "parameters": 10, "updates": 15}
        result |= {"training_seconds": 6000.0, "machine": {"processor": "a <processor>"}, "history": history}
        run.result(fold, "mmfnet").write_text(json.dumps({**result, "patients": rows, "shares": shares}))


@pytest.fixture(scope="module")
def page(run):
    path = write_report(run)
    assert path == run.folder / "report.html"
    return Page(path)


def all_rows(run):
    return sorted((row for result in run.results()["mmfnet"] for row in result["patients"]), key=lambda row: row["dsc"])


def test_the_report_of_a_run_is_one_page(run, page):
    assert page.headings == [
        "Run",
        "Results",
        "Patients, worst first",
        "Share of each modality in the fusion blocks",
        "Training",
        "Patients",
        "Recipe",
        "Software",
    ]
    # Nothing is fetched from anywhere.
    assert "http" not in page.source
    assert not [tag for tag, attributes in page.tags if tag == "link" or (tag == "script" and attributes)]
    # Boxes, attention, MMFNet in two folds, the single-modality networks in one figure.
    assert len(page.pictures("png")) == 5
    assert all(
        picture.startswith(b"\x89PNG") and picture.endswith(b"IEND\xaeB`\x82") for picture in page.pictures("png")
    )
    assert {"has no <mask>", "a <note>", "a <processor>"} < set(page.texts)
    # No half of a file is left.
    assert not [path for path in run.folder.glob(".*") if path.is_file()]


def test_whatever_the_user_named_is_only_text(run, page):
    scripts = [tag for tag, _ in page.tags if tag == "script"]
    assert len(scripts) == 1
    assert NASTY in page.texts
    assert "MMFNet: <run>" in page.texts
    assert "Command: mmfnet train <data> --out run" in page.texts


def test_the_headline(run, page):
    dsc = summarise(all_rows(run))["dsc"]
    assert page.after("Mean DSC", 2) == [f"{dsc['mean']:.3f}", f"95% interval {dsc['low']:.3f} to {dsc['high']:.3f}"]
    assert page.after("Patients tested", 2) == ["4", "of 6, by networks that had not seen them"]
    assert page.after("Folds") == ["2 of 3"]
    assert "Training the networks of 2 folds took 6 h 40 min, 4 segmentations took 4 s." in page.texts


# All patients have a tumour.
SHOWN = {key: metric for key, metric in METRICS.items() if key != "detection_specificity"}


def test_the_table_has_the_worst_patient_first_and_ends_with_the_mean(run, page):
    rows = all_rows(run)
    titles = [metric.title for metric in SHOWN.values()]
    start = page.texts.index("Fold")
    table = page.texts[start + 1 :]
    assert table[: len(titles)] == titles
    width = len(titles) + 2
    for number, row in enumerate(rows):
        line = table[len(titles) + number * width :][:width]
        assert line[0] == row["patient"]
        assert line[2:] == [metric.text(row[key]) for key, metric in SHOWN.items()]
    assert sum("-" in table[len(titles) + n * width :][:width] for n in range(4)) == 2
    assert page.after("mean") == [f"{np.mean([row['dsc'] for row in rows]):.4f}"]
    # Numbers are on the right.
    kinds = [attributes.get("class") for tag, attributes in page.tags if tag in ("th", "td")]
    assert kinds[: 2 * width] == [None, *["number"] * (width - 1)] * 2


def test_every_metric_is_explained(page):
    for metric in SHOWN.values():
        assert any(text.startswith(metric.about) for text in page.texts)


def test_every_test_patient_has_its_slices(run, page):
    rows = all_rows(run)
    patients = [attributes for tag, attributes in page.tags if tag == "article"]
    names = [text for text in page.texts if text.endswith((", fold 0", ", fold 1"))]
    assert [name.rpartition(",")[0] for name in names] == [row["patient"] for row in rows]
    sliders = [a for tag, a in page.tags if tag == "input" and a["type"] == "range"]
    assert [a["aria-label"] for a in sliders] == [f"Slice of {row['patient']}" for row in rows]
    assert len(page.pictures("jpeg")) == len(patients) == 4
    for attributes, slider in zip(patients, sliders, strict=True):
        slices = json.loads(attributes["data-slices"])
        assert slices == list(range(slices[0], slices[-1] + 1))
        assert int(slider["max"]) == len(slices) - 1
        assert 0 < int(slider["value"]) < len(slices)
    assert page.texts.count("predicted contour") == 1
    for row in rows:
        assert (
            f"{row['hd95']:.2f} mm, {'no false island' if not row['false_islands'] else '1 false island'}" in page.texts
        )
        assert f"{row['volume_ml']:.2f} ml" in page.texts
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


def test_what_the_cohort_is_like(run, page):
    patients = [preprocess_case(case, RECIPE.data) for case in run.cases.values()]
    volumes = [patient.mask.sum() * 3 * 3 * 4 / 1000 for patient in patients]
    expected = [f"{number:.2f}" for number in (np.median(volumes), min(volumes), max(volumes))]
    assert page.after("tumour, ml", 3) == expected
    assert page.after("slices", 3) == ["20.00", "20", "20"]
    assert "6 patients. The sizes are those of the reference modality's images as they came." in page.texts


def test_the_shares_of_the_modalities_and_what_differs_from_the_paper(page):
    assert "MMFNet: t1 60%, t2 25%, cet1 15%, over all fusion blocks and test patients." in page.texts
    assert page.after("data.spacing", 2) == ["3.0", "0.5"]
    assert page.after("network.reduction") == ["12"]
    differing = int(re.search(r"(\d+) of (\d+) values differ", page.source).group(1))
    assert differing == sum(
        value != other
        for part, other_part in zip(RECIPE.model_dump().values(), Recipe().model_dump().values(), strict=True)
        for value, other in zip(part.values(), other_part.values(), strict=True)
    )


def test_one_patient_in_all(run, tmp_path):
    old = Run(shutil.copytree(run.folder, tmp_path / "old"))
    old.result(1, "mmfnet").unlink()
    result = json.loads(old.result(0, "mmfnet").read_text(encoding="utf-8"))
    old.result(0, "mmfnet").write_text(json.dumps({**result, "patients": result["patients"][:1]}))
    page, (row,) = Page(write_report(old)), result["patients"][:1]
    assert page.after("Mean DSC", 2) == [f"{row['dsc']:.3f}", "of one patient"]
    assert not [text for text in page.texts if "95% " in text]
    assert len(page.pictures("jpeg")) == 1


def test_several_structures(regions):
    page = Page(write_report(regions))
    every = [row for result in regions.results()["mmfnet"] for row in result["patients"]]
    means, structures = mean_over_structures(every), rows_by_structure(every)
    assert list(structures) == ["whole", "core", "enhancing"]
    # The headline is the mean over the structures, and says so.
    dsc = summarise(means)["dsc"]
    value, about = page.after("Mean DSC", 2)
    assert value == f"{dsc['mean']:.3f}"
    assert about.startswith("mean over the structures whole, core, enhancing; 95% interval ")
    # A line for each structure, and a table of the patients for each, with the same patients.
    assert [page.texts.index(f"Patients: {name}") for name in ("mean over the structures", *structures)]
    titles = page.after("Structure", 4)
    assert titles == ["DSC", "95% from", "to", "HD95 mm"]
    for name, rows in {**structures, "mean over the structures": means}.items():
        own = summarise(rows)
        assert page.after(name, 4) == [f"{own['dsc'][key]:.4f}" for key in ("mean", "low", "high")] + [
            f"{own['hd95']['mean']:.2f}"
        ]
    # Each patient's slices have the numbers of each structure beside them, and the legend has their colours.
    assert page.source.count("<p><span><b>core</b></span>") == len(page.pictures("jpeg")) == 4
    legend = [text for text in page.texts[page.texts.index("Patients, worst first") :]][3:8]
    assert legend == ["whole", "core", "enhancing", "expert's contour", "predicted contour"]
    assert "missed tumour" not in page.texts
    assert "4 segmentations took 4 s." in page.source
    # In how many patients with enhancing tumour it was found; all have the others.
    without = sum(not row["volume_ml"] for row in structures["enhancing"])
    assert 0 < without < 4
    assert page.after("Share with nothing found", 4)[1:4] == ["MMFNet", "enhancing", str(4 - without)]
    volumes = [patient.structures_ml["core"] for patient in regions.patients(regions.cohort["patients"])]
    assert page.after("core, ml", 3) == [f"{number:.2f}" for number in (np.median(volumes), min(volumes), max(volumes))]
    assert "tumour, ml" not in page.texts
    numbers = json.loads(metrics_json(every))
    assert {name: one["dsc"]["patients"] for name, one in numbers["summary"].items()} == {
        "whole": 4,
        "core": 4,
        "enhancing": 4 - without,
    }
    assert numbers["mean_over_structures"]["dsc"]["mean"] == dsc["mean"]


def test_methods_and_structures(regions, tmp_path):
    compared = Run(shutil.copytree(regions.folder, tmp_path / "compared"))
    for fold in (0, 1):
        result = json.loads(compared.result(fold, "mmfnet").read_text(encoding="utf-8"))
        for row in result["patients"]:
            row["dsc"] = row["dsc"] / 2
        compared.result(fold, "half").write_text(json.dumps({**result, "method": "half", "title": "Half"}))
    page = Page(write_comparison(compared, baseline="half"))
    rows = {row["method"]: row for row in compare_results(compared.results(), "half")}
    assert rows["half"]["dsc_core"] == pytest.approx(rows["mmfnet"]["dsc_core"] / 2)
    # The paired test is of the means over the structures.
    assert rows["mmfnet"]["difference_mean"] == pytest.approx(rows["mmfnet"]["dsc"] / 2)
    assert rows["mmfnet"]["difference_patients"] == 4
    means, each = (compared.folder / "table.md").read_text(encoding="utf-8").split("\n\nDSC of each structure:\n\n")
    assert means.startswith("Means over the structures whole, core, enhancing:\n\n| Method | DSC paper |")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in each.splitlines()]
    assert lines[0] == ["Method", "whole", "core", "enhancing", "Mean"]
    assert [line[0] for line in lines[2:]] == ["**Half**", "MMFNet"]
    assert lines[3][2] == f"{rows['mmfnet']['dsc_core']:.4f} ± {rows['mmfnet']['dsc_core_std']:.4f}"
    assert page.after("DSC of each structure", 5) == lines[0]
    assert page.after("Highest mean DSC", 2)[1] == "MMFNet; mean over the structures"
    with open(compared.folder / "table.csv", newline="") as file:
        assert {"dsc", "dsc_whole", "dsc_enhancing_std"} < set(next(csv.DictReader(file)))


def test_a_run_without_results_is_refused(run, tmp_path):
    for name in ("recipe.json", "cohort.json"):
        shutil.copy(run.folder / name, tmp_path)
    with pytest.raises(ValueError, match=r"must hold a finished fold of MMFNet\. Received: "):
        write_report(Run(tmp_path))
    with pytest.raises(ValueError, match=r"the results of a method is expected\. Received: "):
        write_comparison(Run(tmp_path))


def test_importing_it_loads_nothing_that_draws():
    code = "import sys, keras_mmfnet.report as r; print('write_report' in dir(r), 'keras_mmfnet.plots' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True False\n", done.stderr


# --- the comparison of methods


def result(name, fold, dsc, val_loss=(0.9, 0.5), title=None, paper=None):
    numbers = {"ap": 0.5, "dice_loss": 0.4, "hd95": 3.0, "assd": 1.0, "detection_specificity": None, "seconds": 0.25}
    rows = [{"patient": f"p{fold}{i}", "structure": "tumour", "dsc": value, **numbers} for i, value in enumerate(dsc)]
    return {
        "method": name,
        "title": title or name,
        "paper": paper or {},
        "fold": fold,
        "parameters": 1000,
        "updates": 20,
        "training_seconds": 10.0 + fold,
        "machine": {},
        "history": [{"epoch": i, "loss": 1.0, "val_loss": loss, "seconds": 1.0} for i, loss in enumerate(val_loss)],
        "patients": rows,
        "shares": {},
    }


@pytest.fixture
def results():
    return {
        "multi_encoder": [
            result("multi_encoder", 0, [0.5, 0.6], title="Multi", paper={"dsc": 0.7, "ap": 0.74, "dice_loss": 0.31}),
            result("multi_encoder", 1, [0.7], title="Multi", paper={"dsc": 0.7, "ap": 0.74, "dice_loss": 0.31}),
        ],
        "mmfnet_mlp_std": [result("mmfnet_mlp_std", 0, [0.6, 0.8])],
        "mmfnet_mlp_std_transfer": [result("mmfnet_mlp_std_transfer", 0, [0.7, 0.8], val_loss=(0.6, 0.4))],
        "zz_mine": [result("zz_mine", 1, [0.2])],
    }


def test_the_rows_of_a_comparison(results):
    rows = {row["method"]: row for row in compare_results(results, "multi_encoder")}
    assert list(rows) == list(results)
    multi, full, mine = (rows[name] for name in ("multi_encoder", "mmfnet_mlp_std", "zz_mine"))
    assert multi["dsc"] == pytest.approx(0.6)
    assert multi["dsc_std"] == pytest.approx(np.std([0.5, 0.6, 0.7]))
    assert (multi["folds"], multi["patients"], multi["paper_ap"], multi["difference_mean"]) == (2, 3, 0.74, None)
    assert multi["training_seconds"] == pytest.approx(10.5)
    # Paired on the patients that both have: those of fold 0, and of fold 1.
    assert full["difference_mean"] == pytest.approx(0.15)
    assert full["difference_patients"] == 2
    assert mine["difference_mean"] == pytest.approx(-0.5)
    assert mine["difference_patients"] == 1
    assert (mine["difference_low"], mine["difference_high"]) == (None, None)


def test_the_tables_of_a_comparison(results, tmp_path):
    write_tables(results, tmp_path)
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[2].startswith("| **Multi** | 0.7000 | 0.6000 ± 0.0816 [0.5000, 0.7000] | 0.7400 | 0.5000 ± 0.0000 [")
    assert "+0.1500 [+0.1000, +0.2000]" in lines[3]
    assert "| -0.5000 |" in lines[5]
    assert len({line.count("|") for line in lines}) == 1
    with open(tmp_path / "table.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert (rows["multi_encoder"]["difference_mean"], rows["multi_encoder"]["paper_ap"]) == ("", "0.74")
    write_tables(results, tmp_path, baseline="zz_mine")
    assert "| **zz_mine** |" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("methods", "self_transfer"))


def test_the_curves_of_self_transfer(results):
    charts = transfer_curves(results)
    assert list(charts) == ["mmfnet_mlp_std"]
    curves = charts["mmfnet_mlp_std"]
    np.testing.assert_allclose(curves["from random weights"][0], [10, 20])
    np.testing.assert_allclose(curves["from random weights"][1], [0.9, 0.5])
    np.testing.assert_allclose(curves["with self-transfer"][1], [0.6, 0.4])
    # A training ended early.
    [first, *_] = results["mmfnet_mlp_std_transfer"]
    first["history"] = first["history"][:1]
    updates, losses = transfer_curves(results)["mmfnet_mlp_std"]["with self-transfer"]
    assert len(updates) == len(losses) == 1


def test_the_report_of_a_comparison(run, results, tmp_path):
    compared = Run(shutil.copytree(run.folder, tmp_path / "compared"))
    for folds in results.values():
        for one in folds:
            compared.result(one["fold"], one["method"]).write_text(json.dumps(one))
    page = Page(write_comparison(compared, baseline="multi_encoder"))
    assert {path.name for path in compared.folder.iterdir()} >= {"table.md", "table.csv", "methods.png", "report.html"}
    expected = [
        "Run",
        "Results",
        "Charts",
        "Share of each modality in the fusion blocks",
        "Patients",
        "Recipe",
        "Software",
    ]
    assert page.headings == expected
    best = max(compare_results(compared.results(), "multi_encoder"), key=lambda row: row["dsc"])
    assert page.after("Highest mean DSC", 2) == [f"{best['dsc']:.3f}", best["title"]]
    assert page.after("Methods", 2) == ["5", "compared with Multi-encoder multi-modality network"]
    assert "+0.1500 [+0.1000, +0.2000]" in page.texts
    # Methods, self-transfer, boxes, and the attention of the one method that has fusion blocks.
    assert len(page.pictures("png")) == 4
    assert "http" not in page.source


@pytest.mark.parametrize("name", ["tumour_core_cubes", "transfer_rate"])
def test_the_committed_results_make_the_same_tables(name, tmp_path):
    run = Run(RESULTS / name)
    assert run.recipe.data.structure_names == ("tumour",)
    results = run.results()
    write_tables(results, tmp_path)
    written, before = (
        (folder / "table.md").read_text(encoding="utf-8").splitlines() for folder in (tmp_path, RESULTS / name)
    )
    assert len(written) == len(before) > 3
    for line, expected in zip(written, before, strict=True):
        cells, wanted = line.split("|"), expected.split("|")
        assert [cells[:10], cells[11:]] == [wanted[:10], wanted[11:]]
        # The interval is by another bootstrap.
        numbers, others = (np.array(re.findall(r"[+-]\d\.\d+", row[10]), float) for row in (cells, wanted))
        np.testing.assert_allclose(numbers, others, atol=0.004)
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")
