import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_files import change_series, find_series, write_series
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from keras_mmfnet.data import preprocess_case, read_case_folder
from keras_mmfnet.data.case import CaseError, StructureFiles
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.data.preprocess import read_masks
from keras_mmfnet.data.structures import SEGMENTATIONS, STRUCTURE_SET, DicomStructures, drawn_mask, read_structures
from keras_mmfnet.data.survey import survey_case
from keras_mmfnet.recipe import DataRecipe

TURN = sitk.Euler3DTransform()
TURN.SetRotation(0.2, -0.1, 0.15)
GRID = Grid((40, 36, 8), (0.9, 1.2, 4.0), (5.0, -8.0, 20.0), TURN.GetMatrix())


@pytest.fixture
def series(tmp_path):
    write_series(tmp_path / "t1", GRID, order=-1)
    [found] = find_series(tmp_path / "t1", "ann")
    return found


def circle(radius, z, centre=(18, 16), points=90, grid=GRID):
    """A contour in mm of a circle in pixels."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    x, y = centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)
    return grid.positions(np.stack([x, y, np.full(points, float(z))], -1))


def disk(radius, slices, centre=(18, 16)):
    z, y, x = np.indices(GRID.shape)
    return ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2) & np.isin(z, slices)


def write_structures(path, series, kind="CLOSED_PLANAR", **contours):
    image, file = pydicom.dcmread(series.files[0]), Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = STRUCTURE_SET
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = generate_uid()
    file.SpecificCharacterSet = "ISO_IR 192"
    file.Modality, file.PatientID, file.SeriesInstanceUID = "RTSTRUCT", image.PatientID, generate_uid()
    file.ReferencedFrameOfReferenceSequence = [frame := Dataset()]
    frame.FrameOfReferenceUID = image.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study := Dataset()]
    study.RTReferencedSeriesSequence = [referred := Dataset()]
    referred.SeriesInstanceUID = image.SeriesInstanceUID
    file.StructureSetROISequence, file.ROIContourSequence = [], []
    for number, (name, found) in enumerate(contours.items(), start=1):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, drawn.ReferencedROINumber = number, name, number
        drawn.ContourSequence = []
        for points in found:
            contour = Dataset()
            contour.ContourGeometricType = kind
            contour.NumberOfContourPoints = len(points)
            contour.ContourData = [f"{value:.4f}" for value in np.ravel(points)]
            drawn.ContourSequence.append(contour)
        file.StructureSetROISequence.append(roi)
        file.ROIContourSequence.append(drawn)
    file.save_as(path, enforce_file_format=True)
    return path


def read(path, series, pattern=None):
    image = read_structures(DicomStructures(path, series, pattern), "ann")
    return sitk.GetArrayFromImage(image), Grid.from_image(image)


def refused(path, series, pattern=None):
    with pytest.raises(CaseError) as caught:
        read(path, series, pattern)
    assert str(caught.value).startswith(f"ann: {path}: must be ")
    return str(caught.value)


def test_contours_on_the_grid_of_their_series(series, tmp_path):
    contours = [circle(radius, z) for z in (2, 3, 4) for radius in (10.4, 4.3)]
    contours += [circle(2.6, z, (33, 8)) for z in (4, 5)]
    path = write_structures(tmp_path / "rs.dcm", series, GTV=contours)
    array, grid = read(path, series)
    assert grid.matches(GRID)
    ring = disk(10.4, (2, 3, 4)) & ~disk(4.3, (2, 3, 4))
    np.testing.assert_array_equal(array > 0, ring | disk(2.6, (4, 5), (33, 8)))


def test_a_contour_that_is_there_twice_counts_once(series, tmp_path):
    path = write_structures(tmp_path / "rs.dcm", series, GTV=[circle(6.3, 2), circle(6.3, 2)])
    np.testing.assert_array_equal(read(path, series)[0] > 0, disk(6.3, (2,)))


def test_structures_are_chosen_by_name(series, tmp_path):
    contours = {"GTVp": [circle(6.3, 2)], "GTVn 1": [circle(2.6, 2, (33, 8))], "BODY": [circle(15.3, 2)], "empty": []}
    path = write_structures(tmp_path / "rs.dcm", series, **contours)
    other = write_structures(tmp_path / "other.dcm", series, GTV=[circle(6.3, 2)])
    both = {STRUCTURE_SET: [path, other]}
    names, frame = ("GTVp", "GTVn 1", "BODY"), series.frame_of_reference
    expected = StructureFiles({"gtv": DicomStructures(path, series, "gtv[pn].*", names, frame)})
    assert drawn_mask(both, [series], {"gtv": "gtv[pn].*"}, "ann") == expected
    for named in ({}, {"ctv": "CTV"}):
        with pytest.raises(CaseError, match=r"one file with the structures; .*rs.dcm .*; .*other.dcm \('GTV'\)$"):
            drawn_mask(both, [series], named, "ann")
    assert drawn_mask({STRUCTURE_SET: [other]}, [], {}, "ann").series is None
    assert drawn_mask({}, [series], {}, "ann") is None
    primary, node = disk(6.3, (2,)), disk(2.6, (2,), (33, 8))
    np.testing.assert_array_equal(read(path, series, "gtvp")[0], primary)
    np.testing.assert_array_equal(read(path, series, "GTV.*")[0], primary | node)
    assert "matches 'GTV'. Received: 'GTVp', 'GTVn 1', 'BODY'" in refused(path, series, "GTV")
    assert "a file of one structure" in refused(path, series)


def test_what_is_not_on_the_slices_is_refused(series, tmp_path):
    between = write_structures(tmp_path / "between.dcm", series, GTV=[circle(6.3, 2.5)])
    assert "between them" in refused(between, series)
    outside = write_structures(tmp_path / "outside.dcm", series, GTV=[circle(6.3, 8)])
    assert "outside all 8 slices" in refused(outside, series)
    second = write_structures(tmp_path / "second.dcm", series, GTV=[circle(6.3, z) for z in (1, 3, 5)])
    assert "slices, from 0: 2 (slice_06.dcm), 4 (slice_04.dcm)" in refused(second, series)
    elsewhere = write_structures(tmp_path / "elsewhere.dcm", series, GTV=[circle(6.3, 2)])
    assert "refers to a series in the patient's folder" in refused(elsewhere, None)
    beside = write_structures(tmp_path / "beside.dcm", series, GTV=[circle(6.3, 2), circle(4.3, 3, centre=(38, 16))])
    assert "one of 'GTV' outside, in slice 3, from 0" in refused(beside, series)
    points = write_structures(tmp_path / "points.dcm", series, "POINT", GTV=[circle(6.3, 2)])
    assert "Received: none" in refused(points, series)


def test_contours_that_overlap_count_together_and_those_within_others_are_holes(series, tmp_path):
    one, other = disk(6.3, (2,)), disk(6.3, (2,), (24, 16))
    outline, near = circle(6.3, 2), circle(6.25, 2)
    for again in (outline[::-1], np.roll(outline, 7, 0), outline + 0.01, near, near[::-1]):
        path = write_structures(tmp_path / "rs.dcm", series, GTV=[near, again, outline])
        np.testing.assert_array_equal(read(path, series)[0] > 0, one)
    apart = write_structures(tmp_path / "apart.dcm", series, GTV=[outline, circle(6.3, 2, (24, 16))])
    np.testing.assert_array_equal(read(apart, series)[0] > 0, one | other)
    xor = write_structures(tmp_path / "xor.dcm", series, "CLOSEDPLANAR_XOR", GTV=[outline, circle(6.3, 2, (24, 16))])
    np.testing.assert_array_equal(read(xor, series)[0] > 0, one ^ other)
    nested = [circle(radius, 2) for radius in (4.3, 13.3, 2.3, 4.3, 13.3)]
    path = write_structures(tmp_path / "nested.dcm", series, GTV=nested)
    np.testing.assert_array_equal(read(path, series)[0] > 0, disk(13.3, (2,)) & ~disk(4.3, (2,)) | disk(2.3, (2,)))
    keyhole = np.concatenate([circle(10.4, 2), circle(10.4, 2)[:1], circle(4.3, 2)[:1], circle(4.3, 2)[::-1]])
    path = write_structures(tmp_path / "keyhole.dcm", series, GTV=[keyhole, circle(2.3, 2)])
    ring = disk(10.4, (2,)) & ~disk(4.3, (2,)) | disk(2.3, (2,))
    np.testing.assert_array_equal(read(path, series)[0] > 0, ring)
    crossed = [circle(13.3, 2, (15, 16)), circle(4.3, 2, (15, 16)), circle(10.3, 2, (28, 16))]
    path = write_structures(tmp_path / "crossed.dcm", series, GTV=crossed)
    assert "none crosses a hole. Received: 'GTV' in slice_06.dcm" in refused(path, series)


def test_missing_contours(series, tmp_path):
    body = write_structures(tmp_path / "body.dcm", series, GTV=[circle(6.3, z) for z in (1, 2, 4, 6)])
    assert "from 0: 3 (slice_05.dcm), 5 (slice_03.dcm)" in refused(body, series)
    third = write_structures(tmp_path / "third.dcm", series, GTV=[circle(6.3, z) for z in (1, 4, 7)])
    assert "from 0: 2 (slice_06.dcm), 3 (slice_05.dcm), 5" in refused(third, series)
    # Another lesion in the slice between does not hide it.
    hidden = write_structures(tmp_path / "hidden.dcm", series, GTV=[circle(4, 1), circle(3, 2, (33, 8)), circle(4, 3)])
    assert "from 0: 2 (" in refused(hidden, series)
    places = {1: (8, 10), 3: (20, 10), 6: (32, 24)}
    path = write_structures(tmp_path / "rs.dcm", series, GTV=[circle(4.3, z, place) for z, place in places.items()])
    lesions = np.any([disk(4.3, (z,), place) for z, place in places.items()], axis=0)
    np.testing.assert_array_equal(read(path, series)[0] > 0, lesions)


def test_contours_of_other_kinds_and_in_several_items(series, tmp_path):
    path = write_structures(tmp_path / "rs.dcm", series, GTV=[circle(6.3, z) for z in (2, 3)], iso=[circle(6.3, 2)[:1]])
    file = pydicom.dcmread(path)
    first = file.ROIContourSequence[0]
    second = Dataset()
    second.ReferencedROINumber, second.ContourSequence = 1, [first.ContourSequence.pop()]
    file.ROIContourSequence.append(second)
    file.save_as(path)
    np.testing.assert_array_equal(read(path, series)[0] > 0, disk(6.3, (2, 3)))
    second.ContourSequence[0].ContourGeometricType = "OPEN_PLANAR"
    file.save_as(path)
    assert "'GTV' that also has others: 1 OPEN_PLANAR" in refused(path, series)


@pytest.mark.parametrize("points", [1, 2])
def test_fragments_of_contours(points, series, tmp_path):
    whole = [circle(6.3, z) for z in (2, 3)]
    path = write_structures(tmp_path / "rs.dcm", series, GTV=[*whole, circle(2.3, 3)[:points]])
    np.testing.assert_array_equal(read(path, series)[0] > 0, disk(6.3, (2, 3)))
    alone = write_structures(tmp_path / "alone.dcm", series, GTV=[*whole, circle(2.3, 4)[:points]])
    assert f"one of 'GTV' of {points}, alone in its slice" in refused(alone, series)


def test_contours_smaller_than_a_pixel(tmp_path):
    folder = tmp_path / "ann"
    write_series(folder / "T1", GRID, description="T1", array=np.indices(GRID.shape).sum(0) % 4)
    (t1,) = find_series(folder, "ann")
    recipe = DataRecipe(modalities=("t1",), spacing=None, normalised_scale=1.0, structures={"gtv": "GTV.*"})
    path, speck = folder / "rs.dcm", (20.5, 16.5)
    gtv = [circle(6.3, 2), circle(6.3, 3), circle(0.4, 4, speck), circle(0.4, 3, (30.5, 8.5))]
    write_structures(path, t1, GTVp=gtv, BODY=[circle(15.3, 2), circle(0.4, 3, speck)])
    case = read_case_folder(folder, recipe)
    note = f"mask: 'GTVp' in {path}: nothing is left of 2 of 4 contours, which enclose no pixel's centre, in slices, "
    note += "from 0: 3, 4"
    for deep in (False, True):
        assert [one for one in survey_case(case, recipe, deep).notes if "nothing is left" in one] == [note]
    patient = preprocess_case(case, recipe)
    assert note in patient.notes
    np.testing.assert_array_equal(read_masks(case, recipe, patient)["gtv"] > 0, disk(6.3, (2, 3)))
    # A whole structure, also beside another one, and where patients may have no tumour.
    write_structures(path, t1, GTVp=gtv, GTVn=[circle(0.4, z, speck) for z in (2, 3)])
    for able in (recipe, recipe.model_copy(update={"allow_empty": True})):
        [problem] = survey_case(read_case_folder(folder, able), able).problems
        assert problem == (
            f"ann: {path}: must be structures that enclose the centre of a pixel. "
            "Received: 'GTVn' of 2 contours that are too small"
        )
        with pytest.raises(CaseError, match="'GTVn' of 2 contours that are too small"):
            preprocess_case(read_case_folder(folder, able), able)
    # One that was drawn nowhere is empty still.
    write_structures(path, t1, GTVp=gtv, GTVn=[])
    assert not survey_case(read_case_folder(folder, recipe), recipe, True).problems


def test_the_series_that_contours_were_drawn_on(series, tmp_path):
    write_series(tmp_path / "fine", Grid((40, 36, 16), (0.9, 1.2, 2.0), GRID.origin, GRID.direction))
    [fine] = find_series(tmp_path / "fine", "ann")
    path = write_structures(tmp_path / "rs.dcm", series, GTV=[circle(6.3, z) for z in (2, 3)])
    objects, file = {STRUCTURE_SET: [path]}, pydicom.dcmread(path)
    [study] = file.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence
    other = Dataset()
    other.SeriesInstanceUID = fine.uid

    def found(*several):
        file.save_as(path)
        return {drawn_mask(objects, order, {}, "ann").series for order in (several, several[::-1])}

    # Both are listed, but contours lie in each slice of one alone.
    study.RTReferencedSeriesSequence.append(other)
    assert found(fine, series) == {series}
    # Nothing but the frame of reference.
    del study.RTReferencedSeriesSequence
    file.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = series.frame_of_reference
    assert found(fine, series) == {series}
    # Images come first.
    study.RTReferencedSeriesSequence = [other]
    image = Dataset()
    image.ReferencedSOPInstanceUID = pydicom.dcmread(series.files[3]).SOPInstanceUID
    for contour in file.ROIContourSequence[0].ContourSequence:
        contour.ContourImageSequence = [image]
    assert found(fine, series) == {series}


def test_empty_structures_and_names_in_any_form(series, tmp_path):
    empty = write_structures(tmp_path / "empty.dcm", series, **{"Tumo\u0308r": [], "BODY": [circle(15.3, 2)]})
    full = write_structures(tmp_path / "full.dcm", series, **{"Tumo\u0308r": [circle(6.3, 2)], "other": []})
    named = {"tumour": "tum\u00f6r"}
    assert drawn_mask({STRUCTURE_SET: [empty]}, [series], named, "ann").files["tumour"].series == series
    assert not read(empty, series, "tum\u00f6r")[0].any()
    assert drawn_mask({STRUCTURE_SET: [empty, full]}, [series], named, "ann").files["tumour"].path == full
    np.testing.assert_array_equal(read(full, series)[0] > 0, disk(6.3, (2,)))


def test_two_lesions_with_slices_in_between(series, tmp_path):
    path = write_structures(tmp_path / "rs.dcm", series, GTV=[circle(6.3, z) for z in (1, 2, 6)])
    np.testing.assert_array_equal(read(path, series)[0] > 0, disk(6.3, (1, 2, 6)))


@pytest.mark.parametrize("change", [lambda x: x[:600], lambda x: b"DICM" * 100, lambda x: b""])
def test_a_damaged_file_is_refused(change, series, tmp_path):
    path = write_structures(tmp_path / "rs.dcm", series, GTV=[circle(6.3, 2)])
    path.write_bytes(change(path.read_bytes()))
    refused(path, series)


def test_an_image_is_no_structure_set(series):
    assert "structure set or segmentation. Received: MR Image" in refused(series.files[0], series)


def _pixels(kind, masks):
    if kind == "LABELMAP":
        return sum(number * mask.astype(np.uint8) for number, mask in enumerate(masks, start=1))
    return np.stack(masks, -1).astype(np.float32 if kind == "FRACTIONAL" else np.uint8)


def write_segments(path, series, kind="BINARY", **masks):
    images = [pydicom.dcmread(file) for file in series.files]
    normal = np.reshape(GRID.direction, (3, 3))[:, 2]
    images.sort(key=lambda image: float(np.dot(normal, np.array(image.ImagePositionPatient, float))))
    for image in images:
        image.SliceThickness = 4.0
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Neoplasm,
            algorithm_type="MANUAL",
        )
        for number, name in enumerate(masks, start=1)
    ]
    written = highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=_pixels(kind, [*masks.values()]),
        segmentation_type=kind,
        segment_descriptions=segments,
        series_instance_uid=generate_uid(),
        series_number=1,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="none",
        manufacturer_model_name="none",
        software_versions="0",
        device_serial_number="0",
    )
    written.save_as(path)
    return path


def test_segments_on_the_grid_of_their_frames(series, tmp_path):
    # No frame at 3, where there is nothing, nor at 0, 1 and 6.
    tumour, node = disk(6.3, (2, 4, 5)), disk(2.6, (4,), (33, 8))
    path = write_segments(tmp_path / "seg.dcm", series, GTVp=tumour, GTVn=node)
    expected = DicomStructures(path, series, "GTV.", ("GTVp", "GTVn"), series.frame_of_reference)
    mask = drawn_mask({SEGMENTATIONS[0]: [path]}, [series], {"gtv": "GTV."}, "ann")
    assert mask == StructureFiles({"gtv": expected})
    array, grid = read(path, None, "GTV.")
    assert grid.size[:2] == GRID.size[:2]
    np.testing.assert_allclose(GRID.indices(np.array(grid.origin)), (0, 0, 2), atol=1e-3)
    np.testing.assert_allclose(grid.spacing, GRID.spacing, rtol=1e-5)
    np.testing.assert_array_equal(array, (tumour | node)[2:6])
    whole, grid = read(path, series, "GTV.")
    assert grid.matches(GRID)
    np.testing.assert_array_equal(whole, tumour | node)


def test_a_label_map_has_a_background(series, tmp_path):
    path = write_segments(tmp_path / "seg.dcm", series, "LABELMAP", GTV=disk(6.3, (2, 3, 4)))
    assert [one.SegmentLabel for one in pydicom.dcmread(path).SegmentSequence] == ["Background", "GTV"]
    for pattern in (None, "GTV", ".*"):
        np.testing.assert_array_equal(read(path, series, pattern)[0] > 0, disk(6.3, (2, 3, 4)))


@pytest.mark.parametrize("slices", [(1, 6), (1, 3, 6), (4,)])
def test_segments_between_which_frames_are_missing(slices, series, tmp_path):
    lesions = disk(6.3, slices)
    path = write_segments(tmp_path / "seg.dcm", series, GTV=lesions)
    file = pydicom.dcmread(path)
    measures = file.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    measures.SliceThickness, measures.SpacingBetweenSlices = 8.0, 4.0
    file.save_as(path)
    alone, grid = read(path, None)
    assert grid.spacing[2] == pytest.approx(4, rel=1e-5)
    np.testing.assert_array_equal(alone > 0, lesions[slices[0] : slices[-1] + 1])
    measures.SliceThickness = 4.0
    del measures.SpacingBetweenSlices
    file.save_as(path)
    np.testing.assert_array_equal(read(path, series)[0] > 0, lesions)
    if slices == (1, 6):
        assert "whose series is in the patient's folder" in refused(path, None)


def test_fractions_count_from_one_half_on(series, tmp_path):
    fractions = np.clip(1.2 - np.abs(np.indices(GRID.shape)[2] - 20) / 10, 0, 1) * disk(12, (3, 4))
    path = write_segments(tmp_path / "seg.dcm", series, kind="FRACTIONAL", GTV=fractions)
    array, grid = read(path, None)
    assert grid.size[2] == 2
    np.testing.assert_array_equal(array > 0, fractions[3:5] >= 0.5)


def test_a_patient_with_structures_as_the_mask(tmp_path, caplog):
    folder = tmp_path / "ann"
    for name in ("T1", "T2"):
        write_series(folder / name, GRID, description=name, array=np.indices(GRID.shape).sum(0) % 4)
    series = find_series(folder, "ann")
    recipe = DataRecipe(modalities=("t1", "t2"), spacing=None, normalised_scale=1.0)
    contours = {"GTV": [circle(6.3, z) for z in (2, 3)], "BODY": [circle(15.3, z) for z in (2, 3)]}
    write_structures(folder / "rs.dcm", next(one for one in series if one.description == "T2"), **contours)
    with pytest.raises(
        CaseError, match=r"--structure .`data.structures`. says which ones count. Received: 'GTV', 'BODY'"
    ):
        read_case_folder(folder, recipe)
    assert read_case_folder(folder, recipe, require_mask=False).mask is None
    chosen = recipe.model_copy(update={"structures": {"gtv": "gtv"}})
    case = read_case_folder(folder, chosen)
    assert list(case.mask) == ["t2"]
    for deep in (False, True):
        assert f"structures in {folder / 'rs.dcm'} ('GTV', 'BODY')" in survey_case(case, chosen, deep).notes
    patient = preprocess_case(case, chosen, tmp_path / "cache")
    np.testing.assert_array_equal(read_masks(case, chosen, patient)["gtv"] > 0, disk(6.3, (2, 3)))
    # Another choice is another entry of the cache.
    other = recipe.model_copy(update={"structures": {"body": "BODY"}})
    assert preprocess_case(read_case_folder(folder, other), other, tmp_path / "cache").mask.sum() > patient.mask.sum()
    write_structures(folder / "rs2.dcm", series[0], GTV=[circle(6.3, 2)])
    with pytest.raises(CaseError, match=r"one file with the structures.*rs.dcm \('GTV', 'BODY'\); .*rs2.dcm \('GTV'\)"):
        read_case_folder(folder, chosen)
    (folder / "rs2.dcm").unlink()
    # Drawn on an image that is no modality, in another frame of reference.
    write_series(folder / "CT", GRID, description="CT")
    change_series(folder / "CT", lambda image, _: setattr(image, "FrameOfReferenceUID", "1.2.3"))
    [planning] = find_series(folder / "CT", "ann")
    write_structures(folder / "rs.dcm", planning, **contours)
    with pytest.raises(CaseError, match=r"in the frame of reference of t1; resample .* on none of the modalities"):
        preprocess_case(read_case_folder(folder, chosen), chosen)
    # A mask as an image counts, unless structures are asked for.
    sitk.WriteImage(GRID.image(disk(4, (2,)).astype(np.uint8)), str(folder / "mask.nii.gz"))
    with caplog.at_level("INFO"):
        assert read_case_folder(folder, recipe).mask == folder / "mask.nii.gz"
    assert "not used as masks: 1 RT Structure Set Storage (rs.dcm)" in caplog.text


def test_structures_that_overlap_are_read_each_by_itself(series, tmp_path):
    folder = tmp_path / "ann"
    write_series(folder / "T1", GRID, description="T1", array=np.indices(GRID.shape).sum(0) % 4)
    (t1,) = find_series(folder, "ann")
    contours = {
        "GTVp": [circle(6.3, z) for z in (2, 3)],
        "CTV high": [circle(9.3, z) for z in (2, 3)],
        "GTVn": [circle(3.3, z, (30, 8)) for z in (2, 3)],
    }
    write_structures(folder / "rs.dcm", t1, **contours)
    recipe = DataRecipe(
        modalities=("t1",), spacing=None, normalised_scale=1.0, structures={"gtv": "GTV.*", "ctv": "CTV.*"}
    )
    case = read_case_folder(folder, recipe)
    patient = preprocess_case(case, recipe, tmp_path / "cache")
    found = read_masks(case, recipe, patient)
    np.testing.assert_array_equal(found["ctv"] > 0, disk(9.3, (2, 3)))
    np.testing.assert_array_equal(found["gtv"] > 0, disk(6.3, (2, 3)) | disk(3.3, (2, 3), (30, 8)))
    missing = recipe.model_copy(update={"structures": {"gtv": "GTV.*", "ptv": "PTV.*"}})
    with pytest.raises(CaseError, match=r"a structure whose name matches 'PTV\.\*'"):
        read_case_folder(folder, missing)


def test_a_patient_may_lack_a_structure(series, tmp_path, caplog):
    folder, gtv = tmp_path / "ann", [circle(6.3, z) for z in (2, 3)]
    write_series(folder / "T1", GRID, description="T1", array=np.indices(GRID.shape).sum(0) % 4)
    (t1,) = find_series(folder, "ann")
    recipe = DataRecipe(
        modalities=("t1",), spacing=None, normalised_scale=1.0, structures={"gtv": "GTVp", "node": "GTVn.*"}
    )
    able = recipe.model_copy(update={"allow_empty": True})

    def lacks_the_node():
        case = read_case_folder(folder, able)
        patient = preprocess_case(case, able)
        assert "mask: without node" in patient.notes
        found = read_masks(case, able, patient)
        np.testing.assert_array_equal(found["gtv"] > 0, disk(6.3, (2, 3)))
        assert not found["node"].any()

    # As structures of a DICOM file.
    write_structures(folder / "rs.dcm", t1, GTVp=gtv, BODY=[circle(15.3, 2)])
    lacks_the_node()
    with pytest.raises(CaseError, match=r"name matches 'GTVn\.\*'. Received: 'GTVp', 'BODY'"):
        read_case_folder(folder, recipe)
    sitk.WriteImage(GRID.image(disk(4, (2,)).astype(np.uint8)), str(folder / "gtvn.nii.gz"))
    with pytest.raises(CaseError, match=r"in one DICOM file or in a file each. Received: .*rs.dcm .* a file of node"):
        read_case_folder(folder, able)
    (folder / "gtvn.nii.gz").unlink()
    write_structures(folder / "rs2.dcm", t1, GTVn=gtv)
    with pytest.raises(CaseError, match=r"one file with the structures.*rs.dcm .*; .*rs2.dcm "):
        read_case_folder(folder, able)
    (folder / "rs2.dcm").unlink()
    # A file without any of them is no patient without tumour: they may be called otherwise.
    write_structures(folder / "rs.dcm", t1, tumour=gtv, BODY=[circle(15.3, 2)])
    with pytest.raises(CaseError, match=r"name matches 'GTVp'. Received: 'tumour', 'BODY'"):
        read_case_folder(folder, able)
    # As a file each.
    (folder / "rs.dcm").unlink()
    sitk.WriteImage(GRID.image(disk(6.3, (2, 3)).astype(np.uint8)), str(folder / "gtvp.nii.gz"))
    lacks_the_node()
    with pytest.raises(CaseError, match=r"GTVn\.\*: is missing; .*Received: gtvp.nii.gz$"):
        read_case_folder(folder, recipe)
    assert read_case_folder(folder, recipe, require_mask=False).mask is None
    assert caplog.messages[-1].endswith("; the mask is not used")
    with pytest.raises(CaseError, match=r"a file for each of the structures gtv, node. Received: files of gtv$"):
        preprocess_case(read_case_folder(folder, able), recipe)


def test_a_segmentation_that_breaks_off(tmp_path, caplog):
    folder = tmp_path / "ann"
    write_series(folder / "T1", GRID, description="T1")
    path = write_segments(folder / "seg.dcm", find_series(folder, "ann")[0], GTV=disk(6.3, (2, 3)))
    path.write_bytes(path.read_bytes()[:-300])
    recipe = DataRecipe(modalities=("t1",), spacing=None, normalised_scale=1.0)
    with pytest.raises(CaseError, match=r"ann: .*seg.dcm: must be an undamaged DICOM file. Received: voxels of"):
        read_case_folder(folder, recipe)
    assert read_case_folder(folder, recipe, require_mask=False).mask is None
    assert "seg.dcm" in caplog.messages[-1]
    assert caplog.messages[-1].endswith("; the mask is not used")
