import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import SimpleITK as sitk
import torch
from typer.testing import CliRunner

from keras_mmfnet import jobs
from keras_mmfnet.cli import app
from keras_mmfnet.cli.job import own_gpu
from keras_mmfnet.data.folds import Fold
from keras_mmfnet.jobs import Request, plan_jobs, schedule
from keras_mmfnet.methods import METHODS, method_of
from keras_mmfnet.models import load_network
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.run import Run, RunLocked, cross_validate
from keras_mmfnet.status import jobs_state

HERE = Path(__file__).parent
RECIPE = Recipe().replace(
    {
        "data.modalities": ("t1", "t2"),
        "data.spacing": 4.0,
        "patches.shape": (16, 16, 16),
        "network.filters": (2,),
        "network.reduction": 2,
        "training.batch_size": 2,
        "training.steps_per_epoch": 2,
        "training.epochs": 4,
        "training.warmup_epochs": 1,
        "training.folds": 3,
    }
)


@pytest.fixture
def request_of(tiny_cohort, tmp_path):
    """Makes a request over the tiny patients."""
    names = sorted(path.name for path in tiny_cohort.iterdir())

    def make(**changes):
        blocks = (tuple(names[:3]), tuple(names[3:]))
        return Request(
            **{"run": tmp_path / "run", "data": tiny_cohort, "recipe": RECIPE, "folds": (0,), "patients": blocks}
            | changes
        )

    return make


def test_a_request_is_read_as_it_was_written(request_of, tmp_path):
    fold = Fold(("a", "b"), ("c",), ("d",))
    request = request_of(groups={"a": "x"}, splits=(fold,), methods=("multi_encoder",), baseline="multi_encoder")
    (tmp_path / "request.json").write_text(request.model_dump_json())
    assert Request.load(tmp_path) == request
    assert Request.load(tmp_path).compared == [METHODS["multi_encoder"]]


def test_jobs_wait_for_those_whose_results_they_need(request_of):
    one = plan_jobs(request_of(folds=(0, 2)))
    assert one == {
        "patients_0": [],
        "patients_1": [],
        "cohort_all": ["patients_0", "patients_1"],
        "network_0_unet3d_t1": ["cohort_all"],
        "network_0_unet3d_t2": ["cohort_all"],
        "method_0_mmfnet": ["cohort_all", "network_0_unet3d_t1", "network_0_unet3d_t2"],
        "network_2_unet3d_t1": ["cohort_all"],
        "network_2_unet3d_t2": ["cohort_all"],
        "method_2_mmfnet": ["cohort_all", "network_2_unet3d_t1", "network_2_unet3d_t2"],
        "report_all": ["cohort_all", "method_0_mmfnet", "method_2_mmfnet"],
    }
    # Networks from which several methods borrow are trained once.
    names = ("unet3d_t1", "mmfnet_base_transfer", "mmfnet_mlp_std_transfer")
    several = plan_jobs(request_of(methods=names, patients=()))
    assert sorted(several) == sorted(
        ["cohort_all", "report_all"]
        + [f"method_0_{name}" for name in names]
        + [f"network_0_unet3d_{sequence}" for sequence in ("t1", "t2", "cet1")]
    )
    assert several["method_0_unet3d_t1"] == ["cohort_all", "network_0_unet3d_t1"]


def test_what_is_done_is_no_job(request_of):
    request = request_of(methods=("multi_encoder", "mmfnet_base_transfer", "mmfnet_mlp_std"), patients=())
    run = Run(request.run)
    run.fold_folder(0).mkdir(parents=True)
    run.recipe_file.write_text(RECIPE.to_json())
    run.result(0, "multi_encoder").write_text('{"patients": []}')
    run.network(0, "mmfnet_base_transfer").write_text("trained, but its patients are not segmented")
    assert list(plan_jobs(request)) == [
        "cohort_all",
        "method_0_mmfnet_base_transfer",
        "method_0_mmfnet_mlp_std",
        "report_all",
    ]


def test_each_job_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    def seen():
        return os.environ["CUDA_VISIBLE_DEVICES"]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with own_gpu(tmp_path):
        assert seen() == "3"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
        with own_gpu(tmp_path):
            assert seen() == "5"
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
            found = []

            def third():
                with own_gpu(tmp_path):
                    found.append(seen())

            waiting = threading.Thread(target=third)
            waiting.start()
            time.sleep(0.1)
            assert not found
        waiting.join()
        assert found == ["5"]
    for named in ("7", "", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        with own_gpu(tmp_path):
            assert seen() == named


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--jobs: one of --recipe, --paper, --small, --from and --resume is expected with it"),
        (["--small", "--profile", "slurm"], "--profile: a number of jobs, --jobs N, is expected"),
        (["--small", "--dry-run"], "--dry-run: a number of jobs"),
        (["--small", "--jobs", "2", "--profile", "nowhere"], "--profile: a folder is expected"),
        (["--small", "--jobs", "2", "--devices", "none"], "--devices: a number of 1 or more, or all, is expected."),
        (["--small", "--jobs", "2", "--devices", "3"], "must be a multiple of 3 devices. Received: 4"),
        (["--small", "--jobs", "2"], "--jobs needs Snakemake: pip install 'keras-mmfnet[cluster]'"),
        (
            ["--small", "--jobs", "2", "--set", "training.folds=9"],
            "9 folds need at least 9 patients. Received: 6",
        ),
    ],
)
def test_what_is_refused_before_a_job_starts(tiny_cohort, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(jobs.importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "run"
    command = ["train", str(tiny_cohort), "--out", str(out), *(options or ["--jobs", "2"])]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not out.exists()


def test_a_dry_run_shows_the_jobs_and_writes_nothing(tiny_cohort, tmp_path):
    out = tmp_path / "run"
    command = ["compare", str(tiny_cohort), "--out", str(out), "--methods", "multi_encoder,mmfnet_base_transfer"]
    result = CliRunner().invoke(app, [*command, "--fold", "1", "--jobs", "2", "--dry-run"])
    assert result.exit_code == 0, result.stderr
    assert " network_1_unet3d_t1            cohort_all" in result.stdout
    assert "13 jobs; nothing was started" in result.stdout
    assert not out.exists()


def test_a_profile_that_snakemake_refuses_is_said(request_of, tmp_path):
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "config.yaml").write_text("executor: nobody")
    with pytest.raises(RuntimeError, match=r"Received: a failure of Snakemake\n.*snakemake.log is: .*nobody"):
        schedule(request_of(), 2, tmp_path / "profile")


def test_jobs_that_fail_are_named(request_of, tiny_cohort, tmp_path):
    copied = tmp_path / "patients"
    request = request_of(data=copied)
    for patient in tiny_cohort.iterdir():
        (copied / patient.name).mkdir(parents=True)
        for file in patient.iterdir():
            (copied / patient.name / file.name).write_bytes(file.read_bytes())
    (copied / "patient_00" / "t1.nii.gz").write_bytes(b"torn")
    with pytest.raises(RuntimeError) as error:
        schedule(request, 2)
    text = str(error.value)
    assert "all jobs must succeed. Received: 1 failed job\n" in text
    assert "patients_0: " in text
    assert "t1.nii.gz" in text
    assert "patients_1" not in text
    # It is not tried again, as a job that was killed is.
    [refused] = request.run.glob("jobs/*/refused/*")
    assert refused.name == "patients_0"
    assert (request.run / "run.log").read_text().count("Job patients_0") == 1
    assert not (request.run / "recipe.json").exists()


def test_snakemake_that_is_killed(tmp_path):
    """Its jobs go on, and are not called failed."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "method_0_mmfnet.log").write_text("Epoch 6 of 30")
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    with open(tmp_path / "lock", "w") as lock, pytest.raises(RuntimeError, match=r"go on.* Received: .*signal 9"):
        jobs._run_snakemake(command, None, lock.fileno(), tmp_path, ["method_0_mmfnet"], tmp_path / "scheduler")


def workers(folder, name=""):
    """The processes that were started for the jobs of a folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if str(folder) in line and name in line and process.pid != os.getpid():
            found.append(process)
    return found


def kill(processes):
    """Kills processes, of which one may end with another."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes)


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def same_results(run, expected):
    """Compares the networks and the numbers of the patients of two runs."""
    for name in ("unet3d_t1", "unet3d_t2", "mmfnet"):
        one, other = (load_network(each.network(0, name)).get_weights() for each in (run, expected))
        for weights, others in zip(one, other, strict=True):
            np.testing.assert_array_equal(weights, others)
    for patient in {row["patient"] for row in expected.rows("mmfnet")}:
        mask, other = (
            sitk.GetArrayFromImage(each.read_masks(0, "mmfnet", patient)["tumour"]) for each in (run, expected)
        )
        np.testing.assert_array_equal(mask, other)
    rows, others = ([row | {"seconds": 0} for row in each.rows("mmfnet")] for each in (run, expected))
    assert rows == others


def check_killed_jobs(request_of, tiny_cohort, tmp_path, profile=None):
    """Both schedulers and workers are killed; the results are those of one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a job of two on two cores
    expected = Run.start(tmp_path / "one_process", tiny_cohort, RECIPE)
    cross_validate(expected, method_of(RECIPE), [0])
    torch.set_num_threads(threads)

    run = Run.start(tmp_path / "run", tiny_cohort, RECIPE)
    command = [sys.executable, "-m", "keras_mmfnet.cli", "train", "--out", run, "--resume", "--jobs", "2"]
    options = ["--profile", profile] if profile else []
    first = subprocess.Popen([*map(str, [*command, *options])], stderr=subprocess.DEVNULL)
    wait_for(lambda: any(run.folder.glob("fold_0/.unet3d_t*/*")) or first.poll() is not None)
    with pytest.raises(RunLocked, match="no other process may schedule jobs of this run"):
        schedule(request_of(patients=()), 2)  # another one by mistake
    # Snakemake goes on if only the command is killed.
    first.kill()
    first.wait()
    with pytest.raises(RunLocked, match=r"Received: process \d+ on .*; kill -INT ends it and its jobs") as error:
        schedule(request_of(patients=()), 2)
    named = re.search(r"process (\d+) on ", str(error.value))
    assert int(named[1]) in {process.pid for process in workers(run.jobs, "snakemake --snakefile")}
    assert f" are done: {named[0]}" in jobs_state(run)
    # It is killed, and on this machine its jobs: a cluster goes on with them.
    kill(workers(run.jobs, "snakemake --snakefile" if profile else ""))
    assert not run.result(0, "mmfnet").exists()

    def kill_the_training():
        wait_for(lambda: any(run.folder.glob("fold_0/.mmfnet/*/epoch*")))
        kill(workers(run.jobs, "keras_mmfnet.cli.job"))

    killer = threading.Thread(target=kill_the_training)
    killer.start()
    schedule(request_of(patients=(), track="tensorboard"), 2, profile)
    killer.join()
    [log] = sorted(run.jobs.glob("*/snakemake.log"))[1:]
    assert "Trying to restart job" in log.read_text()
    assert run.report_file.exists()
    assert (run.fold_folder(0) / "tensorboard" / "mmfnet" / "all").is_dir()
    same_results(run, expected)
    for name in ("unet3d_t1", "unet3d_t2", "mmfnet"):
        assert len(run.history(0, name).read_text().splitlines()) == 1 + RECIPE.training.epochs
    # Nothing is left to do.
    assert list(plan_jobs(request_of(patients=()))) == ["cohort_all", "report_all"]


@pytest.mark.slow
def test_jobs_end_as_one_process_though_they_are_killed(request_of, tiny_cohort, tmp_path):
    check_killed_jobs(request_of, tiny_cohort, tmp_path)


@pytest.mark.slow
def test_jobs_of_a_slurm_cluster_end_as_one_process(request_of, tiny_cohort, tmp_path):
    if "SLURM_TEST" in os.environ:
        check_killed_jobs(request_of, tiny_cohort, tmp_path, HERE.parent / "examples" / "slurm")
        return
    lacking = [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "unshare") if not shutil.which(name)]
    if lacking or Path("/etc/slurm/slurm.conf").exists() or subprocess.call(["unshare", "--mount", "--pid", "true"]):
        pytest.skip(f"needs root, slurm-wlm and munge, not set up; lacking: {', '.join(lacking) or 'root'}")
    # The same test again, on a cluster.
    test = f"{__file__}::{test_jobs_of_a_slurm_cluster_end_as_one_process.__name__}"
    command = [HERE / "slurm.sh", tmp_path, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
