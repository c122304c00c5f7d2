"""The web application of `mmfnet review`, for one reviewer on this machine."""

import contextlib
import json
import math
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path

import filelock
import numpy as np
import SimpleITK as sitk
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from keras_mmfnet.review.corrections import Correction, StrokesChanged, versions_in
from keras_mmfnet.review.edits import Classes, grow, interpolate_slices
from keras_mmfnet.review.patients import ReviewPatient

# What the page may do: only what comes with it, from this server.
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "worker-src 'self' blob:; script-src 'self' 'wasm-unsafe-eval'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# A report holds its styles, its script and its pictures.
_OF_REPORT = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
_BYTES = "application/octet-stream"
# The numbers of a structure that the list shows, and the corrections that stay in memory.
_SHOWN, _KEPT = ("dsc", "predicted_ml", "volume_ml", "hd95", "disagreement"), 4
_PAGE = {
    "": ("index.html", "text/html"),
    "review.js": ("review.js", "text/javascript"),
    "slices.js": ("slices.js", "text/javascript"),
    "review.css": ("review.css", "text/css"),
    "niivue.js": ("niivue.js", "text/javascript"),
}


class Review:
    """Patients that are being reviewed by one process.

    Args:
        patients: The patients.
        folder: Folder of the corrections, which other processes must not write to meanwhile.
        reviewer: Who saves, for the records.
        report: The report of the patients' run, which need not exist.

    Raises:
        RuntimeError: Another process reviews them.
    """

    def __init__(self, patients: Sequence[ReviewPatient], folder: Path, reviewer: str, report: Path | None = None):
        self.patients, self.folder, self.reviewer = list(patients), Path(folder), reviewer
        self.report = report if report and report.exists() else None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held = filelock.FileLock(self.folder / ".lock", timeout=0)
        try:
            self._held.acquire()
        except filelock.Timeout:
            expected = f"{self.folder}: one review at a time is expected"
            raise RuntimeError(f"{expected}. Received: another one that runs") from None
        self._corrections: dict[int, Correction] = {}
        self._lock, self._predicting = threading.Lock(), threading.Lock()

    def close(self) -> None:
        """Lets other processes review the patients."""
        self._held.release()

    @contextlib.contextmanager
    def correction(self, number: int) -> Iterator[Correction]:
        """The correction of a patient, which nobody else changes within the block. The last few stay in memory."""
        with self._lock:
            found = self._corrections.pop(number, None) or Correction(self.patients[number], self.folder)
            self._corrections[number] = found
            if len(self._corrections) > _KEPT:
                del self._corrections[next(iter(self._corrections))]
            yield found

    def map(self, number: int, what: str, structure: str) -> np.ndarray:
        """A map of a patient; one that is not there is predicted, once, whoever asks for it meanwhile."""
        with self._predicting:
            return self.patients[number].map(what, structure)

    def listed(self) -> list[dict]:
        """What the list shows of each patient."""
        return [self.row(number) for number in range(len(self.patients))]

    def row(self, number: int) -> dict:
        """What the list shows of a patient: `state`, `by` and `unsaved`, and of each structure what is known."""
        patient = self.patients[number]
        try:
            last = next((one.about for one in reversed(versions_in(self.folder, patient))), {})
        except ValueError:
            last = {"state": "damaged"}
        scores = {
            name: {key: row[key] for key in _SHOWN if row.get(key) is not None and math.isfinite(row[key])}
            for name, row in patient.scores.items()
        }
        for name, change in last.get("changes", {}).items():
            scores.setdefault(name, {})["corrected_ml"] = change["volume_ml"]
        return {
            "id": number,
            "name": patient.name,
            "scores": scores,
            "state": last.get("state", "to do"),
            "by": last.get("by"),
            "unsaved": (self.folder / patient.name / "strokes").exists(),
        }

    def described(self, number: int) -> dict:
        """What there is of a patient: the sequences, maps, masks and the geometry of the drawing."""
        patient = self.patients[number]
        with self.correction(number) as correction:
            classes, state, strokes = correction.classes, correction.state, correction.strokes
        return {
            **self.row(number),
            "sequences": patient.sequences,
            "maps": [list(one) for one in patient.maps],
            "expert": patient.case.mask is not None,
            "shape": patient.grid.shape,
            "spacing": patient.grid.spacing,
            "origin": patient.grid.origin,
            "axes": patient.grid.axes.tolist(),
            "structures": classes.structures,
            "members": classes.members.tolist(),
            "drawn": classes.drawn.tolist(),
            "erased": classes.erased.tolist(),
            "state_of_drawing": state,
            "strokes": strokes,
        }


def nifti(array: np.ndarray, patient: ReviewPatient) -> bytes:
    """An array on a patient's `grid` as an uncompressed NIfTI file; float images of integers as int16."""
    if array.dtype == np.float32 and np.array_equal(array, np.rint(array)) and np.abs(array).max() < 2**15:
        array = array.astype(np.int16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image.nii")
        sitk.WriteImage(patient.grid.image(array), str(path))
        return path.read_bytes()


class _Answers:
    """What the application answers: a method for each address, with the request's query and body."""

    def __init__(self, review: Review):
        self.review = review

    def page(self, query, body, name=""):
        file, kind = _PAGE[name]
        content = resources.files("keras_mmfnet.review").joinpath("page", file).read_bytes()
        return Response(content, media_type=kind)

    def report(self, query, body):
        if self.review.report is None:
            raise KeyError("report")
        headers = {"Content-Security-Policy": _OF_REPORT}
        return Response(self.review.report.read_bytes(), media_type="text/html", headers=headers)

    def patients(self, query, body):
        return {"patients": self.review.listed(), "report": self.review.report is not None}

    def patient(self, query, body, number):
        return self.review.described(number)

    def image(self, query, body, number, sequence):
        patient = self.review.patients[number]
        return self._nifti(patient.image(sequence), patient)

    def map(self, query, body, number, what, structure):
        patient = self.review.patients[number]
        return self._nifti(self.review.map(number, what, structure), patient)

    def mask(self, query, body, number, which):
        patient = self.review.patients[number]
        if which == "drawn":
            with self.review.correction(number) as correction:
                return self._nifti(correction.drawing, patient)
        masks = {"predicted": patient.predicted, "expert": patient.expert}[which]()
        if masks is None:
            raise KeyError(which)
        return self._nifti(Classes(patient.recipe.structures).join(masks), patient)

    def drawing(self, query, body, number):
        with self.review.correction(number) as correction:
            headers = {"X-State": correction.state, "X-Strokes": str(correction.strokes)}
            return Response(correction.drawing.tobytes(), media_type=_BYTES, headers=headers)

    def draw(self, query, body, number):
        with self.review.correction(number) as correction:
            correction.draw(body, query["after"])
            return {"state": correction.state, "strokes": correction.strokes}

    def save(self, query, body, number):
        with self.review.correction(number) as correction:
            voxels = json.loads(body) if body else None
            correction.save(self.review.reviewer, query["after"], voxels)
            return {"state": correction.state, "strokes": correction.strokes, "row": self.review.row(number)}

    def interpolated(self, query, body, number):
        with self.review.correction(number) as correction:
            structure, axis = _chosen(query, "structure", correction.classes.structures), _chosen(query, "axis", "zyx")
            mask = correction.classes.split(correction.drawing)[structure]
            filled = interpolate_slices(mask, axis, correction.patient.grid.spacing[::-1])
            return Response(correction.replacing(structure, filled), media_type=_BYTES)

    def grown(self, query, body, number):
        patient = self.review.patients[number]
        structure, threshold = _chosen(query, "structure", patient.recipe.structures), float(query["threshold"])
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold: a number above 0, 1 at most, is expected. Received: {threshold}")
        probability = self.review.map(number, "probability", patient.recipe.structure_names[structure])
        with self.review.correction(number) as correction:
            mask = correction.classes.split(correction.drawing)[structure]
            found = grow(probability, threshold, mask)
            return Response(correction.replacing(structure, found), media_type=_BYTES)

    def _nifti(self, array, patient):
        return Response(nifti(array, patient), media_type=_BYTES)


def _chosen(query, name, among):
    """A number of a query that chooses one of several."""
    number = int(query[name])
    if not 0 <= number < len(among):
        raise ValueError(f"{name}: a number from 0 to {len(among) - 1} is expected. Received: {number}")
    return number


def create_app(review: Review, token: str) -> Starlette:
    """The application, an ASGI app. All of it lies under `/TOKEN/`; anything else is not found.

    Args:
        review: The `Review`.
        token: What addresses start with, which nobody else may know.
    """
    answers = _Answers(review)

    def route(path: str, answer: Callable, method: str = "GET") -> Route:
        async def endpoint(request: Request) -> Response:
            given = dict(request.path_params)
            if not secrets.compare_digest(given.pop("token").encode(), token.encode()):
                return Response("Not found", 404)
            if "number" in given and given["number"] >= len(review.patients):
                return Response("Not found", 404)
            try:
                body = await request.body()
                found = await run_in_threadpool(answer, request.query_params, body, **given)
                found = found if isinstance(found, Response) else JSONResponse(found)
            except StrokesChanged as error:
                found = JSONResponse({"error": str(error)}, 409)
            except KeyError as error:
                found = JSONResponse({"error": f"there is no {error}"}, 404)
            except (ValueError, OSError, RuntimeError) as error:
                found = JSONResponse({"error": str(error)}, 422)
            for name, value in _HEADERS.items():
                found.headers.setdefault(name, value)
            return found

        return Route(f"/{{token}}/{path}", endpoint, methods=[method])

    one = "api/patients/{number:int}"
    return Starlette(
        routes=[
            route("", answers.page),
            route("report.html", answers.report),
            route("api/patients", answers.patients),
            route(one, answers.patient),
            route(f"{one}/images/{{sequence}}.nii", answers.image),
            route(f"{one}/maps/{{what}}/{{structure}}.nii", answers.map),
            route(f"{one}/masks/{{which}}.nii", answers.mask),
            route(f"{one}/drawing", answers.drawing),
            route(f"{one}/strokes", answers.draw, "POST"),
            route(f"{one}/save", answers.save, "POST"),
            route(f"{one}/interpolated", answers.interpolated),
            route(f"{one}/grown", answers.grown),
            route("{name}", answers.page),
        ]
    )


def make_server(review: Review, token: str) -> uvicorn.Server:
    """The server of the application, to be run with a socket. It logs no requests, whose addresses hold the token.

    Args:
        review: The `Review`.
        token: What addresses start with.
    """
    return uvicorn.Server(uvicorn.Config(create_app(review, token), log_level="warning", access_log=False))
