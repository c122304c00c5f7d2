import importlib
import json

import pytest


def test_tables_are_made_of_what_a_comparison_wrote(tmp_path, benchmarks):
    numbers = {"dsc": 0.5, "ap": 0.5, "dice_loss": 0.4, "hd95": 3.0, "assd": 1.0, "seconds": 0.25}
    result = {
        "method": "mine",
        "title": "Mine",
        "paper": {},
        "fold": 0,
        "parameters": 1000,
        "updates": 20,
        "training_seconds": 10.0,
        "history": [{"epoch": 0, "val_loss": 0.5}],
        "patients": [{"patient": "anna", "structure": "tumour", **numbers}],
    }
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "fold_0" / "mine.json").write_text(json.dumps(result))
    (tmp_path / "out").mkdir()
    tables = importlib.import_module("tables")
    tables.main([str(tmp_path), "--out", str(tmp_path / "out"), "--baseline", "mine"])
    assert "| **Mine** |" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"table.md", "table.csv", "methods.png"}


def test_a_folder_without_results(tmp_path, benchmarks):
    tables = importlib.import_module("tables")
    with pytest.raises(SystemExit, match=f"Received: {tmp_path}"):
        tables.main([str(tmp_path)])
