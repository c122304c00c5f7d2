import pytest

from keras_mmfnet import plan
from keras_mmfnet.recipe import Recipe

# Which takes a registration otherwise.
UNMOVED = "--set", "data.align=header", "--set", "patches.misalignment=0,0"


@pytest.fixture(autouse=True)
def fast_machine(monkeypatch):
    monkeypatch.setattr(plan, "measure_cost", lambda: plan.StepCost(1e-8))


def test_a_plan_is_printed_with_its_reasons_and_trains_as_it_is(mmfnet, tiny_cohort, tmp_path):
    file = tmp_path / "recipe.json"
    done = mmfnet("plan", tiny_cohort, "--out", file, *UNMOVED)
    recipe = Recipe.load(file)
    assert {"data.clip", "data.spacing", "patches.shape", "training.batch_size", "training.epochs"} <= set(
        recipe.reasons
    )
    for path, reason in recipe.reasons.items():
        assert any(path in line and reason.split()[0] in line for line in done.stdout.splitlines()), path
    assert f"Train it: mmfnet train {tiny_cohort} --recipe {file} --out RUN" in done.stdout
    assert f"Received: {file}" in mmfnet("plan", tiny_cohort, "--out", file, code=1).stderr


def test_patients_who_cannot_be_planned_for(mmfnet, tiny_cohort, tmp_path):
    out = "--out", tmp_path / "recipe.json"
    assert "nowhere, which does not exist" in mmfnet("plan", "nowhere", *out, code=1).stderr
    done = mmfnet("plan", tiny_cohort, *out, "--set", "data.modalities=t1,flair", code=1)
    assert "flair: is missing" in done.stderr
    done = mmfnet("plan", tiny_cohort, *out, "--set", "data.modalities=t1", code=1)
    assert "must name two or more for MMFNet" in done.stderr
    done = mmfnet("plan", tiny_cohort, *out, "--set", "training.loss=mine", code=1)
    assert "`training.loss`, must be one of" in done.stderr
    assert "patient" not in done.stderr, "nobody was read"
    assert not (tmp_path / "recipe.json").exists()


def test_a_training_plans_with_its_groups(mmfnet, tiny_cohort, tmp_path, monkeypatch):
    def stop(*_, groups, **__):
        raise ValueError(f"in {len(set(groups.values()))} groups")

    monkeypatch.setattr(plan, "plan_recipe", stop)
    names = sorted(path.name for path in tiny_cohort.iterdir() if path.is_dir())
    file = tmp_path / "groups.csv"
    file.write_text("\n".join(["patient,group", *(f"{name},{number // 2}" for number, name in enumerate(names)), ""]))
    done = mmfnet("train", tiny_cohort, "--out", tmp_path / "run", "--groups", file, code=1)
    assert f"in {len(names) // 2} groups" in done.stderr
