import importlib
import json
import sys

import pytest


@pytest.fixture
def charts(benchmarks, monkeypatch, tmp_path):
    script = importlib.import_module("charts")
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    folds = [{"train": ["c", "d", "e"], "validation": ["f"], "test": ["a", "b"]}]
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "folds.json").write_text(json.dumps(folds))

    def add(kind, method, values, minutes, seed=0):
        patients = [
            {"patient": name, "structure": "tumour", "dsc": one} for name, one in zip("ab", values, strict=True)
        ]
        path = tmp_path / "heads" / kind / f"seed_{seed}" / "fold_0" / f"{method}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"title": method, "seconds": 60 * minutes, "patients": patients}))

    add("planned_10", "mmfnet", (0.5, 0.7), 9)
    add("planned_40", "mmfnet", (0.8, 0.9), 30)
    add("planned_40", "mmfnet", (0.6, 0.7), 50, seed=1)
    add("planned_40", "nnunet_scaled", (0.5, 0.5), 40)
    add("planned_40_from_2", "mmfnet", (0.1, 0.3), 39)
    add("small", "mmfnet", (0.1, 0.3), 39)
    return script


def test_lines_through_the_results(charts, monkeypatch, tmp_path):
    results = charts.read(tmp_path / "heads")
    found = charts.against_minutes(results, "tumour")
    assert {name: [point[:2] for point in points] for name, points in found.items()} == {
        "mmfnet": [(9, pytest.approx(0.6)), (40, pytest.approx(0.75))],
        "nnunet_scaled": [(40, 0.5)],
    }
    _, low, high = found["mmfnet"][0][1:]
    assert (low, high) == (pytest.approx(0.5), pytest.approx(0.7))
    fewer = charts.against_patients(results, "tumour", 4)
    assert {name: [point[:2] for point in points] for name, points in fewer.items()} == {
        "mmfnet, planned_40": [(2, pytest.approx(0.2)), (4, pytest.approx(0.75))]
    }
    values, (mean, _, _) = charts.of_patients(results, "tumour")["mmfnet, planned_40"]
    assert (values, mean) == (pytest.approx([0.7, 0.8]), pytest.approx(0.75))
    monkeypatch.setattr(sys, "argv", ["charts.py", "--data", "heads"])
    charts.main()
    assert all(
        (tmp_path / "heads" / f"{name}.png").stat().st_size > 1000 for name in ("methods", "minutes", "patients")
    )


def test_no_results(charts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["charts.py", "--data", "other"])
    with pytest.raises(SystemExit):
        charts.main()
    assert "Received: other" in capsys.readouterr().err
