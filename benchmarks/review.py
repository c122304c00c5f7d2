"""Measures `mmfnet review` in Chromium: the time until the list and a patient are shown, scrolling, and memory.

    python benchmarks/review.py --patients 500

Each patient has four sequences of 512x512x40 voxels, int16, compressed NIfTI; the files of all patients are the same
ones. Needs the extra review, Playwright and Chromium. The numbers are written to results/review.json.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import SimpleITK as sitk
from machine import machine, report
from playwright.sync_api import expect, sync_playwright

from keras_mmfnet.data import Grid
from keras_mmfnet.recipe import DataRecipe

RESULT = Path(__file__).parent / "results" / "review.json"
GRID = Grid((512, 512, 40), (0.45, 0.45, 4.0), (-115.0, -115.0, -80.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
SEQUENCES = ("t1", "t2", "cet1", "flair")
# Draws slices as fast as the browser can, and returns the milliseconds of each.
SCROLL = """async (count) => {
  const times = [];
  for (let n = 0; n < count; n += 1) {
    const begun = performance.now();
    window.dispatchEvent(new KeyboardEvent('keydown', { key: n % 2 ? 'ArrowDown' : 'ArrowUp', bubbles: true }));
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    times.push(performance.now() - begun);
  }
  return times;
}"""


def make_contours(folder, patients):
    """A folder of patients, and one as of `mmfnet segment` with their masks."""
    rng = np.random.default_rng(0)
    z, y, x = np.indices(GRID.shape)
    head = ((x - 256) / 200) ** 2 + ((y - 256) / 230) ** 2 + ((z - 20) / 22) ** 2 < 1
    tumour = ((x - 200) / 40) ** 2 + ((y - 220) / 40) ** 2 + ((z - 20) / 6) ** 2 < 1
    first, contours = folder / "patients" / "p0000", folder / "contours"
    first.mkdir(parents=True)
    contours.mkdir()
    for name in SEQUENCES:
        voxels = head * 400 + tumour * 200 + rng.normal(0, 30, GRID.shape)
        sitk.WriteImage(GRID.image(voxels.astype(np.int16)), str(first / f"{name}.nii.gz"))
    sitk.WriteImage(GRID.image(tumour.astype(np.uint8)), str(contours / "p0000.nii.gz"))
    recipe = DataRecipe(modalities=SEQUENCES).model_dump(mode="json")
    for number in range(patients):
        name = f"p{number:04d}"
        if number:
            shutil.copytree(first, first.with_name(name), copy_function=os.link)
            os.link(contours / "p0000.nii.gz", contours / f"{name}.nii.gz")
        found = {"tumour": {"dsc": round(rng.uniform(0.3, 0.95), 3), "predicted_ml": 30.0}}
        about = {"input": str(folder / "patients"), "data": recipe, "found": found}
        (contours / f"{name}.json").write_text(json.dumps({"about": about}))
    return contours


def megabytes(processes):
    """The memory of processes and their children, pages that they share divided among them."""
    tree = [one for process in processes for one in (process, *process.children(recursive=True))]
    return round(sum(one.memory_full_info().pss for one in tree) / 1e6)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=500, help="%(default)s")
    parsed = parser.parse_args()
    result = {"patients": parsed.patients, "voxels": GRID.size, "sequences": len(SEQUENCES)}
    with tempfile.TemporaryDirectory() as made, sync_playwright() as started:
        contours = make_contours(Path(made), parsed.patients)
        begun = time.monotonic()
        command = [sys.executable, "-m", "keras_mmfnet.cli", "review", contours, "--no-browser"]
        server = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
        address = server.stdout.readline().strip()
        result["seconds_to_start"] = round(time.monotonic() - begun, 1)
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        expect.set_options(timeout=60_000)

        def opened(action):
            """Seconds until the next patient is shown."""
            begun = time.monotonic()
            action()
            expect(page.locator("#message")).to_contain_text(": t1, t2, cet1, flair")
            return round(time.monotonic() - begun, 2)

        def go(key):
            page.evaluate("() => { document.getElementById('message').textContent = ''; }")
            page.keyboard.press(key)

        begun = time.monotonic()
        page.goto(address)
        page.locator("#patients button").nth(parsed.patients - 1).wait_for()
        result["seconds_to_list"] = round(time.monotonic() - begun, 2)
        result["seconds_to_first_patient"] = opened(lambda: None) + result["seconds_to_list"]
        result["seconds_to_next_patient"] = [opened(lambda: go("n")) for _ in range(5)]
        times = page.evaluate(SCROLL, 60)
        result["milliseconds_per_slice"] = {"median": round(np.median(times)), "longest": round(max(times))}
        browsers = [one for one in psutil.Process().children() if "chrom" in one.name() or "node" in one.name()]
        result["server_mb"], result["browser_mb"] = megabytes([psutil.Process(server.pid)]), megabytes(browsers)
        browser.close()
        server.send_signal(signal.SIGINT)
        server.wait()
    result["machine"] = machine("keras-mmfnet", "playwright", "starlette", "uvicorn")
    report(result, RESULT)


if __name__ == "__main__":
    main()
