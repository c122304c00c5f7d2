import functools
import os
import pickle

import joblib
import pytest
from parallel_jobs import Deadly, crash, look
from typer.testing import CliRunner

from keras_mmfnet import _parallel
from keras_mmfnet._parallel import attempt, map_patients
from keras_mmfnet.cli import app
from keras_mmfnet.data import CaseError, find_cases
from keras_mmfnet.data.case import ZScoreError
from keras_mmfnet.data.survey import survey
from keras_mmfnet.mask_folders import compare_folders
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.run import Run

RECIPE = Recipe().replace({"data.modalities": ("t1", "t2"), "data.align": "rigid", "training.folds": 3})


@pytest.fixture
def processes(monkeypatch):
    """Two processes, though the patients are few."""
    monkeypatch.setattr(_parallel, "_LEAST", 1)
    with joblib.parallel_config("loky", n_jobs=2):
        yield


def names(numbers):
    return [f"patient {number}" for number in numbers]


def test_results_are_in_order_and_errors_among_them(processes):
    numbers = [5, 2, 3, 9, 1]
    found = list(map_patients(functools.partial(attempt, look), numbers, names(numbers), "looking"))
    assert str(found.pop(2)) == "patient 3: must be another. Received: 3"
    assert [number for number, _ in found] == [5, 2, 9, 1]
    assert os.getpid() not in {process for _, process in found}


def test_one_process_does_all_unless_there_are_to_be_several(monkeypatch):
    monkeypatch.setattr(_parallel, "_LEAST", 1)
    assert list(map_patients(look, [1, 2], names([1, 2]), "looking")) == [(1, os.getpid()), (2, os.getpid())]


def test_few_patients_are_not_divided():
    with joblib.parallel_config("loky", n_jobs=2):
        found = list(map_patients(look, [1, 2], names([1, 2]), "looking"))
    assert found == [(1, os.getpid()), (2, os.getpid())]


def test_a_process_that_dies_names_its_patient(processes):
    numbers = list(range(8))
    with pytest.raises(CaseError, match="patient 3: must be another"):
        list(map_patients(look, numbers, names(numbers), "looking"))
    with pytest.raises(RuntimeError, match=r"^looking .*patient 3.*: a process was killed.* Received: .*SIGKILL"):
        list(map_patients(crash, numbers, names(numbers), "looking"))
    with pytest.raises(RuntimeError, match=r"^looking 8 patients: a process was killed.* Received: .*SIGKILL"):
        list(map_patients(look, [Deadly()] * 8, names(numbers), "looking"))
    # The next work has new processes.
    assert list(map_patients(crash, [1, 2], names([1, 2]), "looking")) == [1, 2]


def test_nothing_is_begun_after_the_parent_was_killed(tmp_path):
    mark = tmp_path / "mark"
    assert _parallel._in_process(look, 1, mark, 1, os.getppid()) == (1, os.getpid())
    with pytest.raises(RuntimeError, match="must still run"):
        _parallel._in_process(look, 1, mark, 1, os.getppid() + 1)


def test_an_error_keeps_its_kind_on_the_way():
    error = pickle.loads(pickle.dumps(ZScoreError("anna: z-scores", 1000.0)))
    assert (str(error), error.scale) == ("anna: z-scores", 1000.0)


def test_the_same_as_in_one_process(tiny_cohort, tmp_path, request):
    cases = find_cases(tiny_cohort, RECIPE.data)

    def results(folder):
        run = Run.start(folder, tiny_cohort, RECIPE)
        cohort = run.cohort_file.read_text()
        images = [patient.images["t2"].tobytes() for patient in run.patients([case.name for case in cases])]
        return (
            cohort,
            images,
            survey(cases, RECIPE.data, deep=True),
            repr(compare_folders(tiny_cohort, tiny_cohort, RECIPE.data)),  # some numbers are NaN
        )

    one = results(tmp_path / "one")
    request.getfixturevalue("processes")
    assert results(tmp_path / "two") == one


def test_the_option_of_the_command(tiny_cohort, monkeypatch):
    monkeypatch.setattr(_parallel, "_LEAST", 1)
    numbers, parallel = [], joblib.Parallel
    monkeypatch.setattr(joblib, "Parallel", lambda n, **options: numbers.append(n) or parallel(n, **options))
    for options in (["--workers", "2"], ["--workers", "1"]):
        done = CliRunner().invoke(app, ["check", str(tiny_cohort), "--no-mask", *options])
        assert "6 patients can be used" in done.stdout
    assert numbers == [2]
