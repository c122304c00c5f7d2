"""The page in a real browser."""

import io
import re
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from browser import chromium, needs_browser
from matplotlib.image import imread
from review_patients import make_patient
from served import served

from keras_mmfnet.review import page as page_folder
from keras_mmfnet.review.corrections import Correction

playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def patients(tmp_path):
    return [make_patient(tmp_path, name="anna"), make_patient(tmp_path, name="bert")]


@pytest.fixture
def client(patients, tmp_path):
    with served(patients, tmp_path / "corrections") as client:
        yield client


@pytest.fixture
def page(browser, client):
    page = browser.new_page(viewport={"width": 1300, "height": 800})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: errors.append(request.url) if client.address not in request.url else None)
    open_page(page, client)
    yield page
    page.close()
    assert not [error for error in errors if not re.search("net::ERR_FAILED|409|another window", error)]


def open_page(page, client, name="anna"):
    page.goto(f"{client.address}/secret/")
    says(page, f"{name}: t1, t2")


def says(page, text):
    playwright.expect(page.locator("#message")).to_contain_text(text)


def state(page, name):
    return page.evaluate(f"() => window.review.{name}")


def pixels(page, canvas=0):
    """What is seen in a view, as PNG."""
    return page.locator(".view canvas").nth(canvas).screenshot()


def wait_for(condition, about):
    """Waits until something is so, on a machine that is busy, too."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, about
        time.sleep(0.05)


def point_of(page, voxel, pane=0):
    """Where a voxel (x, y) of the axial slice lies on the screen."""
    box = page.locator(".view canvas").nth(pane).bounding_box()
    place = page.evaluate(f"() => window.review.panes[{pane}].place")
    return box["x"] + place["left"] + place["x"] * (voxel[0] + 0.5), box["y"] + place["top"] + place["y"] * (
        voxel[1] + 0.5
    )


def drag(page, *points):
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=4)
    page.mouse.up()


@needs_browser
def test_looking(page):
    assert "anna" not in page.title()
    assert page.locator(".view").count() == 2
    assert page.locator("#patients button").all_inner_texts() == ["anna", "bert"]
    cursor = state(page, "cursor")
    before = [pixels(page, n) for n in range(2)]
    page.keyboard.press("ArrowUp")
    playwright.expect(page.locator("#place")).to_contain_text(f"Slice {cursor[2] + 2} of")
    assert state(page, "cursor") == [*cursor[:2], cursor[2] + 1]
    wait_for(lambda: all(pixels(page, n) != before[n] for n in range(2)), "all sequences go along")
    page.mouse.move(*point_of(page, (2, 3)))
    page.mouse.wheel(0, 100)
    playwright.expect(page.locator("#place")).to_contain_text(f"Slice {cursor[2] + 1} of")
    page.mouse.click(*point_of(page, (2, 3), pane=1))
    assert state(page, "cursor") == [2, 3, cursor[2]]
    for key in ("m", "e", "m", "o", "h", "+", "-", "c"):  # each changes what is seen
        seen = pixels(page)
        page.keyboard.press(key)
        wait_for(lambda: pixels(page) != seen, key)  # noqa: B023
    low, high = state(page, "volumes[0].window")
    page.mouse.move(*point_of(page, (3, 4)))
    page.mouse.down(button="right")
    page.mouse.move(700, 300)
    page.mouse.up(button="right")
    assert state(page, "volumes[0].window") != [low, high]
    for name, count in (("coronal", 2), ("sagittal", 2), ("three planes", 6)):
        page.get_by_role("button", name=name, exact=True).click()
        assert page.locator(".view canvas").count() == count
    page.keyboard.press("n")
    says(page, "bert: t1, t2")


@needs_browser
def test_three_dimensions(page):
    page.get_by_role("button", name="3D").click()
    says(page, "anna")
    assert page.locator(".view canvas").count() == 1

    def shows_the_mask():
        red, green, blue, *_ = np.moveaxis(imread(io.BytesIO(pixels(page))), -1, 0)
        return np.count_nonzero((red > 2 * green) & (red > 2 * blue) & (red > 0.2)) > 1000

    wait_for(shows_the_mask, "red")


@needs_browser
def test_drawn_saved_and_there_again(page, client, patients, tmp_path):
    anna = patients[0]
    before = Correction(anna, tmp_path / "corrections").drawing
    slice_ = state(page, "cursor")[2]
    outside, inside = (tuple(np.argwhere(before[slice_] == value)[0][::-1]) for value in (0, 1))
    page.locator("#brush").fill("1")
    page.keyboard.press("b")
    drag(page, point_of(page, outside), point_of(page, outside))
    page.keyboard.press("x")
    drag(page, point_of(page, inside, pane=1), point_of(page, inside, pane=1))  # on the other sequence
    page.keyboard.press("b")
    other = tuple(np.argwhere(before[slice_] == 0)[-1][::-1])
    drag(page, point_of(page, other), point_of(page, other))
    assert state(page, "voxels") == [int(before.sum()) + 1]
    page.keyboard.press("u")
    assert state(page, "voxels") == [int(before.sum())]
    expected = before.copy()
    expected[slice_, outside[1], outside[0]], expected[slice_, inside[1], inside[0]] = 1, 0

    # Without a word, as in a crash of the browser.
    wait_for(lambda: kept(client) == expected.ravel().tolist(), "the strokes are sent")
    open_page(page, client)
    assert drawn(page) == expected.ravel().tolist()
    playwright.expect(page.locator("#save")).to_have_text("Save")
    page.keyboard.press("s")
    says(page, "anna: corrected")
    playwright.expect(page.locator("#save")).to_have_text("Accept")
    [version] = Correction(anna, tmp_path / "corrections").versions()
    saved = sitk.ReadImage(str(version.masks[None]))
    np.testing.assert_array_equal(anna.grid.resample(saved), expected)
    assert (
        version.about["changes"]["tumour"]["added_voxels"] == version.about["changes"]["tumour"]["removed_voxels"] == 1
    )
    open_page(page, client)
    playwright.expect(page.locator("#patients tr").first).to_contain_text("corrected")


def kept(client, number=0):
    """The drawing that the server has."""
    return np.frombuffer(client.get(f"/secret/api/patients/{number}/drawing")[0], np.uint8).tolist()


def drawn(page):
    return page.evaluate("() => Array.from(window.review.drawing)")


@needs_browser
@pytest.mark.parametrize("key", ["d", "v", "u", "g", "s", "n"])
def test_a_stroke_that_is_interrupted_is_kept(page, client, patients, tmp_path, key):
    """By a key while the button of the mouse is held."""
    before = Correction(patients[0], tmp_path / "corrections").drawing
    page.locator("#brush").fill("1")
    page.keyboard.press("b")
    slice_ = state(page, "cursor")[2]
    outside = tuple(np.argwhere(before[slice_] == 0)[0][::-1])
    page.mouse.move(*point_of(page, outside))
    page.mouse.down()
    page.keyboard.press(key)
    page.mouse.up()
    if key == "n":
        says(page, "bert: t1, t2")
        page.keyboard.press("p")
        says(page, "anna: t1, t2")
    if key == "g":
        says(page, "voxels changed")
    page.keyboard.press("s")
    says(page, "anna: ")
    playwright.expect(page.locator("#save")).to_have_text("Accept")
    assert drawn(page) == kept(client)
    voxel = np.ravel_multi_index((slice_, *outside[::-1]), before.shape)
    assert key == "g" or drawn(page)[voxel] == (key != "u")  # the probability takes its place


@needs_browser
def test_an_outline_that_is_left(page, client):
    """It is filled where it was begun, and not in another patient."""
    before, slice_ = kept(client), state(page, "cursor")[2]
    points = [point_of(page, corner) for corner in ((0, 0), (5, 0), (5, 3), (0, 3))]
    page.keyboard.press("f")
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=4)
    page.keyboard.press("ArrowUp")
    page.mouse.up()
    page.keyboard.press("s")
    says(page, "anna: corrected")
    changed = np.flatnonzero(np.not_equal(drawn(page), before))
    size = page.evaluate("() => window.review.about.size")
    assert set(changed // (size[0] * size[1])) == {slice_}
    other = kept(client, 1)
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=4)
    page.keyboard.press("n")
    says(page, "bert: t1, t2")
    page.mouse.up()
    assert drawn(page) == kept(client, 1) == other


@needs_browser
def test_strokes_wait_for_the_server(page, client):
    before = kept(client)
    page.route("**/strokes*", lambda route: route.abort())
    page.locator("#brush").fill("1")
    page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("d")
    page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("Shift+D")
    says(page, "does not answer")
    assert kept(client) == before
    page.unroute("**/strokes*")
    page.keyboard.press("s")
    says(page, "anna: ")
    playwright.expect(page.locator("#save")).to_have_text("Accept")
    assert drawn(page) == kept(client)


@needs_browser
def test_saving_does_not_touch_the_next_patient(page, client):
    page.keyboard.press("d")
    page.keyboard.press("s")
    page.keyboard.press("n")
    says(page, "bert: t1, t2")
    page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("d")
    page.keyboard.press("Shift+D")
    playwright.expect(page.locator("#save")).to_have_text("Save")
    page.keyboard.press("u")
    page.keyboard.press("s")
    playwright.expect(page.locator("#save")).to_have_text("Accept")
    wait_for(lambda: drawn(page) == kept(client, 1), "the strokes are sent")


@needs_browser
def test_another_window(page, client, browser):
    """Of two windows on a patient, the one that does not know the drawing is told so."""
    other = browser.new_page()
    open_page(other, client)
    other.keyboard.press("Shift+D")
    other.keyboard.press("s")
    says(other, "anna: corrected")
    other.close()
    mine = drawn(page)
    assert mine != kept(client)
    # A refusal is an error in the console, too.
    with page.expect_console_message(lambda message: "409" in message.text):
        page.keyboard.press("s")
    says(page, "changed in another window")
    page.keyboard.press("n")
    says(page, "bert: t1, t2")
    page.keyboard.press("p")
    says(page, "anna: t1, t2")
    assert drawn(page) == kept(client)


@needs_browser
def test_the_keyboard_alone(page, patients, tmp_path):
    before = Correction(patients[0], tmp_path / "corrections").drawing
    page.keyboard.press("Shift+ArrowRight")
    for _ in range(9):
        page.keyboard.press("Shift+ArrowUp")
    x, y, z = state(page, "cursor")
    assert (y, before[z, y, x]) == (0, 0)
    page.locator("#brush").fill("1")
    page.keyboard.press("d")
    assert state(page, "voxels") == [int(before.sum()) + 1]
    page.keyboard.press("Shift+D")
    assert state(page, "voxels") == [int(before.sum())]
    page.keyboard.press("g")
    says(page, "voxels changed")
    grown = patients[0].map("probability", "tumour") >= 0.5
    assert state(page, "voxels") == [int(grown.sum())]
    page.keyboard.press("s")
    says(page, "anna: corrected")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    for _ in range(60):  # everything can be reached
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.id") == "interpolate":
            return
    pytest.fail("the button cannot be reached")


@needs_browser
def test_an_outline_is_filled(page, patients, tmp_path):
    before = Correction(patients[0], tmp_path / "corrections").drawing
    z = state(page, "cursor")[2]
    page.keyboard.press("f")
    corners = [(-0.4, -0.4), (5.4, -0.4), (5.4, 3.4), (-0.4, 3.4)]
    drag(page, *(point_of(page, corner) for corner in corners))
    expected = before.copy()
    expected[z, :4, :6] = 1
    assert drawn(page) == expected.ravel().tolist()


def luminance(colour):
    channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot(channels, (0.2126, 0.7152, 0.0722))


def test_contrast():
    """4.5 for text, 3 for borders and focus (WCAG 2.2 AA)."""
    style = Path(page_folder.__path__[0], "review.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--(\w+): (#\w{6})", style))

    def contrast(one, other):
        light, dark = sorted((luminance(one), luminance(other)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    for ground in (colours["ground"], colours["panel"], "#2a3238", "#2c4257"):
        assert contrast(colours["text"], ground) >= 4.5
        assert contrast("#ffd24a", ground) >= 3
    for colour in (colours["quiet"], "#ffb0a8"):
        assert contrast(colour, colours["panel"]) >= 4.5
    assert contrast("#77838c", "#2a3238") >= 3 or contrast("#77838c", colours["panel"]) >= 3
    assert contrast("#06121d", colours["accent"]) >= 4.5
