import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_files import GRID, write_series

from keras_mmfnet.data.case import CaseError
from keras_mmfnet.data.dicom import find_series, read_series
from keras_mmfnet.data.geometry import Grid


def read(folder):
    [series] = find_series(folder, "ann")
    return read_series(series, "ann", sitk.sitkFloat32)


def refused(folder):
    with pytest.raises(CaseError) as caught:
        read(folder)
    message = str(caught.value)
    assert message.startswith(f"ann: {folder}")
    assert "Received: " in message
    return message


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("direction", [GRID.direction, (-1.0, 0, 0, 0, 0, -1.0, 0, -1.0, 0)])
def test_a_series_comes_back_by_position(direction, order, tmp_path):
    grid = Grid(GRID.size, GRID.spacing, GRID.origin, direction)
    array = write_series(tmp_path, grid=grid, order=order)
    image = read(tmp_path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array)
    found = Grid.from_image(image)
    assert found.matches(grid)
    np.testing.assert_allclose(found.direction, grid.direction, atol=1e-6)


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEGLSLossless", "DeflatedExplicitVRLittleEndian"])
def test_compressed_slices_of_16_bits(syntax, tmp_path):
    array = write_series(tmp_path / "Zoë", array=np.random.default_rng(0).integers(0, 1 << 16, GRID.shape))
    for path in (tmp_path / "Zoë").iterdir():
        image = pydicom.dcmread(path)
        if syntax.startswith("Deflated"):
            image.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        else:
            image.compress(getattr(pydicom.uid, syntax), generate_instance_uid=False)
        image.save_as(path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(tmp_path)), array)


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
def test_slices_compressed_by_simpleitk(kind, tmp_path):
    array = write_series(tmp_path)
    for path in tmp_path.iterdir():
        image, writer = sitk.ReadImage(str(path)), sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetUseCompression(True)
        writer.SetCompressor(kind)
        writer.SetFileName(str(path))
        writer.Execute(image)
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID.is_compressed
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(tmp_path)), array)


def test_series_are_found_wherever_they_lie(tmp_path):
    write_series(tmp_path / "study" / "1", description="T1 ax")
    write_series(tmp_path / "study" / "2", description="T2 ax")
    write_series(tmp_path / "study" / "2", description="T2 cor", prefix="other")
    (tmp_path / "study" / "notes.txt").write_text("a note")
    (tmp_path / "study" / "empty").touch()
    found = find_series(tmp_path, "ann")
    assert [(one.folder.name, one.description, len(one.files)) for one in found] == [
        ("1", "T1 ax", GRID.size[2]),
        ("2", "T2 ax", GRID.size[2]),
        ("2", "T2 cor", GRID.size[2]),
    ]


def test_two_patients_in_a_folder_are_refused_and_not_named(tmp_path):
    write_series(tmp_path / "1", patient="Anna")
    write_series(tmp_path / "2", patient="Bert")
    with pytest.raises(CaseError, match=r"must hold the DICOM files of one patient. Received: 2 different") as caught:
        find_series(tmp_path, "ann")
    assert "Anna" not in str(caught.value)


def test_a_missing_slice(tmp_path):
    write_series(tmp_path)
    (tmp_path / "slice_02.dcm").unlink()
    assert "a stack without a gap. Received: 8 mm from slice_01.dcm to slice_03.dcm, and 4 mm" in refused(tmp_path)


def test_a_slice_that_comes_twice(tmp_path):
    write_series(tmp_path)
    (tmp_path / "slice_02_copy.dcm").write_bytes((tmp_path / "slice_02.dcm").read_bytes())
    assert "one slice at each place. Received: slice_02.dcm and slice_02_copy.dcm" in refused(tmp_path)


def test_mixed_orientations(tmp_path):
    write_series(tmp_path, uid="1.2.3")
    turned = Grid(GRID.size, GRID.spacing, GRID.origin, (0, 0, 1.0, 1.0, 0, 0, 0, 1.0, 0))
    write_series(tmp_path, uid="1.2.3", grid=turned, prefix="turned")
    assert "slices of one orientation. Received: another one in turned_00.dcm" in refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (8, 6, 5)}, r"slices of one size. Received: (16, 12) and (8, 6) pixels (wrong_00.dcm)"),
        ({"spacing": (1.0, 1.0, 4.0)}, r"slices of one pixel size. Received: (0.5, 0.5) and (1.0, 1.0) mm"),
        ({"origin": (0.0, 3.0, 20.0)}, "slices one behind the other, as a tilted gantry's are not. Received: some"),
    ],
)
def test_slices_that_do_not_fit_together(change, message, tmp_path):
    write_series(tmp_path, uid="1.2.3")
    values = {**GRID.to_dict(), "origin": (0.0, 0.0, 20.0), **change}
    write_series(tmp_path, uid="1.2.3", grid=Grid.from_dict(values), prefix="wrong")
    assert message in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no DICOM", b"\0" * 128 + b"DICM" + b"\1" * 64])
def test_a_damaged_file(content, tmp_path):
    write_series(tmp_path)
    (tmp_path / "slice_02.dcm").write_bytes(content)
    assert "slice_02.dcm: must be a" in refused(tmp_path)


def test_an_empty_file_beside_slices_without_an_ending(tmp_path):
    write_series(tmp_path)
    for path in tmp_path.iterdir():
        path.rename(path.with_suffix(""))
    assert read(tmp_path).GetSize() == GRID.size
    (tmp_path / "slice_04").write_bytes(b"")
    with pytest.raises(CaseError, match=r"ann: .*slice_04: must be a slice.*Received: an empty file"):
        find_series(tmp_path, "ann")


def test_a_file_that_vanishes(tmp_path):
    write_series(tmp_path)
    [series] = find_series(tmp_path, "ann")
    (tmp_path / "slice_02.dcm").unlink()
    with pytest.raises(CaseError, match=r"ann: .*slice_02.dcm: must be a readable file. Received: No such file"):
        read_series(series, "ann")


def test_a_file_that_breaks_off(tmp_path):
    write_series(tmp_path)
    path = tmp_path / "slice_02.dcm"
    path.write_bytes(path.read_bytes()[:-100])
    assert "Received: " in refused(tmp_path)


@pytest.mark.parametrize(
    "syntax", [pydicom.uid.ImplicitVRLittleEndian, pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ExplicitVRBigEndian]
)
def test_an_element_longer_than_the_file(syntax, tmp_path):
    """Also one within a sequence; what it claims is not made room for."""
    write_series(tmp_path)
    path = tmp_path / "slice_02.dcm"
    image, code = pydicom.dcmread(path), pydicom.Dataset()
    code.add_new(0x00420011, "OB", b"inner__")
    image.ConceptCodeSequence = [code]
    image.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(path, image, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    order = "little" if syntax.is_little_endian else "big"
    assert len(find_series(tmp_path, "ann")) == 1
    content = path.read_bytes()
    length = content.index(b"inner__") - 4
    path.write_bytes(content[:length] + (0x7FFFFFFE).to_bytes(4, order) + content[length + 4 :])
    with pytest.raises(CaseError, match=r"slice_02.dcm: must be an .*Received: an element of 2147483646 bytes"):
        find_series(tmp_path, "ann")


def test_a_structure_set_is_passed_over(tmp_path):
    write_series(tmp_path)
    (tmp_path / "rs.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"UI\x1e\x001.2.840.10008.5.1.4.1.1.481.3\0")
    assert len(read(tmp_path).GetSize()) == 3


def test_real_oblique_series(test_data):
    for series in find_series(test_data / "brainix", "ann"):
        image = read_series(series, "ann")
        expected = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(series.folder)))
        assert Grid.from_image(image).matches(Grid.from_image(expected))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(expected))
