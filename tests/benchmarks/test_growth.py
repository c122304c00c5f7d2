from keras_mmfnet.run import Run


def test_each_stage_finds_the_patients(benchmarks, tmp_path):
    import growth

    growth.make_patients(tmp_path / "patients", 10, (24, 64, 64))
    found = {stage: growth.measure(stage, tmp_path) for stage in growth.STAGES if "core" not in stage}
    assert all(numbers["seconds"] > 0 and numbers["mb"] > 50 for numbers in found.values())
    assert found["patches"]["patches_per_second"] > 1
    assert found["report"]["page_mb"] > 0.1
    rows = Run(tmp_path / "run").rows("mmfnet")
    assert len(rows) == 10
    assert all(row["dsc"] > 0.9 for row in rows)
