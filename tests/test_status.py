import os
import platform
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from keras_mmfnet.cli import app
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.run import Run
from keras_mmfnet.status import jobs_state, network_states

RECIPE = Recipe().replace({"data.modalities": ("t1", "t2"), "training.epochs": 40})
HEADER = "epoch,average_precision,dice_score,loss,seconds,val_average_precision,val_dice_score,val_loss"


def epochs(folder, count, seconds=30.0):
    """The state of a training after some epochs, and that of the epoch before."""
    for number in (count - 1, count):
        state = folder / f"epoch-{number:05d}"
        state.mkdir(parents=True)
        rows = [f"{n},0.1,0.2,0.8,{seconds},0.1,{n / 100},{1 - n / 100}" for n in range(number)]
        (state / "history.csv").write_text("\n".join([HEADER, *rows]) + "\n")


@pytest.fixture
def run(tmp_path):
    """A run as it is on disk while fold 0 is trained, fold 1 was killed, and fold 2 was refused."""
    run = Run(tmp_path)
    run.recipe_file.write_text(RECIPE.to_json())
    run.cohort_file.write_text('{"patients": {}, "folds": []}')
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for fold, number in ((0, os.getpid()), (1, int(ended.stdout))):
        folder = run.fold_folder(fold)
        folder.mkdir()
        for name in ("unet3d_t1", "unet3d_t2", "mmfnet"):
            (folder / f".{name}.lock").touch()
        run.network(fold, "unet3d_t1").touch()
        rows = [f"{n},0.1,0.2,0.8,30,0.1,0.5,0.4,all,0.001" for n in range(12)]  # it stopped early
        run.history(fold, "unet3d_t1").write_text("\n".join([f"{HEADER},stage,learning_rate", *rows]) + "\n")
        for name in ("unet3d_t2", "mmfnet"):
            run.owner(fold, name).write_text(f"process {number} on {platform.node()} since 2026-01-01 00:00:00")
        epochs(folder / ".unet3d_t2" / "encoders_frozen", 2)
        epochs(folder / ".unet3d_t2" / "all", 8)
    run.fold_folder(2).mkdir()
    for when, refused in (("2026-01-01_00-00-00", "network_0_unet3d_t2"), ("2026-01-02_00-00-00", "method_2_mmfnet")):
        (run.jobs / when / "refused").mkdir(parents=True)
        (run.jobs / when / "jobs.json").write_text('{"method_2_mmfnet": {}, "network_2_unet3d_t1": {}}')
        (run.jobs / when / "refused" / refused).write_text("why")
    return run


@pytest.mark.parametrize("owner", ["", "another text", "process 99999999999999999999 on {node} since", b"\xff"])
def test_an_owner_that_is_damaged(run, owner):
    content = owner if isinstance(owner, bytes) else owner.format(node=platform.node()).encode()
    run.owner(0, "unet3d_t2").write_bytes(content)
    states = {state.name: state.state for state in network_states(run) if state.fold == 0}
    assert states["unet3d_t2"] == ("running" if owner in ("another text", b"\xff") else "stopped")


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"epoch,loss\n0", b"epoch,loss\n0,low\n"])
def test_a_history_that_is_damaged(run, damage):
    run.history(0, "unet3d_t1").write_bytes(damage)
    with pytest.raises(ValueError, match=r"unet3d_t1_history.csv: must be an undamaged table of epochs. Received: "):
        network_states(run)


@pytest.mark.parametrize("damage", ["{", "[1]"])
def test_jobs_that_are_damaged(run, damage):
    (run.jobs / "2026-01-02_00-00-00" / "jobs.json").write_text(damage)
    with pytest.raises(ValueError, match=r"jobs.json: must be .*JSON.* Received: "):
        network_states(run)


def test_jobs_that_run_and_jobs_that_have_ended(tmp_path):
    """Until its patients are preprocessed, a run has no recipe."""
    run = Run(tmp_path)
    assert jobs_state(run) == ""
    folder = run.jobs / "2026-01-01_00-00-00"
    for name in ("done", "refused"):
        (folder / name).mkdir(parents=True)
    (folder / "jobs.json").write_text('{"patients_0": {}, "patients_1": {}, "cohort_all": {}, "method_0_mmfnet": {}}')
    (folder / "done" / "patients_0").touch()
    scheduler = f"process {os.getpid()} on {platform.node()} since 2026-01-01 00:00:00"
    (run.jobs / ".scheduler").write_text(scheduler)
    assert jobs_state(run) == f"1 of 4 jobs are done: {scheduler}"
    (run.jobs / ".scheduler").unlink()
    (folder / "refused" / "patients_1").write_text("[anna]: lacks t2")
    expected = [
        "1 of 4 jobs are done: the command that scheduled them has ended",
        "patients_1 failed: [anna]: lacks t2",
    ]
    assert jobs_state(run).splitlines() == expected
    for options in ([], ["--watch"]):
        done = CliRunner().invoke(app, ["status", str(tmp_path), *options])
        assert done.stdout.splitlines() == expected
    run.cache.mkdir()
    done = CliRunner().invoke(app, ["train", "--out", str(tmp_path), "--resume"])
    assert "not all preprocessed; run the command that began it again, without --resume" in " ".join(
        done.stderr.split()
    )


def test_each_network_of_a_run(run):
    found = [(s.fold, s.name, s.state, s.epochs, s.seconds_left) for s in network_states(run)]
    assert found == [
        (0, "unet3d_t1", "done", 12, None),
        (0, "unet3d_t2", "running", 10, 900.0),
        (0, "mmfnet", "waiting", 0, None),
        (1, "unet3d_t1", "done", 12, None),
        (1, "unet3d_t2", "stopped", 10, None),
        (1, "mmfnet", "stopped", 0, None),
        (2, "unet3d_t1", "waiting", 0, None),
        (2, "unet3d_t2", "waiting", 0, None),
        (2, "mmfnet", "failed", 0, None),
    ]
    t2, failed = network_states(run)[1], network_states(run)[-1]
    assert (t2.total, t2.val_loss, t2.val_dice) == (40, pytest.approx(0.93), 0.07)
    assert t2.about == f"process {os.getpid()} on {platform.node()} since 2026-01-01 00:00:00"
    assert t2.updated == (run.fold_folder(0) / ".unet3d_t2" / "all" / "epoch-00008").stat().st_mtime
    assert network_states(run)[2].about == "waits for unet3d_t2"
    assert failed.about == "why"
    # Of another machine it is not known whether its process still is.
    run.owner(1, "unet3d_t2").write_text("process 1 on node7 since 2026-01-01 00:00:00")
    assert network_states(run)[4].state == "running"
    # A trained method is done when its test patients are evaluated.
    run.network(2, "mmfnet").touch()
    assert network_states(run)[-1].state == "failed"
    run.result(2, "mmfnet").write_text("{}")
    assert network_states(run)[-1].state == "done"


def test_a_comparison_of_one_sequence(tmp_path):
    run = Run(tmp_path)
    run.recipe_file.write_text(RECIPE.replace({"data.modalities": ("t1",)}).to_json())
    run.cohort_file.write_text('{"patients": {}, "folds": []}')
    for folder in (run.fold_folder(10), run.fold_folder(2), tmp_path / "fold_2 copy"):
        folder.mkdir()
        (folder / ".unet3d_t1.lock").touch()
    assert [(one.fold, one.name, one.state) for one in network_states(run)] == [
        (2, "unet3d_t1", "stopped"),
        (10, "unet3d_t1", "stopped"),
    ]


def test_the_command(run):
    result = CliRunner().invoke(app, ["status", str(run)], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "0 of 2 jobs are done: the command that scheduled them has ended"
    assert [line.split()[:3] for line in lines[4:7]] == [
        ["0", "unet3d_t1", "done"],
        ["0", "unet3d_t2", "running"],
        ["0", "mmfnet", "waiting"],
    ]
    assert "10 of 40" in lines[5]
    assert "0.9300" in lines[5]
    assert "about 15 min" in lines[5]
    assert "less than a minute ago" in lines[5]


def test_watching_ends_when_a_run_without_jobs_was_killed_before_the_first_epoch(run):
    shutil.rmtree(run.jobs)
    shutil.rmtree(run.fold_folder(2))
    for owner in run.folder.glob("fold_0/.*.owner"):
        owner.unlink()
    shutil.rmtree(run.fold_folder(1) / ".unet3d_t2")
    result = CliRunner().invoke(app, ["status", str(run), "--watch"])
    assert result.exit_code == 0
    assert result.stdout.count(" stopped ") == 4


def test_jobs_that_failed_are_not_told_of_when_their_work_was_done_without_them(run):
    (run.jobs / "2026-01-02_00-00-00" / "refused" / "cohort_all").write_text("a file is damaged")
    for owner in run.folder.glob("fold_*/.*.owner"):
        owner.unlink()
    assert "cohort_all failed: a file is damaged" in jobs_state(run)
    run.result(2, "mmfnet").write_text("{}")
    assert jobs_state(run) == ""


def test_watching_ends_when_nothing_is_left_to_do(run, monkeypatch):
    for fold in range(3):
        for name in ("unet3d_t1", "unet3d_t2", "mmfnet"):
            run.network(fold, name).touch()
            run.owner(fold, name).unlink(missing_ok=True)
        run.result(fold, "mmfnet").write_text("{}")
    scheduler = run.jobs / ".scheduler"
    scheduler.write_text(f"process {os.getpid()} on {platform.node()} since 2026-01-01 00:00:00")
    # All networks are done, and the jobs end with the report.
    monkeypatch.setattr("time.sleep", lambda seconds: scheduler.unlink())
    result = CliRunner().invoke(app, ["status", str(run), "--watch"])
    assert result.exit_code == 0
    assert result.stdout.count(" done ") == 9
    assert not scheduler.exists()


def test_watching_ends_when_networks_wait_for_one_that_failed(run):
    for fold in range(2):
        for name in ("unet3d_t1", "unet3d_t2", "mmfnet"):
            run.network(fold, name).touch()
            run.owner(fold, name).unlink(missing_ok=True)
            run.result(fold, name).write_text("{}")
    result = CliRunner().invoke(app, ["status", str(run), "--watch"])
    assert result.stdout.count(" waiting ") == 2
    assert result.stdout.count(" failed ") == 1


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert result.exit_code == 1
    assert "RUN: the folder of a run, with a recipe.json, is expected. Received:" in result.stderr
