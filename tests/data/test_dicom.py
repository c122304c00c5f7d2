import gzip
import hashlib
import io
import shutil
import uuid

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_files import GRID, change_series, find_series, item, write_enhanced, write_object, write_series

from keras_mmfnet.data._dicom_header import not_dicom
from keras_mmfnet.data.case import CaseError
from keras_mmfnet.data.dicom import SEGMENTATIONS, STRUCTURE_SET, find_objects, read_series, series_grid, walk_files
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


def compress_by_simpleitk(folder, kind):
    for path in folder.iterdir():
        image, writer = sitk.ReadImage(str(path)), sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetUseCompression(True)
        writer.SetCompressor(kind)
        writer.SetFileName(str(path))
        writer.Execute(image)
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID.is_compressed


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
def test_slices_compressed_by_simpleitk(kind, tmp_path):
    array = write_series(tmp_path)
    compress_by_simpleitk(tmp_path, kind)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(tmp_path)), array)


def change_frame(path, change):
    """Replaces the compressed image in a file by the fragments that `change(image)` gives."""
    image = pydicom.dcmread(path)
    frame = b"".join(pydicom.encaps.generate_frames(image.PixelData, number_of_frames=1))
    items = [b"", *(some + bytes(len(some) % 2) for some in change(frame))]
    image.PixelData = b"".join(b"\xfe\xff\0\xe0" + len(some).to_bytes(4, "little") + some for some in items)
    image.save_as(path)


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000", "JPEGLSLossless", "RLELossless"])
def test_compressed_voxels_that_break_off(kind, tmp_path):
    """Of some streams, GDCM takes what is missing for 0; a truncated RLE stream may end the process."""
    array = write_series(
        tmp_path, Grid((64, 48, 3), *[getattr(GRID, name) for name in ("spacing", "origin", "direction")])
    )
    if kind.endswith("Lossless"):
        change_series(
            tmp_path, lambda image, _: image.compress(getattr(pydicom.uid, kind), generate_instance_uid=False)
        )
    else:
        compress_by_simpleitk(tmp_path, kind)
    path = tmp_path / "slice_01.dcm"
    whole = path.read_bytes()
    for change in (
        lambda frame: [frame + bytes(20)],
        lambda frame: [frame[:200], frame[200:1000], frame[1000:]],
    ):
        change_frame(path, change)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read(tmp_path)), array)
        path.write_bytes(whole)
    for cut in (4, 10, 100, 2000):
        for change in (
            lambda frame, cut=cut: [frame[:-cut]],
            lambda frame, cut=cut: [frame[:200], frame[200:-cut]],
        ):
            change_frame(path, change)
            message = refused(tmp_path)
            assert "slice_01.dcm: must be an undamaged DICOM file. Received: " in message
            assert kind == "RLELossless" or "compressed voxels that break off: 0 of 1 images" in message
            path.write_bytes(whole)


def test_frames_that_are_compressed_end_each(tmp_path):
    array = np.random.default_rng(0).integers(0, 1000, (3, 12, 16))
    write_enhanced(tmp_path / "frames.dcm", [{"position": (0, 0, 4 * n)} for n in range(3)], array)
    image = pydicom.dcmread(tmp_path / "frames.dcm")
    image.compress(pydicom.uid.JPEGLSLossless, generate_instance_uid=False)
    image.save_as(tmp_path / "frames.dcm")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(tmp_path)), array)
    frames = [*pydicom.encaps.generate_frames(image.PixelData, number_of_frames=3)]
    image.PixelData = pydicom.encaps.encapsulate([frames[0], frames[1][:-10], frames[2]])
    image.save_as(tmp_path / "frames.dcm")
    assert "Received: compressed voxels that break off: 2 of 3 images end with a marker" in refused(tmp_path)


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


def test_a_file_that_is_there_twice_counts_once(tmp_path):
    array = write_series(tmp_path)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "slice_02.dcm").write_bytes((tmp_path / "slice_02.dcm").read_bytes())
    image = pydicom.dcmread(tmp_path / "slice_01.dcm")
    image.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    image.save_as(tmp_path / "copy" / "compressed.dcm")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(tmp_path)), array)


@pytest.mark.parametrize("change", ["voxels", "uid"])
def test_two_slices_at_one_place(change, tmp_path):
    """Also of one SOPInstanceUID, as careless software gives them, where the voxels differ."""
    write_series(tmp_path)
    image = pydicom.dcmread(tmp_path / "slice_02.dcm")
    if change == "uid":
        image.SOPInstanceUID += ".1"
    else:
        image.PixelData = image.PixelData[::-1]
    image.save_as(tmp_path / "slice_02_copy.dcm")
    assert "one slice at each place" in (message := refused(tmp_path))
    assert "Received: slice_02.dcm and slice_02_copy.dcm" in message


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


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: hashlib.md5(name.encode()).hexdigest(),
        lambda name: hashlib.sha256(name.encode()).hexdigest()[:8].upper(),
        lambda name: str(uuid.uuid5(uuid.NAMESPACE_OID, name)),
    ],
)
@pytest.mark.parametrize("content", [b"", b"<html>404", gzip.compress(b"a slice")], ids=["empty", "html", "gzipped"])
def test_outer_slices_named_by_hashes(content, renamed, tmp_path):
    write_series(tmp_path)
    paths = [path.rename(tmp_path / renamed(path.name)) for path in sorted(tmp_path.iterdir())]
    assert read(tmp_path).GetSize() == GRID.size
    for path in paths[-2:]:
        path.write_bytes(content)
    with pytest.raises(CaseError, match=r"ann: .*: must be a slice, as the files beside it. Received: ") as caught:
        read(tmp_path)
    assert any(path.name in str(caught.value) for path in paths[-2:])


@pytest.mark.parametrize("ending", [".dcm", ""])
def test_outer_slices_that_are_gzipped(ending, tmp_path):
    write_series(tmp_path)
    for path in tmp_path.iterdir():
        path.rename(path.with_suffix(ending))
    path = tmp_path / f"slice_00{ending}"
    (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    # An image beside them is none of them.
    (tmp_path / "mask.nii.gz").write_bytes(gzip.compress(b"an image"))
    with pytest.raises(CaseError, match=rf"slice_00{ending}.gz: must be a slice, .*Received: gzipped DICOM"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "received"),
    [
        (lambda content: content[128:], "DICOM that does not begin with 128 bytes and DICM"),
        (lambda content: bytes(512) + content, r"one that starts with b'\x00"),
        (gzip.compress, "gzipped DICOM, which must be unpacked"),
    ],
)
def test_a_folder_of_files_that_are_no_dicom(change, received, tmp_path, caplog):
    write_series(tmp_path / "T1", description="T1")
    write_series(tmp_path / "T2", description="T2")
    for path in sorted((tmp_path / "T1").iterdir()):
        path.with_suffix("").write_bytes(change(path.read_bytes()))
        path.unlink()
    for name in ("README", "notes_1.txt", "mask_1.nii.gz"):
        (tmp_path / "T2" / name).write_bytes(b"text")
    assert [one.description for one in find_series(tmp_path, "ann")] == ["T2"]
    [message] = caplog.messages
    assert message.startswith(f"ann: {tmp_path / 'T1'}: not read, passed over: 5 files (slice_00 is {received}")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[128:],
        lambda content: bytes(128) + content[132:],
        lambda content: bytes(128) + without_preamble(content, "implicit"),
        gzip.compress,
    ],
)
def test_dicom_in_a_form_that_is_not_read_is_named(change, tmp_path, caplog):
    """Whatever the file is called, it may be a slice."""
    write_series(tmp_path / "T1")
    for name in ("T1/slice_00.dcm", "T1/slice_04.dcm"):
        path = tmp_path / name
        path.with_name("last" if "4" in name else "first").write_bytes(change(path.read_bytes()))
        path.unlink()
    with pytest.raises(CaseError, match=r"ann: .*first: must be a slice, as .* Received: (gzipped DICOM|DICOM that)"):
        read(tmp_path)
    (tmp_path / "other").mkdir()
    for name in ("first", "last"):
        (tmp_path / "T1" / name).rename(tmp_path / "other" / name)
    assert read(tmp_path).GetSize()[2] == 3
    assert f"{tmp_path / 'other'}: not read, passed over: 2 files (first is " in caplog.messages[-1]


def test_a_gzipped_file_is_dicom_by_what_is_in_it(tmp_path):
    write_series(tmp_path)
    content = (tmp_path / "slice_00.dcm").read_bytes()
    for some, received in (
        (gzip.compress(content), "gzipped DICOM, which must be unpacked"),
        (gzip.compress(without_preamble(content, "implicit")), "gzipped DICOM, which must be unpacked"),
        (gzip.compress(b"text" * 99), "a gzipped file"),
        (gzip.compress(content)[:15], "a gzipped file"),
        (b"\x1f\x8b" + b"damaged" * 9, "a gzipped file"),
    ):
        (tmp_path / "file").write_bytes(some)
        assert not_dicom(tmp_path / "file") == received


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
        read(tmp_path)


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


def test_voxels_that_lack(tmp_path):
    """GDCM takes them for 0."""
    write_series(tmp_path)
    image = pydicom.dcmread(tmp_path / "slice_02.dcm")
    image.PixelData = image.PixelData[:-2]
    image.save_as(tmp_path / "slice_02.dcm")
    assert "Received: voxels of 382 bytes, where the header tells of 384" in refused(tmp_path)


@pytest.mark.parametrize(
    "syntax", [pydicom.uid.ImplicitVRLittleEndian, pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ExplicitVRBigEndian]
)
def test_an_element_longer_than_the_file(syntax, tmp_path):
    """What it claims is not made room for; one within a sequence that nobody asks for does no harm."""
    write_series(tmp_path)
    path = tmp_path / "slice_02.dcm"
    image, code = pydicom.dcmread(path), pydicom.Dataset()
    code.add_new(0x00420011, "OB", b"inner__")
    image.ConceptCodeSequence = [code]
    image.add_new(0x00111001, "OB", b"outer__")
    image.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(path, image, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    order = "little" if syntax.is_little_endian else "big"
    for name in (b"inner__", b"outer__"):
        assert read(tmp_path).GetSize() == GRID.size
        content = path.read_bytes()
        length = content.index(name) - 4
        path.write_bytes(content[:length] + (0x7FFFFFFE).to_bytes(4, order) + content[length + 4 :])
    with pytest.raises(CaseError, match=r"slice_02.dcm: must be an .*Received: an element of 2147483646 bytes"):
        read(tmp_path)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("inverted", [False, True])
def test_voxels_of_twelve_bits(signed, inverted, tmp_path):
    """The bits beside them do not count; MONOCHROME1 is inverted, as by GDCM."""
    array = np.random.default_rng(0).integers(-2048 if signed else 0, 2048 if signed else 4096, GRID.shape)
    write_series(tmp_path, array=(array & 0x0FFF) | 0x5000)

    def change(image, _):
        image.BitsStored, image.HighBit, image.PixelRepresentation = 12, 11, int(signed)
        image.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"

    change_series(tmp_path, change)
    expected = (-1 if signed else 4095) - array if inverted else array
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(tmp_path)), expected)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"BitsStored": 12, "HighBit": 15}, "HighBit is BitsStored - 1. Received: HighBit 15 and BitsStored 12"),
        (
            {"ModalityLUTSequence": item(LUTDescriptor=[4, 0, 16], LUTData=bytes(8), ModalityLUTType="US")},
            "a rescale slope and intercept, if any. Received: a ModalityLUTSequence",
        ),
    ],
)
def test_voxels_that_are_stored_in_rare_ways(change, message, compressed, tmp_path):
    write_series(tmp_path)

    def changed(image, _):
        if compressed:
            image.compress(pydicom.uid.RLELossless)
        for name, value in change.items():
            setattr(image, name, value)

    change_series(tmp_path, changed)
    with pytest.raises(CaseError, match=rf"ann: .*slice_0\d.dcm: must be an image .*{message}"):
        read(tmp_path)


# --- what is no image


def make_explicit(image, _):
    image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian


NO_IMAGES = {
    "RT Structure Set Storage": "1.2.840.10008.5.1.4.1.1.481.3",
    "Segmentation Storage": "1.2.840.10008.5.1.4.1.1.66.4",
    "Raw Data Storage": "1.2.840.10008.5.1.4.1.1.66",
    "MR Spectroscopy Storage": "1.2.840.10008.5.1.4.1.1.4.2",
    "Grayscale Softcopy Presentation State Storage": "1.2.840.10008.5.1.4.1.1.11.1",
    "Basic Text SR Storage": "1.2.840.10008.5.1.4.1.1.88.11",
    "12-lead ECG Waveform Storage": "1.2.840.10008.5.1.4.1.1.9.1.1",
    "1.3.12.2.1107.5.9.1": "1.3.12.2.1107.5.9.1",
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_objects_without_an_image_are_passed_over_with_a_count(name, tmp_path, caplog):
    array = write_series(tmp_path)
    for number in range(2):
        write_object(tmp_path / f"other_{number}.dcm", NO_IMAGES[name], PatientID="another")
    with caplog.at_level("INFO"):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read(tmp_path)), array)
    masks = ("RT Structure Set Storage", "Segmentation Storage")
    passed = f"passed over: 2 {name} (other_0.dcm, ...)" in caplog.text
    assert passed == (name not in masks)
    assert find_objects(tmp_path, "ann")[1] == {NO_IMAGES[name]: [tmp_path / f"other_{n}.dcm" for n in range(2)]}


@pytest.mark.parametrize("syntax", [pydicom.uid.ImplicitVRLittleEndian, pydicom.uid.ExplicitVRLittleEndian])
@pytest.mark.parametrize("undefined", [False, True])
def test_a_reference_to_an_object_without_an_image_changes_nothing(undefined, syntax, tmp_path):
    array = write_series(tmp_path)

    def refer(image, _):
        image.ReferencedImageSequence = item(
            ReferencedSOPClassUID=NO_IMAGES["RT Structure Set Storage"],
            SOPClassUID=NO_IMAGES["RT Structure Set Storage"],  # not the image's own
            PixelSpacing=[9, 9],
        )
        image["ReferencedImageSequence"].is_undefined_length = undefined
        image.ReferencedImageSequence[0].is_undefined_length_sequence_item = undefined
        image.file_meta.TransferSyntaxUID = syntax

    change_series(tmp_path, refer)
    image = read(tmp_path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array)
    assert Grid.from_image(image).matches(GRID)


def test_a_private_sequence_of_unknown_representation(tmp_path):
    """Of undefined length, its content is implicit in a file that is explicit; GDCM reads it."""
    write_series(tmp_path)
    change_series(tmp_path, make_explicit)
    inner = b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + b"\x19\x00\x02\x10\x04\x00\x00\x00text"
    inner += b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        place = content.index(b"\x20\x00\x0d\x00UI")
        path.write_bytes(content[:place] + b"\x19\x00\x01\x10UN\0\0\xff\xff\xff\xff" + inner + content[place:])
    assert Grid.from_image(read(tmp_path)).matches(GRID)


def test_the_encoding_of_a_description(tmp_path):
    write_series(tmp_path)

    def change(image, _):
        image.SpecificCharacterSet, image.SeriesDescription = "ISO_IR 100", "T1 Größe"

    change_series(tmp_path, change)
    assert find_series(tmp_path, "ann")[0].description == "T1 Größe"


# --- files


def without_preamble(content, kind):
    if kind == "meta header":
        return content[132:]
    image = pydicom.dcmread(io.BytesIO(content))
    buffer = io.BytesIO()
    pydicom.dcmwrite(
        buffer, pydicom.Dataset(image), implicit_vr=kind == "implicit", little_endian=True, enforce_file_format=False
    )
    return (b"\0" * 128 + b"DICM" if kind == "preamble" else b"") + buffer.getvalue()


@pytest.mark.parametrize("ending", [".dcm", ""])
@pytest.mark.parametrize("kind", ["implicit", "explicit", "meta header", "preamble"])
def test_files_without_preamble_or_meta_header(kind, ending, tmp_path):
    array = write_series(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        path.unlink()
        # Some in a series of whole ones.
        path.with_suffix(ending).write_bytes(without_preamble(content, kind) if "_02" not in path.name else content)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(tmp_path)), array)


@pytest.mark.parametrize(
    ("name", "content"),
    [("slice_05", b"damaged" * 99), ("slice_05", b"\0\10\0\5" + b"\0" * 400), ("slice_05", b"DICM" + b"\10" * 99)],
)
def test_a_file_called_as_a_slice_is_never_dropped(name, content, tmp_path):
    write_series(tmp_path)
    for path in tmp_path.iterdir():
        path.rename(path.with_suffix(""))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CaseError, match=r"ann: .*slice_05: must be .*Received: "):
        read(tmp_path)


def test_a_slice_that_is_a_broken_link(tmp_path):
    write_series(tmp_path / "a")
    (tmp_path / "a" / "slice_05.dcm").symlink_to(tmp_path / "gone")
    with pytest.raises(CaseError, match=r"cannot be read \(No such file"):
        read(tmp_path)


def test_other_files_do_no_harm(tmp_path):
    array = write_series(tmp_path / "a" / "b")
    for name in ("Thumbs.db", ".DS_Store", "._slice_00.dcm", "README", "notes.txt", "../__MACOSX/._slice.dcm"):
        (tmp_path / "a" / "b" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / "b" / name).write_bytes(b"" if name in ("Thumbs.db", "README") else b"text")
    write_object(tmp_path / "a" / "DICOMDIR", "1.2.840.10008.1.3.10")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(tmp_path)), array)


def test_links_are_followed_and_cycles_are_not(tmp_path):
    write_series(tmp_path / "archive" / "x")
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "T1").symlink_to(tmp_path / "archive" / "x")
    (tmp_path / "archive" / "x" / "up").symlink_to(tmp_path / "ann")
    (tmp_path / "archive" / "x" / "here").symlink_to(".")
    assert [path.name for path in walk_files(tmp_path / "ann")] == [f"slice_{n:02d}.dcm" for n in range(5)]
    [series] = find_series(tmp_path / "ann", "ann")
    assert series.folder == tmp_path / "ann" / "T1"
    assert read_series(series, "ann").GetSize() == GRID.size


@pytest.mark.parametrize("damage", ["content", "element", "meta"])
def test_a_fault_in_a_series_nobody_asked_for_stops_nothing(damage, tmp_path, caplog):
    """In one folder, where the series is known; another folder otherwise."""
    write_series(tmp_path, description="T1")
    other = tmp_path if damage == "element" else tmp_path / "other"
    write_series(other, description="DWI", prefix="dwi")
    change_series(other, make_explicit)
    path = other / "dwi_04.dcm"
    content = path.read_bytes()
    if damage == "element":
        place = content.index(b"\x28\x00\x11\x00US")
        content = content[:place] + b"\x28\x00\x12\x00OB\0\0\xfe\xff\xff\x7f" + content[place:]
    path.write_bytes({"content": b"text", "element": content, "meta": b"\0" * 128 + b"DICM" + b"\1" * 9}[damage])
    dwi, t1 = find_series(tmp_path, "ann") if damage == "element" else find_series(tmp_path, "ann")[::-1]
    assert (dwi.description, t1.description) == ("DWI", "T1")
    assert read_series(t1, "ann").GetSize() == GRID.size
    with pytest.raises(CaseError, match=r"dwi_04.dcm: must be"):
        series_grid(dwi, "ann")


def test_a_folder_in_which_no_dicom_file_can_be_read(tmp_path):
    (tmp_path / "a.dcm").write_bytes(b"text")
    with pytest.raises(CaseError, match=r"a.dcm: must be a DICOM file. Received: one that starts with b'text'"):
        find_series(tmp_path, "ann")


# --- geometry


@pytest.mark.parametrize("name", ["PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"])
@pytest.mark.parametrize("how", ["missing", "empty", "text"])
def test_geometry_is_never_guessed(name, how, tmp_path):
    write_series(tmp_path)
    for path in tmp_path.iterdir():
        image = pydicom.dcmread(path)
        del image[name]
        if how != "missing":
            values = ["one"] * 6 if how == "text" else None
            element = pydicom.DataElement(name, "LO", values)
            image.add(element)
        image.save_as(path)
    assert f"slice_00.dcm: must be an image with {name}. Received: a header in which it is missing" in refused(tmp_path)


@pytest.mark.parametrize("name", ["SpacingBetweenSlices", "SliceThickness"])
@pytest.mark.parametrize("value", [0, -4, 1, 100, None])
def test_the_distance_of_slices_is_that_of_their_positions(name, value, tmp_path):
    array = write_series(tmp_path)
    change_series(tmp_path, lambda image, _: setattr(image, name, value))
    image = read(tmp_path)
    assert Grid.from_image(image).matches(GRID)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array)


def test_a_single_slice_has_the_thickness_it_says(tmp_path):
    write_series(tmp_path, grid=GRID.crop((0, 0, 0), (1, 12, 16)))
    assert "several slices, or one with a SliceThickness" in refused(tmp_path)
    change_series(tmp_path, lambda image, _: setattr(image, "SliceThickness", 3.5))
    assert read(tmp_path).GetSpacing() == (0.5, 0.5, 3.5)


@pytest.mark.parametrize(("step", "decimals", "degrees"), [(0.9, 1, 20), (0.9, 2, 20), (6.6, 0, 0), (6.6, 1, 33)])
def test_rounded_positions_are_judged_against_the_whole_line(step, decimals, degrees, tmp_path):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    grid = Grid((16, 12, 22), (0.5, 0.5, step), (3.0, 7.0, -11.0), (1.0, 0, 0, 0, c, -s, 0, s, c))
    write_series(tmp_path, grid=grid)

    def change(image, _):
        image.ImagePositionPatient = [round(float(x), decimals) for x in image.ImagePositionPatient]

    change_series(tmp_path, change)
    found = Grid.from_image(read(tmp_path))
    corners = np.array([(0, 0, 0), (0, 0, 21), (15, 11, 0), (15, 11, 21)])
    off = np.linalg.norm(found.positions(corners) - grid.positions(corners), axis=1)
    assert off.max() < 0.5 * 10.0**-decimals


@pytest.mark.parametrize("start", [0, 0.25, -60.4])
@pytest.mark.parametrize("degrees", [0, 10, 33])
@pytest.mark.parametrize("step", [2.3, 3.3, 3.9, 4.1, 6.1])
def test_positions_in_whole_mm(step, degrees, start, tmp_path):
    """The rounding and the error of the fit add up to more than half a mm; a missing slice is one all the same."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    grid = Grid((16, 12, 30), (0.5, 0.5, step), (start, start, start), (1.0, 0, 0, 0, c, -s, 0, s, c))
    write_series(tmp_path, grid=grid)
    change_series(
        tmp_path, lambda image, _: setattr(image, "ImagePositionPatient", np.rint(image.ImagePositionPatient).tolist())
    )
    found, centres = Grid.from_image(read(tmp_path)), np.array([(8, 6, 0), (8, 6, 29)])
    off = np.linalg.norm(found.positions(centres) - grid.positions(centres), axis=1)
    assert off.max() < 0.5 * 3**0.5
    (tmp_path / "slice_14.dcm").unlink()
    assert "a stack without a gap" in refused(tmp_path)


@pytest.mark.parametrize("moved", [(0, 0, 2), (1, 0, 0), (0, -2, 0)])
def test_what_rounding_to_whole_mm_does_not_explain(moved, tmp_path):
    write_series(tmp_path, grid=Grid((16, 12, 22), (0.5, 0.5, 5.0), GRID.origin, GRID.direction))

    def change(image, number):
        image.ImagePositionPatient = list(np.array([0, 0, 5 * number]) + np.array(moved) * (number == 9))

    change_series(tmp_path, change)
    assert "must be slices " in refused(tmp_path)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (
            [0, 5, 11, 16, 22, 27],
            "slices at equal distances, to within 0.5 mm. Received: ",
        ),  # two stacks that interleave
        ([0, 5, 10, 17, 22, 27], "slices at equal distances, to within 0.5 mm. Received: 7 mm from slice_02"),
        ([0, 5, 10, 22, 27, 32], "a stack without a gap. Received: 12 mm from slice_02"),
        ([0, 0.9, 2.7, 3.6, 4.5, 5.4], "a stack without a gap. Received: 1.8 mm from slice_01"),
    ],
)
def test_slices_at_other_places(offsets, message, tmp_path):
    write_series(tmp_path, grid=Grid((16, 12, 6), GRID.spacing, GRID.origin, GRID.direction))
    change_series(tmp_path, lambda image, n: setattr(image, "ImagePositionPatient", [0, 0, offsets[n]]))
    assert message in refused(tmp_path)


@pytest.mark.parametrize(("degrees", "read_"), [(0.3, True), (10, False)])
def test_a_tilt(degrees, read_, tmp_path):
    write_series(tmp_path, grid=Grid((16, 12, 22), (0.5, 0.5, 6.0), GRID.origin, GRID.direction))
    tilt = np.tan(np.radians(degrees))
    change_series(tmp_path, lambda image, n: setattr(image, "ImagePositionPatient", [0, 6 * n * tilt, 6 * n]))
    if read_:
        # The middle is where it was, and the ends are half as far off.
        np.testing.assert_allclose(read(tmp_path).GetOrigin(), (0, 63 * tilt, 0), atol=1e-6)
    else:
        assert "slices one behind the other" in refused(tmp_path)


@pytest.mark.parametrize(
    ("orientation", "message"),
    [((0.98, 0, 0, 0, 0.98, 0), None), ((1, 0.01, 0, 0, 1, 0), None), ((1, 0.1, 0, 0, 1, 0), "at right angles")],
)
def test_an_orientation_that_is_not_orthonormal(orientation, message, tmp_path):
    write_series(tmp_path)
    change_series(tmp_path, lambda image, _: setattr(image, "ImageOrientationPatient", list(orientation)))
    if message:
        assert message in refused(tmp_path)
    else:
        direction = np.reshape(read(tmp_path).GetDirection(), (3, 3))
        np.testing.assert_allclose(direction.T @ direction, np.eye(3), atol=1e-6)


def test_each_slice_has_a_slope_of_its_own(tmp_path):
    """SimpleITK takes the pixel type of the first one."""
    array = write_series(tmp_path)

    def change(image, number):
        image.RescaleSlope, image.RescaleIntercept = 1 + number / 4, -number / 8

    change_series(tmp_path, change)
    [series] = find_series(tmp_path, "ann")
    slopes = np.arange(5)[:, None, None]
    for pixel_type in (sitk.sitkUnknown, sitk.sitkFloat32):
        found = sitk.GetArrayFromImage(read_series(series, "ann", pixel_type))
        np.testing.assert_allclose(found, array * (1 + slopes / 4) - slopes / 8)


# --- several images in one series


@pytest.mark.parametrize(
    ("name", "values", "labels"),
    [
        ("EchoTime", (15, 90), ["echo 15", "echo 90"]),
        ("TemporalPositionIdentifier", (1, 2), ["phase 1", "phase 2"]),
        ("DiffusionBValue", (0.0, 1000.0), ["b-value 0", "b-value 1000"]),
        ("AcquisitionNumber", (1, 2), ["acquisition 1", "acquisition 2"]),
        ("AcquisitionTime", ("101112.5", "101113.5"), ["time 101112.5", "time 101113.5"]),
        ("SequenceName", ("*ep_b0", "*ep_b1000t"), ["sequence *ep_b0", "sequence *ep_b1000t"]),
        ("ImageType", (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]), ["type ORIGINAL\\PRIMARY\\M", "P"]),
    ],
)
def test_several_images_in_one_series_are_told_apart(name, values, labels, tmp_path):
    arrays = [write_series(tmp_path / str(n), uid="1.2.3", seed=n) for n in range(2)]
    for number, value in enumerate(values):

        def change(image, _, value=value, number=number):
            setattr(image, name, value)
            image.SOPInstanceUID += f".{number}"
            image.SeriesNumber, image.SeriesTime = 7, "143334.39"

        change_series(tmp_path / str(number), change)
    found = find_series(tmp_path, "ann")
    assert [one.label.startswith("number 7, 14:33:34, ") for one in found] == [True, True]
    for one, array, label in zip(found, arrays, labels, strict=True):
        assert one.label.endswith(label)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_series(one, "ann")), array)


def test_acquisitions_of_one_stack_are_one_image(tmp_path):
    """Scanners take the odd slices first, and the even ones as another acquisition."""
    write_series(tmp_path)
    change_series(tmp_path, lambda image, number: setattr(image, "AcquisitionNumber", number % 2))
    assert read(tmp_path).GetSize() == GRID.size


@pytest.mark.parametrize(("name", "first", "step"), [("EchoTime", 12, 0.01), ("TemporalPositionIdentifier", 1, 1)])
def test_what_differs_from_slice_to_slice_divides_no_stack(name, first, step, tmp_path):
    write_series(tmp_path)
    change_series(tmp_path, lambda image, number: setattr(image, name, first + step * number))
    [series] = find_series(tmp_path, "ann")
    assert series_grid(series, "ann")[0].matches(GRID)
    assert "phase" not in series.label


@pytest.mark.parametrize(("times", "number"), [((15, 90), 2), ((1.2, 1.9), 1)])
def test_echoes_with_times_that_differ_from_slice_to_slice(times, number, tmp_path):
    """Where not even their places tell them apart, they are refused."""
    arrays = [write_series(tmp_path / str(n), uid="1.2.3", seed=n) for n in range(2)]
    for folder, time in enumerate(times):

        def change(image, slice_, time=time, folder=folder):
            image.EchoTime, image.SOPInstanceUID = time + 0.01 * slice_, f"{image.SOPInstanceUID}.{folder}"

        change_series(tmp_path / str(folder), change)
    found = find_series(tmp_path, "ann")
    assert len(found) == number
    if number == 1:
        with pytest.raises(CaseError, match="cannot be told apart"):
            read_series(found[0], "ann")
        return
    for one, array in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_series(one, "ann")), array)


@pytest.mark.parametrize("name", ["RescaleSlope", "RescaleIntercept"])
def test_a_slope_that_is_no_number_is_refused(name, tmp_path):
    write_series(tmp_path)

    def change(image, number):
        image.RescaleSlope, image.RescaleIntercept = 2, 0
        if number == 2:
            image[name]._value = "1,5x"

    with pydicom.config.disable_value_validation():
        change_series(tmp_path, change)
    with pytest.raises(CaseError, match=r"slice_02.dcm: must be a rescale slope .* numbers. Received: '1,5x'"):
        read_series(find_series(tmp_path, "ann")[0], "ann")


def test_two_series_of_one_uid_are_not_mixed(tmp_path):
    write_series(tmp_path, uid="1.2.3", description="T1")
    further = Grid(GRID.size, GRID.spacing, (0.0, 0.0, 20.0), GRID.direction)
    write_series(tmp_path, uid="1.2.3", description="T2", grid=further, prefix="other")
    assert [(one.description, len(one.files)) for one in find_series(tmp_path, "ann")] == [("T1", 5), ("T2", 5)]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (
            {"SeriesDate": None, "StudyDate": None},
            ["number 7", "number 7, 1.2.0", "number 7, 1.2.1"],
        ),
        ({"SeriesDate": "20200102"}, ["number 7", "number 7, 2020-01-02, 1.2.0", "number 7, 2020-01-02, 1.2.1"]),
        ({"StudyDate": "20200102", "SeriesDate": None}, None),
    ],
)
def test_a_series_that_is_repeated_is_told_by_date_or_uid(values, labels, tmp_path):
    """Those of other descriptions keep their short labels."""
    for number, description in enumerate(("T1", "T1", "FLAIR")):
        write_series(tmp_path / str(number), description=description, uid=f"1.2.{number}")

        def change(image, _, number=number):
            image.SeriesNumber = 7
            for name, value in values.items():
                setattr(image, name, value and (value if labels else f"{int(value) + number}"))

        change_series(tmp_path / str(number), change)
        for path in (tmp_path / str(number)).iterdir():
            path.rename(tmp_path / f"{number}_{path.name}")
    found = [one.label for one in find_series(tmp_path, "ann")]
    assert found == (labels or ["number 7", "number 7, 2020-01-02", "number 7, 2020-01-03"])


@pytest.mark.parametrize("apart", [lambda n: n % 2, lambda n: n > 0, lambda n: n])
def test_slices_of_several_frames_of_reference(apart, tmp_path):
    write_series(tmp_path)
    change_series(tmp_path, lambda image, n: setattr(image, "FrameOfReferenceUID", f"1.2.{int(apart(n))}"))
    assert "slices of one frame of reference; " in (message := refused(tmp_path))
    assert "FrameOfReferenceUIDs (slice_00.dcm, slice_01.dcm" in message


def test_frames_of_reference_of_the_images_in_one_series(tmp_path):
    """Blanks do not count, and each image may have one of its own; nor does it matter where it is missing."""
    for n in range(2):
        write_series(tmp_path / str(n), uid="1.2.3", seed=n)

        def change(image, slice_, n=n):
            image.TemporalPositionIdentifier, image.SOPInstanceUID = n + 1, f"{image.SOPInstanceUID}.{n}"
            image.FrameOfReferenceUID = f"1.2.{n}{' ' * (slice_ == 2)}" if slice_ != 3 else ""

        with pydicom.config.disable_value_validation():
            change_series(tmp_path / str(n), change)
    found = find_series(tmp_path, "ann")
    assert [one.frame_of_reference for one in found] == ["1.2.0", "1.2.1"]
    assert [read_series(one, "ann").GetSize() for one in found] == [GRID.size] * 2


def test_a_patient_id_that_is_missing_is_no_other_patient(tmp_path):
    write_series(tmp_path / "1", patient="Anna", description="T1")
    write_series(tmp_path / "2", patient="", description="T2")
    assert len(find_series(tmp_path, "ann")) == 2


# --- voxels that are no intensities


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_padding_is_background(inverted, compressed, tmp_path):
    """Whatever the sign that its value is written with."""
    array = np.random.default_rng(0).integers(100, 1000, GRID.shape).astype(np.uint16)
    array[:, :2] = 63536
    write_series(tmp_path, array=array)

    def change(image, number):
        image.PixelRepresentation = 1
        image.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
        image.add_new("PixelPaddingValue", "SS", -2000)
        if compressed:
            image.compress(pydicom.uid.RLELossless)

    change_series(tmp_path, change)
    found = sitk.GetArrayFromImage(read(tmp_path))
    inside = (~array.astype(np.int16) if inverted else array.astype(np.int16))[:, 2:]
    np.testing.assert_array_equal(found[:, 2:], inside)
    assert np.all(found[:, :2] == inside.min())


def test_what_is_no_slice_of_intensities_is_refused(tmp_path):
    write_series(tmp_path / "palette")
    change_series(tmp_path / "palette", lambda image, _: setattr(image, "PhotometricInterpretation", "PALETTE COLOR"))
    assert "Received: PhotometricInterpretation PALETTE COLOR" in refused(tmp_path / "palette")
    write_series(tmp_path / "mosaic")
    kind = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    change_series(tmp_path / "mosaic", lambda image, _: setattr(image, "ImageType", kind))
    assert "Received: a mosaic of all slices" in refused(tmp_path / "mosaic")


def test_objects_of_other_patients(tmp_path, caplog):
    write_series(tmp_path / "ann" / "t1", uid="1.2.3")
    write_object(tmp_path / "ann" / "rs.dcm", STRUCTURE_SET, PatientID="2")
    find_objects(tmp_path / "ann", "ann")
    assert "ann: rs.dcm has another PatientID than the images" in caplog.text
    for number, name in enumerate(("a", "b")):
        write_series(tmp_path / "two" / name, uid=f"1.2.{number}", patient="")
        study = f"1.2.826.0.1.{number}"
        change_series(tmp_path / "two" / name, lambda image, _, study=study: setattr(image, "StudyInstanceUID", study))
    found, _ = find_objects(tmp_path / "two", "two")
    assert [one.study for one in found] == ["1.2.826.0.1.0", "1.2.826.0.1.1"]
    assert "two: 2 studies without a PatientID or PatientName are taken for one patient's" in caplog.text


# --- enhanced objects


def test_slopes_that_frames_share(tmp_path):
    array = np.random.default_rng(0).integers(0, 1000, (3, 6, 8))
    path = tmp_path / "image.dcm"
    write_enhanced(path, [{"position": (0, 0, 4 * n)} for n in range(3)], array, RescaleSlope=2.5, RescaleIntercept=-3)
    file = pydicom.dcmread(path)
    for frame in file.PerFrameFunctionalGroupsSequence:
        del frame.PixelValueTransformationSequence
    file.save_as(path)
    np.testing.assert_allclose(sitk.GetArrayFromImage(read(tmp_path)), array * 2.5 - 3)


def test_enhanced_frames_by_position_with_slopes_of_their_own(tmp_path):
    array = np.random.default_rng(0).integers(0, 1000, (4, 6, 8))
    places = [8, 0, 4, 12]
    frames = [{"position": (1, 2, z), "slope": 1.5 + n, "intercept": -n} for n, z in enumerate(places)]
    write_enhanced(tmp_path / "image.dcm", frames, array, spacing=(0.7, 0.5))
    image = read(tmp_path)
    expected = np.stack([array[n] * (1.5 + n) - n for n in np.argsort(places)])
    np.testing.assert_allclose(sitk.GetArrayFromImage(image), expected)
    grid = Grid((8, 6, 4), (0.5, 0.7, 4.0), (1.0, 2.0, 0.0), GRID.direction)
    assert Grid.from_image(image).matches(grid)
    grid_, slices = series_grid(find_series(tmp_path, "ann")[0], "ann")
    assert grid_.matches(grid)
    assert [(one.path, one.frame) for one in slices] == [(tmp_path / "image.dcm", n) for n in (1, 2, 0, 3)]


@pytest.mark.parametrize(("key", "label"), [("echo", "echo"), ("b", "b-value"), ("phase", "phase")])
def test_several_images_in_one_enhanced_object(key, label, tmp_path):
    array = np.random.default_rng(0).integers(0, 1000, (6, 6, 8))
    frames = [{"position": (0, 0, 4 * (n // 2)), key: 10 + n % 2} for n in range(6)]
    write_enhanced(tmp_path / "image.dcm", frames, array)
    found = find_series(tmp_path, "ann")
    assert [one.label for one in found] == [f"{label} 10", f"{label} 11"]
    for number, one in enumerate(found):
        image = read_series(one, "ann")
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array[number::2])
        np.testing.assert_allclose(image.GetSpacing(), (0.5, 0.5, 4.0))


def test_an_enhanced_object_for_each_slice(tmp_path):
    array = np.random.default_rng(0).integers(0, 1000, (3, 6, 8))
    for n in range(3):
        frames = [{"position": (0, 0, 4 * n), "slope": 2.0}]
        write_enhanced(tmp_path / f"{2 - n}.dcm", frames, array[n : n + 1], SeriesInstanceUID="1.2.3")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(tmp_path)), array * 2)


def test_a_compressed_enhanced_object(tmp_path):
    array = np.random.default_rng(0).integers(0, 1000, (3, 6, 8))
    write_enhanced(tmp_path / "image.dcm", [{"position": (0, 0, -4 * n)} for n in range(3)], array)
    image = pydicom.dcmread(tmp_path / "image.dcm")
    image.compress(pydicom.uid.RLELossless)
    image.save_as(tmp_path / "image.dcm")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(tmp_path)), array[::-1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"NumberOfFrames": 3}, "the headers of 4 frames for 3"),
        ({"PerFrameFunctionalGroupsSequence": []}, "the headers of 0 frames for 4"),
        ({"SharedFunctionalGroupsSequence": []}, "an image with ImageOrientationPatient"),
        ({"PixelData": b"short"}, "Received: "),
        ({"Rows": 60000, "Columns": 60000}, "Received: "),
    ],
)
def test_an_enhanced_object_that_lies(values, message, tmp_path):
    array = np.random.default_rng(0).integers(0, 1000, (4, 6, 8))
    write_enhanced(tmp_path / "image.dcm", [{"position": (0, 0, 4 * n)} for n in range(4)], array, **values)
    assert message in refused(tmp_path)


def test_frames_without_positions_of_their_own(tmp_path):
    write_series(tmp_path, grid=GRID.crop((0, 0, 0), (1, 12, 16)))

    def change(image, _):
        image.NumberOfFrames, image.PixelData = 3, image.PixelData * 3

    change_series(tmp_path, change)
    assert "one slice, or frames with positions of their own. Received: 3 frames" in refused(tmp_path)


# --- real images


def test_real_oblique_series(test_data):
    for series in find_series(test_data / "brainix", "ann"):
        image = read_series(series, "ann")
        expected = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(series.folder)))
        assert Grid.from_image(image).matches(Grid.from_image(expected))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(expected))


def test_two_patients_without_an_id_are_told_apart_by_their_names(tmp_path):
    def name(what):
        def change(image, number):
            image.PatientID, image.PatientName = "", what

        return change

    for folder, patient in (("a", "SMITH^ANN"), ("b", "Smith^Ann^")):
        write_series(tmp_path / folder, description=folder)
        change_series(tmp_path / folder, name(patient))
    assert len(find_series(tmp_path, "ann")) == 2
    change_series(tmp_path / "b", name("JONES^BOB"))
    with pytest.raises(CaseError, match=r"DICOM files of one patient. Received: 2 different PatientNames"):
        find_series(tmp_path, "ann")


def write_owned(folder, owners):
    """Writes a series for each `(PatientID, PatientName)`."""
    for number, (identity, name) in enumerate(owners):
        write_series(folder / str(number), description=f"T{number}", patient=identity)
        change_series(folder / str(number), lambda image, _, name=name: setattr(image, "PatientName", name))


@pytest.mark.parametrize(
    "owners",
    [
        [("123", "Ann^One"), ("", "Bob^Other")],
        [("ANON", "Ann"), ("123", "Bob")],
        [("123", "Ann"), ("", "Ann"), ("", "Bob"), ("", "")],
        [("123", ""), ("", "Bob")],
    ],
)
def test_a_name_without_an_id_that_none_with_an_id_has(owners, tmp_path):
    write_owned(tmp_path, owners)
    with pytest.raises(
        CaseError, match=r"one patient. Received: 2 different PatientNames, some without a Pat"
    ) as caught:
        find_series(tmp_path, "ann")
    assert "Bob" not in str(caught.value)


@pytest.mark.parametrize(
    "owners",
    [
        [("123", "SMITH^ANN"), ("", "Smith, Ann"), ("ANON", "smith^ann^^")],
        [("123", "Ann"), ("", ""), ("ANON", "Anonymous")],
        [("123", "Ann"), ("123", "Ann^Married"), ("", "Ann")],
    ],
)
def test_one_patient_whose_name_is_spelt_otherwise_or_missing(owners, tmp_path):
    write_owned(tmp_path, owners)
    assert len(find_series(tmp_path, "ann")) == len(owners)


@pytest.mark.parametrize("kind", [STRUCTURE_SET, *SEGMENTATIONS])
def test_a_mask_that_is_there_twice_counts_once(kind, tmp_path):
    for name in ("one", "other"):
        write_object(tmp_path / "a" / f"{name}.dcm", kind)
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "one.dcm", tmp_path / "b" / "copy.dcm")
    assert find_objects(tmp_path, "ann")[1] == {kind: [tmp_path / "a" / "one.dcm", tmp_path / "a" / "other.dcm"]}
