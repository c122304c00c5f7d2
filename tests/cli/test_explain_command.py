import re

import pytest
import SimpleITK as sitk
from checks import BACKEND, random_volume

from keras_mmfnet.data import Grid


@pytest.mark.filterwarnings("ignore:Please (import|use) `zoom` from the `scipy.ndimage`:DeprecationWarning")
def test_a_patient_of_a_run_is_explained(mmfnet, trained, tmp_path):
    patient, out = tmp_path / "patient", tmp_path / "out"
    patient.mkdir()
    grid = Grid((24, 20, 6), (2.0, 2.0, 4.0), (-20.0, -20.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    for seed, name in enumerate(("t1", "t2", "cet1")):
        sitk.WriteImage(grid.image(abs(random_volume(*grid.shape, seed=seed))), str(patient / f"{name}.nii.gz"))
    arguments = ("explain", trained, patient, "--out", out)
    done = mmfnet(*arguments, "--fold", 3, code=1)
    assert re.search(r"that is trained \(0, 1\) is expected. Received: 3", done.stderr)
    assert "--methods: names of" in mmfnet(*arguments, "--methods", "gradcam,lime", code=1).stderr
    refused = mmfnet(*arguments, "--structure", "core", code=1)
    assert "--structure: one of tumour is expected. Received: core" in refused.stderr
    done = mmfnet(*arguments, "--structure", "tumour")
    names = {"attention", "spatial_fusion1", "spatial_fusion2", "spatial_fusion_bottom"}
    assert {path.stem for path in out.iterdir()} == names | ({"gradcam"} if BACKEND == "tensorflow" else set())
    assert done.stdout.splitlines() == [str(out / line.rpartition("/")[2]) for line in done.stdout.splitlines()]
    assert BACKEND == "tensorflow" or "KERAS_BACKEND=tensorflow" in done.stderr
    assert (
        f"a new one in a folder that exists is expected. Received: {out}, which exists already"
        in mmfnet(*arguments, code=1).stderr
    )
