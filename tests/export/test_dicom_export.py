import builtins
import os
import subprocess
import sys

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_files import write_series
from matplotlib.path import Path as Polygon

from keras_mmfnet.data.dicom import find_series, read_series
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.export import write_rtstruct, write_segmentation
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


def filled(structures, grid):
    """The voxels whose centres the contours enclose; a contour within a contour is a hole."""
    found = np.zeros(grid.shape, bool)
    pixels = np.moveaxis(np.indices(grid.shape[1:])[::-1], 0, -1).reshape(-1, 2)
    for contour in structures.ROIContourSequence[0].ContourSequence:
        points = grid.indices(np.reshape(np.array(contour.ContourData, float), (-1, 3)))
        slices = np.unique(np.rint(points[:, 2]).astype(int))
        assert len(slices) == 1
        np.testing.assert_allclose(points[:, 2], slices[0], atol=0.01)
        found[slices[0]] ^= Polygon(points[:, :2]).contains_points(pixels).reshape(grid.shape[1:])
    return found


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
    back = filled(structures, grid)
    eroded, dilated = (
        sitk.GetArrayFromImage(kind(mask, [1, 1, 0])) > 0 for kind in (sitk.BinaryErode, sitk.BinaryDilate)
    )
    assert not (eroded & ~back).any()
    assert not (back & ~dilated).any()


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
def test_what_cannot_be_written(write, tmp_path, monkeypatch):
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

    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("pydicom", "highdicom"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install keras-mmfnet\[dicom\]"):
        write(mask, series, out)
    assert not out.exists()


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


def test_importing_loads_no_dicom_library():
    code = "import sys, keras_mmfnet.export; print({'pydicom', 'highdicom'} & set(sys.modules))"
    backend = {**os.environ, "KERAS_BACKEND": "numpy"}  # is there soonest
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=backend)
    assert done.stdout == "set()\n"
