import csv
import importlib
import json

import numpy as np
import pytest


def result(name, fold, dsc, val_loss=(0.9, 0.5), title=None, paper=None):
    numbers = {"ap": 0.5, "dice_loss": 0.4, "hd95": 3.0, "assd": 1.0, "seconds": 0.25}
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
        "patients": [{"patient": f"p{fold}{i}", "dsc": value, **numbers} for i, value in enumerate(dsc)],
    }


@pytest.fixture
def folder(tmp_path):
    results = [
        result("multi_encoder", 0, [0.5, 0.6], title="Multi", paper={"dsc": 0.7, "ap": 0.74, "dice_loss": 0.31}),
        result("multi_encoder", 1, [0.7]),
        result("mmfnet_mlp_std", 0, [0.6, 0.8]),
        result("mmfnet_mlp_std_transfer", 0, [0.7, 0.8], val_loss=(0.6, 0.4)),
        result("zz_mine", 1, [0.2]),
    ]
    for one in results:
        path = tmp_path / f"fold_{one['fold']}" / f"{one['method']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(one))
    return tmp_path


def test_table(folder, benchmarks):
    tables = importlib.import_module("tables")
    tables.write_tables(folder, folder)
    with open(folder / "table.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["multi_encoder", "mmfnet_mlp_std", "mmfnet_mlp_std_transfer", "zz_mine"]
    multi, full, mine = (rows[name] for name in ("multi_encoder", "mmfnet_mlp_std", "zz_mine"))
    assert float(multi["dsc"]) == pytest.approx(0.6)
    assert float(multi["dsc_std"]) == pytest.approx(np.std([0.5, 0.6, 0.7]))
    assert (multi["folds"], multi["patients"], multi["paper_ap"], multi["difference_mean"]) == ("2", "3", "0.74", "")
    assert float(multi["training_seconds"]) == pytest.approx(10.5)
    # Paired on the patients that both have: those of fold 0, and of fold 1.
    assert float(full["difference_mean"]) == pytest.approx(0.15)
    assert full["difference_patients"] == "2"
    assert float(mine["difference_mean"]) == pytest.approx(-0.5)
    lines = (folder / "table.md").read_text().splitlines()
    assert lines[2].startswith("| **Multi** | 0.7000 | 0.6000 ± 0.0816 | 0.7400 | 0.5000 ± 0.0000 |")
    assert "+0.1500 [+0.1000, +0.2000]" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


def test_curves(folder, benchmarks):
    tables = importlib.import_module("tables")
    charts = tables.curves(tables.read_results(folder))
    assert list(charts) == ["mmfnet_mlp_std"]
    curves = charts["mmfnet_mlp_std"]
    np.testing.assert_allclose(curves["from random weights"][0], [10, 20])
    np.testing.assert_allclose(curves["from random weights"][1], [0.9, 0.5])
    np.testing.assert_allclose(curves["with self-transfer"][1], [0.6, 0.4])
    tables.write_tables(folder, folder, baseline="zz_mine")
    assert (folder / "self_transfer.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_results(tmp_path, benchmarks):
    tables = importlib.import_module("tables")
    with pytest.raises(ValueError, match=f"Received: {tmp_path}"):
        tables.write_tables(tmp_path, tmp_path)
