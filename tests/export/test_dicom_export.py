import os
import subprocess
import sys

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_files import filled, find_series, write_series

from keras_mmfnet.data.dicom import is_draft, read_series, series_grid
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.data.layouts import read_case_folder
from keras_mmfnet.export import Structure, _dicom, write_rtstruct, write_segmentation
from keras_mmfnet.recipe import DataRecipe
from keras_mmfnet.version import __version__


def oblique_grid():
    turn = sitk.Euler3DTransform()
    turn.SetRotation(0.2, -0.1, 0.15)
    return Grid((40, 36, 8), (1.0, 1.0, 4.0), (5.0, -8.0, 20.0), turn.GetMatrix())


def ring(grid):
    """A tumour with a hole, and a second one."""
    z, y, x = np.indices(grid.shape)
    outer = (x - 18) ** 2 + (y - 16) ** 2 + (4 * (z - 3)) ** 2 < 11**2
    hole = (x - 18) ** 2 + (y - 16) ** 2 < 4**2
    other = (abs(x - 34) < 3) & (abs(y - 30) < 3) & (abs(z - 5) < 2)
    return (outer & ~hole | other).astype(np.uint8)


@pytest.fixture(params=["made", "real"])
def drawn(request, tmp_path):
    """A series and a mask on it."""
    if request.param == "made":
        write_series(tmp_path / "t1", oblique_grid(), order=-1)
        [series] = find_series(tmp_path / "t1", "ann")
        array = ring(oblique_grid())
    else:
        folder = request.getfixturevalue("test_data") / "brainix"
        series = next(series for series in find_series(folder, "ann") if series.folder.name == "T1")
        array = np.zeros((22, 512, 512), np.uint8)
        array[6:14, 200:280, 220:290] = 1
        array[8:12, 230:250, 240:260] = 0
    grid = Grid.from_image(read_series(series, "ann"))
    return series, grid, grid.image(array)


def test_a_structure_set_read_back(drawn, tmp_path, capsys):
    series, grid, mask = drawn
    write_rtstruct(mask, series, tmp_path / "rs.dcm", name="GTV")
    assert capsys.readouterr().out == ""
    structures, image = pydicom.dcmread(tmp_path / "rs.dcm"), pydicom.dcmread(series.files[0])
    assert structures.Modality == "RTSTRUCT"
    assert structures.PatientID == image.PatientID
    assert structures.StructureSetROISequence[0].ROIName == "GTV"
    frame = structures.ReferencedFrameOfReferenceSequence[0]
    assert frame.FrameOfReferenceUID == image.FrameOfReferenceUID
    referred = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert referred.SeriesInstanceUID == image.SeriesInstanceUID
    assert {item.ReferencedSOPInstanceUID for item in referred.ContourImageSequence} == {
        pydicom.dcmread(file).SOPInstanceUID for file in series.files
    }
    np.testing.assert_array_equal(filled(structures, grid), sitk.GetArrayFromImage(mask) > 0)
    for contour in structures.ROIContourSequence[0].ContourSequence:
        assert contour.ContourGeometricType == "CLOSED_PLANAR"
        assert contour.NumberOfContourPoints == len(contour.ContourData) / 3 >= 4


def test_a_segmentation_read_back(drawn, tmp_path, recwarn):
    series, _, mask = drawn
    write_segmentation(mask, series, tmp_path / "seg.dcm", name="GTV")
    assert not recwarn.list
    written = pydicom.dcmread(tmp_path / "seg.dcm")
    assert written.Modality == "SEG"
    assert written.SegmentSequence[0].SegmentLabel == "GTV"
    assert written.FrameOfReferenceUID == pydicom.dcmread(series.files[0]).FrameOfReferenceUID
    # SimpleITK reads it by GDCM: the slices with tumour alone.
    back = sitk.ReadImage(str(tmp_path / "seg.dcm"))
    whole = sitk.Resample(back, mask, sitk.Transform(), sitk.sitkNearestNeighbor)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(whole) > 0, sitk.GetArrayFromImage(mask) > 0)


@pytest.mark.parametrize("write", [write_rtstruct, write_segmentation])
def test_what_cannot_be_written(write, tmp_path):
    write_series(tmp_path / "t1", oblique_grid())
    [series] = find_series(tmp_path / "t1", "ann")
    grid = Grid.from_image(read_series(series, "ann"))
    mask, out = grid.image(ring(grid)), tmp_path / "out.dcm"
    with pytest.raises(ValueError, match=r"must hold a voxel of tumour .*Received: an empty mask"):
        write(grid.image(np.zeros(grid.shape, np.uint8)), series, out)
    with pytest.raises(ValueError, match=r"must lie on the grid of its series. Received: "):
        write(grid.crop((0, 0, 0), (4, 20, 20)).image(ring(grid)[:4, :20, :20]), series, out)
    with pytest.raises(ValueError, match=r"must be a DICOM series to be referred to. Received: .*t1.nii$"):
        write(mask, tmp_path / "t1.nii", out)
    with pytest.raises(ValueError, match=r"`name` must have 1 to 64 characters .*Received: 'TTTT"):
        write(mask, series, out, name="T" * 65)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write(mask, series, tmp_path / "nowhere" / "out.dcm")

    assert not out.exists()


@pytest.mark.parametrize("tolerance", [-1, np.nan, np.inf])
def test_a_tolerance_or_colour_that_is_none(tolerance):
    with pytest.raises(ValueError, match=r"`tolerance` must be 0 or more mm. Received: "):
        write_rtstruct(None, None, "out.dcm", tolerance=tolerance)
    for colour in ((300, -1, 0), (0, 0), (0.5, 0, 0)):
        with pytest.raises(ValueError, match=r"`colour` must be three whole numbers from 0 to 255. Received: "):
            Structure("tumour", None, colour=colour)


def test_a_segmentation_needs_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-mmfnet\[dicom\]'"):
        write_segmentation(None, None, tmp_path / "out.dcm")


def edit(folder, change):
    """Changes the headers of a series, also to what the standard does not allow."""
    with pydicom.config.disable_value_validation():
        for path in folder.iterdir():
            image = pydicom.dcmread(path)
            change(image)
            image.save_as(path)


@pytest.mark.parametrize("write", [write_rtstruct, write_segmentation])
@pytest.mark.parametrize(
    ("change", "received"),
    [
        (lambda image: image.pop("StudyInstanceUID"), r"images without \(0020,000D\) StudyInstanceUID"),
        (lambda image: setattr(image, "FrameOfReferenceUID", ""), r"images without \(0020,0052\) FrameOfReferenceUID"),
        (
            lambda image: setattr(image, "StudyInstanceUID", f"1.2.3.{image.InstanceNumber}"),
            "images with several StudyInstanceUIDs",
        ),
        (None, "a KeyError of the library"),
    ],
)
def test_images_that_cannot_be_referred_to(write, change, received, tmp_path, recwarn, monkeypatch, caplog):
    """The message does not tell what the images say of the patient."""
    write_series(tmp_path / "t1", oblique_grid(), patient="Secret")
    if change:
        edit(tmp_path / "t1", change)
    else:

        def fail(*_, **__):
            raise KeyError("Secret")

        monkeypatch.setattr(pydicom, "dcmwrite", fail)
    [series] = find_series(tmp_path / "t1", "ann")
    recwarn.clear()
    grid = Grid.from_image(read_series(series, "ann"))
    with pytest.raises(ValueError, match=rf"t1 .*that a DICOM object can refer to. Received: {received}$") as caught:
        write(grid.image(ring(grid)), series, tmp_path / "out.dcm")
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert not recwarn.list
    assert not caplog.records
    assert not (tmp_path / "out.dcm").exists()


@pytest.mark.parametrize("write", [write_rtstruct, write_segmentation])
def test_a_structure_may_have_any_letters(write, tmp_path):
    write_series(tmp_path / "t1", oblique_grid())
    for path in (tmp_path / "t1").iterdir():
        image = pydicom.dcmread(path)
        image.SpecificCharacterSet, image.PatientName = "ISO_IR 100", "Größe^Änne"
        image.save_as(path)
    [series] = find_series(tmp_path / "t1", "ann")
    grid = Grid.from_image(read_series(series, "ann"))
    write(grid.image(ring(grid)), series, tmp_path / "out.dcm", name="Größe 腫瘍")
    written = pydicom.dcmread(tmp_path / "out.dcm")
    assert str(written.PatientName) == "Größe^Änne"
    if write is write_rtstruct:
        assert written.StructureSetROISequence[0].ROIName == "Größe 腫瘍"
    else:
        assert written.SegmentSequence[0].SegmentLabel == "Größe 腫瘍"


@pytest.mark.parametrize("write", [write_rtstruct, write_segmentation])
def test_what_a_file_says_of_itself(write, tmp_path):
    write_series(tmp_path / "t1", oblique_grid())
    [series] = find_series(tmp_path / "t1", "ann")
    grid = Grid.from_image(read_series(series, "ann"))
    write(grid.image(ring(grid)), series, tmp_path / "out.dcm")
    written = pydicom.dcmread(tmp_path / "out.dcm")
    assert written.Manufacturer == "keras-mmfnet"
    assert written.ManufacturerModelName == "MMFNet"
    assert written.SoftwareVersions == __version__
    assert written.SeriesDescription == "MMFNet (AI, not reviewed)"
    assert "InstitutionName" not in written
    if write is write_rtstruct:
        assert written.StructureSetLabel == "AI not reviewed"
        assert written.StructureSetDescription == "AI, not reviewed"
        assert written.ApprovalStatus == "UNAPPROVED"
        assert written.StructureSetROISequence[0].ROIGenerationAlgorithm == "AUTOMATIC"
        assert written.RTROIObservationsSequence[0].RTROIInterpretedType == "GTV"
        assert written.RTROIObservationsSequence[0].ROIObservationDescription == "AI, not reviewed"
    else:
        assert written.ContentLabel == "AI_NOT_REVIEWED"
        assert written.ContentDescription == "AI, not reviewed"
        [segment] = written.SegmentSequence
        assert segment.SegmentAlgorithmType == "AUTOMATIC"
        assert segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Neoplasm"
    assert is_draft(tmp_path / "out.dcm", "ann")


@pytest.mark.parametrize("write", [write_rtstruct, write_segmentation])
def test_what_a_reviewed_file_says_of_itself(write, tmp_path):
    write_series(tmp_path / "t1", oblique_grid())
    [series] = find_series(tmp_path / "t1", "ann")
    grid = Grid.from_image(read_series(series, "ann"))
    write(grid.image(ring(grid)), series, tmp_path / "out.dcm", reviewed_by="Dr.\\Ä=" + "x" * 99)
    written, name = pydicom.dcmread(tmp_path / "out.dcm"), "Dr. Ä " + "x" * 34
    assert written.SeriesDescription == f"MMFNet, reviewed by {name}"
    if write is write_rtstruct:
        assert written.StructureSetLabel == "reviewed"
        assert written.StructureSetDescription == f"reviewed by {name}"
        assert written.StructureSetROISequence[0].ROIGenerationAlgorithm == "SEMIAUTOMATIC"
        assert str(written.RTROIObservationsSequence[0].ROIInterpreter) == name
    else:
        assert (written.ContentLabel, str(written.ContentCreatorName)) == ("REVIEWED", name)
        assert written.SegmentSequence[0].SegmentAlgorithmType == "SEMIAUTOMATIC"
    assert not is_draft(tmp_path / "out.dcm", "ann")


def test_a_draft_in_the_patients_folder_is_no_mask(tmp_path, caplog):
    """As when the contours come back from the archive."""
    for name in ("T1", "T2", "T1 Gd"):
        write_series(tmp_path / "ann" / name, oblique_grid(), description=name)
    caplog.set_level("INFO")
    recipe = DataRecipe(spacing=None)
    series = read_case_folder(tmp_path / "ann", recipe, require_mask=False).images["t1"]
    grid = Grid.from_image(read_series(series, "ann"))
    write_rtstruct(grid.image(ring(grid)), series, tmp_path / "ann" / "draft.dcm")
    assert read_case_folder(tmp_path / "ann", recipe, require_mask=False).mask is None
    assert "not used as masks, as no expert has reviewed them: draft.dcm" in caplog.text
    write_rtstruct(grid.image(ring(grid)), series, tmp_path / "ann" / "reviewed.dcm", reviewed_by="me")
    [mask] = read_case_folder(tmp_path / "ann", recipe).mask.values()
    assert mask.path.name == "reviewed.dcm"


def probability(grid, middle, radius):
    """Of a ball in mm, 0.5 at its surface."""
    positions = grid.positions(np.stack(np.indices(grid.shape)[::-1], axis=-1))
    return (1 / (1 + np.exp(np.linalg.norm(positions - middle, axis=-1) - radius))).astype(np.float32)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("spacing", [(0.47, 0.47, 3.0), (0.9, 1.9, 3.0)])
@pytest.mark.parametrize("straight", [True, False])
def test_contours_follow_the_probability(straight, spacing, order, tmp_path):
    direction = np.eye(3).ravel().tolist() if straight else oblique_grid().direction
    grid = Grid((48, 44, 8), spacing, (5.0, -8.0, 20.0), tuple(direction))
    write_series(tmp_path / "t1", grid, order=order)
    [series] = find_series(tmp_path / "t1", "ann")
    middle = grid.positions(np.array([23.3, 21.6, 3.5]))
    values = probability(grid, middle, 8.0)
    mask, path = values >= 0.5, tmp_path / "rs.dcm"
    write_rtstruct(grid.image(mask.astype(np.uint8)), series, path, probability=grid.image(values))
    structures = pydicom.dcmread(path)
    np.testing.assert_array_equal(filled(structures, grid), mask)
    distances = [
        np.linalg.norm(np.reshape(np.array(contour.ContourData, float), (-1, 3)) - middle, axis=1)
        for contour in structures.ROIContourSequence[0].ContourSequence
    ]
    assert np.abs(np.concatenate(distances) - 8).max() < 0.03 * max(spacing)
    write_rtstruct(grid.image(mask.astype(np.uint8)), series, path, probability=grid.image(values), tolerance=0.3)
    fewer = pydicom.dcmread(path)
    points = [
        sum(c.NumberOfContourPoints for c in s.ROIContourSequence[0].ContourSequence) for s in (structures, fewer)
    ]
    assert points[1] < points[0] / 2
    back = filled(fewer, grid)
    assert 2 * (back & mask).sum() / (back.sum() + mask.sum()) >= 0.98
    with pytest.raises(
        ValueError, match=r"at most 12 points with a tolerance of 0.0 mm. Received: \d+ points in slice"
    ):
        write_rtstruct(grid.image(mask.astype(np.uint8)), series, path, max_points=12)
    with pytest.raises(ValueError, match=r"the probability must lie in \[0, 1\]. Received: nan"):
        write_rtstruct(grid.image(mask.astype(np.uint8)), series, path, probability=grid.image(values * np.nan))


@pytest.mark.parametrize("write", [write_rtstruct, write_segmentation])
def test_several_structures(write, tmp_path):
    """They may overlap, and one of them may be empty."""
    grid, path = oblique_grid(), tmp_path / "out.dcm"
    write_series(tmp_path / "t1", grid)
    [series] = find_series(tmp_path / "t1", "ann")
    whole = ring(grid)
    core = whole * (np.indices(grid.shape)[0] < 5)
    write(
        [
            Structure("edema", grid.image(whole), kind=""),
            Structure("none", grid.image(whole * 0)),
            Structure(
                "core", grid.image(core), colour=(1, 2, 3), code=("86049000", "SCT", "Malignant neoplasm, primary")
            ),
        ],
        series,
        path,
    )
    written = pydicom.dcmread(path)
    if write is write_rtstruct:
        rois, observations = written.StructureSetROISequence, written.RTROIObservationsSequence
        assert [(roi.ROINumber, roi.ROIName) for roi in rois] == [(1, "edema"), (2, "none"), (3, "core")]
        assert [item.RTROIInterpretedType for item in observations] == ["", "GTV", "GTV"]
        assert observations[0].RTROIIdentificationCodeSequence[0].CodeValue == "79654002"
        assert "RTROIIdentificationCodeSequence" not in observations[1]
        assert observations[2].RTROIIdentificationCodeSequence[0].CodeMeaning == "Malignant neoplasm, primary"
        colours = [tuple(item.ROIDisplayColor) for item in written.ROIContourSequence]
        assert len(set(colours)) == 3
        assert colours[2] == (1, 2, 3)
        assert "ContourSequence" not in written.ROIContourSequence[1]
        for number, array in ((0, whole), (2, core)):
            np.testing.assert_array_equal(filled(written, grid, number), array > 0)
    else:
        segments = written.SegmentSequence
        assert [(item.SegmentNumber, item.SegmentLabel) for item in segments] == [
            (1, "edema"),
            (2, "none"),
            (3, "core"),
        ]
        types = [item.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for item in segments]
        assert types == ["Edema", "Neoplasm", "Malignant neoplasm, primary"]
        frames = written.PerFrameFunctionalGroupsSequence
        numbers = np.array([frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber for frame in frames])
        sizes = [written.pixel_array[numbers == number].sum() for number in (1, 2, 3)]
        assert sizes == [whole.sum(), 0, core.sum()]
    with pytest.raises(ValueError, match=r"names that differ. Received: \['a', 'a'\]"):
        write([Structure("a", grid.image(whole)), Structure("a", grid.image(core))], series, path)


@pytest.mark.parametrize("write", [write_rtstruct, write_segmentation])
@pytest.mark.parametrize(
    ("charset", "patient", "name"),
    [
        ("ISO_IR 100", "Größe^Änne", "Größe"),
        ("ISO_IR 144", "Иванов^Пётр", "опухоль"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう", "腫瘍"),
        ("GB18030", "Wang^XiaoDong=王^小东", "肿瘤"),
        ("ISO_IR 192", "Müller^Jörg=患者", "GTV"),
    ],
)
def test_the_character_set_is_kept(write, charset, patient, name, tmp_path):
    write_series(tmp_path / "t1", oblique_grid())

    def change(image):
        image.SpecificCharacterSet, image.PatientName = charset, patient

    edit(tmp_path / "t1", change)
    [series] = find_series(tmp_path / "t1", "ann")
    grid = oblique_grid()
    write(grid.image(ring(grid)), series, tmp_path / "out.dcm", name=name)
    written = pydicom.dcmread(tmp_path / "out.dcm")
    assert written.SpecificCharacterSet == charset
    assert str(written.PatientName) == patient
    label = (
        written.StructureSetROISequence[0].ROIName
        if write is write_rtstruct
        else written.SegmentSequence[0].SegmentLabel
    )
    assert label == name


@pytest.mark.parametrize("write", [write_rtstruct, write_segmentation])
def test_headers_that_lack_or_hold_what_they_must_not(write, tmp_path):
    """Elements of type 2 are there, empty if the images have none; and pixels that cannot be decoded are not needed."""
    write_series(tmp_path / "t1", oblique_grid())

    def change(image):
        for keyword in ("PatientName", "PatientSex", "StudyTime", "AccessionNumber", "SpecificCharacterSet"):
            image.pop(keyword, None)
        image.StudyDate, image.PatientBirthDate, image.StudyID = "2001.03.04", "Secret", "x" * 30
        image.StudyInstanceUID, image.SliceThickness = "anon-1", -3
        image.file_meta.TransferSyntaxUID = pydicom.uid.RLELossless
        image.PixelData = pydicom.encaps.encapsulate([b"no pixels "])

    [series] = find_series(tmp_path / "t1", "ann")
    edit(tmp_path / "t1", change)
    grid = oblique_grid()
    write(grid.image(ring(grid)), series, tmp_path / "out.dcm")
    written = pydicom.dcmread(tmp_path / "out.dcm")
    for keyword in ("PatientName", "PatientSex", "StudyTime", "AccessionNumber", "StudyDate", "PatientBirthDate"):
        assert not written[keyword].value
    assert written.ReferringPhysicianName == ""
    with pydicom.config.disable_value_validation():
        assert (written.StudyID, written.StudyInstanceUID) == ("x" * 30, "anon-1")
    assert "SpecificCharacterSet" not in written


@pytest.mark.parametrize(("tumour", "thickness"), [([1, 2, 5], ("DS", 0)), ([4], ("LO", "5 mm"))])
def test_the_distance_of_slices_is_that_of_their_positions(tumour, thickness, tmp_path):
    write_series(tmp_path / "t1", oblique_grid())

    def change(image):
        image.SpacingBetweenSlices = 1
        image[0x00180050] = pydicom.DataElement(0x00180050, *thickness)

    edit(tmp_path / "t1", change)
    [series] = find_series(tmp_path / "t1", "ann")
    grid, mask = oblique_grid(), np.zeros(oblique_grid().shape, np.uint8)
    mask[tumour, 5:9, 5:9] = 1
    write_segmentation(grid.image(mask), series, tmp_path / "seg.dcm")
    written = pydicom.dcmread(tmp_path / "seg.dcm")
    measures = written.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert measures.SpacingBetweenSlices == pytest.approx(4)
    assert measures.SliceThickness == pytest.approx(4)
    # From the first slice with tumour to the last, those between included.
    frames = written.PerFrameFunctionalGroupsSequence
    origins = np.array([frame.PlanePositionSequence[0].ImagePositionPatient for frame in frames], float)
    np.testing.assert_allclose(np.sort(grid.indices(origins)[:, 2]), range(tumour[0], tumour[-1] + 1), atol=1e-3)


@pytest.mark.parametrize("write", [write_rtstruct, write_segmentation])
def test_a_wrong_file_is_not_kept(write, tmp_path, monkeypatch):
    write_series(tmp_path / "t1", oblique_grid())
    [series] = find_series(tmp_path / "t1", "ann")
    grid, path = oblique_grid(), tmp_path / "out.dcm"
    module = sys.modules[write.__module__]
    read = module._read
    monkeypatch.setattr(module, "_read", lambda *arguments: np.roll(read(*arguments), 1, axis=2))
    with pytest.raises(ValueError, match=r"'tumour': must be read back as it was written.*nothing was written"):
        write(grid.image(ring(grid)), series, path)
    monkeypatch.undo()
    # Images that are not where their grid is: here the spacing of rows and columns is swapped.
    edit(tmp_path / "t1", lambda image: setattr(image, "PixelSpacing", [1.0, 2.0]))
    monkeypatch.setattr(_dicom, "series_grid", lambda *arguments: (grid, series_grid(*arguments)[1]))
    with pytest.raises(ValueError, match=r"Received: slice 0 39 mm from where its image lies"):
        write(grid.image(ring(grid)), series, path)
    assert not path.exists()


def test_importing_loads_no_dicom_library():
    code = "import sys, keras_mmfnet.export; print({'pydicom', 'highdicom'} & set(sys.modules))"
    backend = {**os.environ, "KERAS_BACKEND": "numpy"}  # is there soonest
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=backend)
    assert done.stdout == "set()\n"
