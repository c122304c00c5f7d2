import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import SimpleITK as sitk
from review_patients import make_patient
from served import served

from keras_mmfnet.data import Grid
from keras_mmfnet.review.server import Review
from keras_mmfnet.review.strokes import pack, unpack

ONE = "/secret/api/patients/0"


@pytest.fixture
def client(patient, tmp_path):
    with served([patient], tmp_path / "corrections") as client:
        yield client


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/api/patients",
        "/wrong/",
        "/wrong/api/patients",
        "/secret/api/patients/1",
        "/secret/api/patients/-1",
        "/secret/nobody.js",
        "/secret/..%2f..%2fserver.py",
        "/secret/%2e%2e/server.py",
        f"{ONE}/images/mask.nii",
        f"{ONE}/images/..%2f..%2fmask.nii",
        f"{ONE}/maps/probability/..%2f.nii",
        f"{ONE}/masks/other.nii",
    ],
)
def test_nothing_else_is_served(client, path):
    client.get(path, status=404)


@pytest.mark.parametrize("name", ["", "review.js", "review.css", "niivue.js"])
def test_the_page_needs_no_other_server(client, name):
    content, headers = client.get(f"/secret/{name}")
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert headers["Referrer-Policy"] == "no-referrer"
    if name != "niivue.js":
        assert b"http" not in content


def read(answer, tmp_path):
    (tmp_path / "answer.nii").write_bytes(answer[0])
    return sitk.ReadImage(str(tmp_path / "answer.nii"))


def test_images_lie_on_one_grid(client, patient, tmp_path):
    found = {
        name: read(client.get(f"{ONE}/{name}.nii"), tmp_path)
        for name in ("images/t1", "images/t2", "masks/predicted", "masks/expert", "maps/probability/tumour")
    }
    for image in found.values():
        assert Grid.from_image(image).matches(patient.grid)
    arrays = {name: sitk.GetArrayFromImage(image) for name, image in found.items()}
    np.testing.assert_array_equal(arrays["images/t1"], patient.image("t1"))
    assert found["images/t1"].GetPixelID() == sitk.sitkInt16
    assert found["images/t2"].GetPixelID() == sitk.sitkFloat32
    np.testing.assert_array_equal(arrays["masks/expert"], patient.expert()[0])
    drawing, headers = client.get(f"{ONE}/drawing")
    assert headers["X-Strokes"] == "0"
    np.testing.assert_array_equal(np.frombuffer(drawing, np.uint8), arrays["masks/predicted"].ravel())


def test_from_the_list_to_a_saved_mask(client, patient, tmp_path):
    [row] = client.json("/secret/api/patients")["patients"]
    assert (row["name"], row["state"], row["unsaved"]) == ("anna", "to do", False)
    assert row["scores"]["tumour"]["dsc"] == 0.7
    about = client.json(ONE)
    assert about["sequences"] == ["t1", "t2"]
    assert (tuple(about["shape"]), tuple(about["spacing"])) == (patient.grid.shape, patient.grid.spacing)
    stroke, first = pack(np.array([0, 1], np.uint32), np.array([1, 1], np.uint8)), about["state_of_drawing"]
    answer = client.json(f"{ONE}/strokes?after={first}", stroke)
    assert answer["strokes"] == 1
    assert client.json("/secret/api/patients")["patients"][0]["unsaved"]
    erased = pack(np.array([0], np.uint32), np.array([0], np.uint8))
    assert "another window" in client.json(f"{ONE}/strokes?after={first}", erased, 409)["error"]
    assert "Received: " in client.json(f"{ONE}/strokes?after={answer['state']}", stroke[:-1], 422)["error"]
    row = client.json(f"{ONE}/save?after={answer['state']}", b"")["row"]
    assert (row["state"], row["by"], row["unsaved"]) == ("corrected", "me", False)
    drawing = np.frombuffer(client.get(f"{ONE}/drawing")[0], np.uint8)
    assert drawing[:2].tolist() == [1, 1]
    assert row["scores"]["tumour"]["corrected_ml"] == pytest.approx(drawing.sum() * 0.009)


def test_computed_strokes(client, patient):
    drawing = np.frombuffer(client.get(f"{ONE}/drawing")[0], np.uint8).reshape(patient.grid.shape)
    grown = client.get(f"{ONE}/grown?structure=0&threshold=0.05")[0]
    indices, values = unpack(grown, drawing.size, 1)
    after = drawing.copy().ravel()
    after[indices] = values
    np.testing.assert_array_equal(after, (patient.map("probability", "tumour") >= 0.05).ravel())
    middle = int(drawing.sum(axis=(1, 2)).argmax())
    gone = np.flatnonzero(drawing[middle].ravel()) + middle * drawing[0].size
    state = client.get(f"{ONE}/drawing")[1]["X-State"]
    client.get(f"{ONE}/strokes?after={state}", pack(gone, np.zeros(len(gone), np.uint8)))
    indices, values = unpack(client.get(f"{ONE}/interpolated?structure=0&axis=0")[0], drawing.size, 1)
    assert (indices // drawing[0].size == middle).all()
    assert values.all()
    assert len(set(indices) & set(gone)) > 0.6 * len(gone)


@pytest.mark.parametrize(
    "query",
    [
        *("grown?structure=1&threshold=0.5", "grown?structure=-1&threshold=0.5", "grown?structure=x&threshold=0.5"),
        *("grown?structure=0&threshold=nan", "grown?structure=0&threshold=1e9", "interpolated?structure=0&axis=3"),
    ],
)
def test_what_cannot_be_computed(client, query):
    assert client.json(f"{ONE}/{query}", status=422)["error"]


def test_a_patient_without_tumour_and_a_damaged_record(patient, tmp_path):
    healthy = dataclasses.replace(patient, scores={"tumour": {"dsc": float("nan"), "predicted_ml": 0.0}})
    (tmp_path / "corrections" / "anna").mkdir(parents=True)
    (tmp_path / "corrections" / "anna" / "001.json").write_text("{")
    with served([healthy], tmp_path / "corrections") as client:
        [row] = client.json("/secret/api/patients")["patients"]
    assert row["scores"] == {"tumour": {"predicted_ml": 0.0}}
    assert row["state"] == "damaged"


def test_one_review_at_a_time(client, patient, tmp_path):
    with pytest.raises(RuntimeError, match=r"one review at a time is expected. Received: another"):
        Review([patient], tmp_path / "corrections", "you")


def test_many_patients_are_listed_quickly(tmp_path):
    patient = make_patient(tmp_path)
    with served([patient] * 500, tmp_path / "corrections") as client:
        content, _ = client.get("/secret/api/patients")
    assert len(json.loads(content)["patients"]) == 500
    assert len(content) < 200_000


def test_a_map_is_predicted_once(patient, tmp_path):
    """The page asks for all maps of a patient at the same time."""
    asked, image = [], sitk.ReadImage(str(patient.maps["probability", "tumour"]))

    def predict():
        asked.append(None)
        time.sleep(0.2)
        return {"tumour": image}

    new = dataclasses.replace(
        patient, maps={("probability", "tumour"): tmp_path / "new" / "map.nii.gz"}, predict=predict
    )
    with served([new], tmp_path / "corrections") as client, ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda _: client.get(f"{ONE}/maps/probability/tumour.nii")[0], range(4))]
    assert len(asked) == 1
    assert len(set(found)) == 1
