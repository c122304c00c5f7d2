import numpy as np
import pytest

from keras_mmfnet.review.strokes import StrokeFile, pack, unpack

STROKES = [pack(np.array([n, n + 7], np.uint32), np.array([1, 0], np.uint8)) for n in range(3)]


def test_a_stroke_as_bytes():
    indices, values = unpack(STROKES[2], voxels=10, highest=1)
    assert (indices.tolist(), values.tolist()) == ([2, 9], [1, 0])
    assert unpack(pack(np.array([], np.uint32), np.array([], np.uint8)), 10, 1)[0].size == 0


@pytest.mark.parametrize(
    ("data", "voxels", "highest"),
    [(b"", 10, 1), (STROKES[0][:-1], 10, 1), (STROKES[0] + b"0", 10, 1), (STROKES[2], 9, 1), (STROKES[2], 10, 0)],
)
def test_what_is_no_stroke(data, voxels, highest):
    with pytest.raises(ValueError, match=r"a stroke must .* Received: "):
        unpack(data, voxels, highest)


def test_strokes_come_back_after_a_crash_at_any_byte(tmp_path):
    file = StrokeFile(tmp_path / "anna" / "strokes", "ab12")
    assert file.read() == []
    for stroke in STROKES[:2]:
        file.append(stroke)
    whole = file.path.read_bytes()
    assert StrokeFile(file.path, "ab12").read() == STROKES[:2]
    found = []
    for length in range(len(whole)):
        file.path.write_bytes(whole[:length])
        again = StrokeFile(file.path, "ab12")
        found.append(len(again.read()))
        again.append(STROKES[2])  # in place of what is incomplete
        assert StrokeFile(file.path, "ab12").read() == [*STROKES[: found[-1]], STROKES[2]]
    assert found == sorted(found)
    assert set(found) == {0, 1}


def test_strokes_on_another_mask_are_kept_and_refused(tmp_path):
    file = StrokeFile(tmp_path / "strokes", "ab12")
    file.append(STROKES[0])
    before = file.path.read_bytes()
    with pytest.raises(ValueError, match=r"strokes: must be unsaved strokes on the mask.*Received: strokes on another"):
        StrokeFile(file.path, "cd34").read()
    assert file.path.read_bytes() == before
    assert StrokeFile(file.path, "cd34").read(saved="ab12") == []  # they were saved
    assert not file.path.exists()


def test_damaged_strokes_are_kept_apart(tmp_path, caplog):
    file = StrokeFile(tmp_path / "strokes", "ab12")
    for stroke in STROKES:
        file.append(stroke)
    content = bytearray(file.path.read_bytes())
    content[-2] ^= 1
    file.path.write_bytes(content)
    again = StrokeFile(file.path, "ab12")
    assert again.read() == STROKES[:2]
    assert "the strokes after 2 are incomplete" in caplog.text
    assert (tmp_path / "strokes.damaged").read_bytes() == content
    file.path.write_bytes(b"")
    with pytest.raises(OSError, match=r"strokes that were written are expected. Received: a shorter file"):
        again.append(STROKES[0])
