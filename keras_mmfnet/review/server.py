"""The web application of `mmfnet review`, for one reviewer on this machine."""

import secrets
import tempfile
import threading
from collections.abc import Callable, Sequence
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
from keras_mmfnet.review.edits import grow, interpolate_slices
from keras_mmfnet.review.patients import ReviewPatient

# What the page may do: only what comes with it, from this server.
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "worker-src 'self' blob:; script-src 'self' 'wasm-unsafe-eval'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
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

    Raises:
        RuntimeError: Another process reviews them.
    """

    def __init__(self, patients: Sequence[ReviewPatient], folder: Path, reviewer: str):
        self.patients, self.folder, self.reviewer = list(patients), Path(folder), reviewer
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held = filelock.FileLock(self.folder / ".lock", timeout=0)
        try:
            self._held.acquire()
        except filelock.Timeout:
            expected = f"{self.folder}: one review at a time is expected"
            raise RuntimeError(f"{expected}. Received: another one that runs") from None
        self._corrections: dict[int, Correction] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Lets other processes review the patients."""
        self._held.release()

    def correction(self, number: int) -> Correction:
        """The correction of a patient. The last few are kept in memory."""
        with self._lock:
            if number not in self._corrections:
                self._corrections[number] = Correction(self.patients[number], self.folder)
                while len(self._corrections) > 4:
                    del self._corrections[next(iter(self._corrections))]
            return self._corrections[number]

    def listed(self) -> list[dict]:
        """What the list shows of each patient."""
        return [self.row(number) for number in range(len(self.patients))]

    def row(self, number: int) -> dict:
        """What the list shows of a patient: `state`, `by`, `at` and `unsaved`, and of each structure what is known."""
        patient = self.patients[number]
        folder = self.folder / patient.name
        versions = versions_in(self.folder, patient)
        last = versions[-1].about if versions else {}
        scores = {
            name: {key: row[key] for key in ("dsc", "predicted_ml", "volume_ml", "hd95", "disagreement") if key in row}
            for name, row in patient.scores.items()
        }
        for name, change in last.get("changes", {}).items():
            scores.setdefault(name, {})["corrected_ml"] = change["volume_ml"]
        return {
            "id": number,
            "name": patient.name,
            "fold": patient.fold,
            "scores": scores,
            "state": last.get("state", "to do"),
            "by": last.get("by"),
            "at": last.get("at"),
            "unsaved": (folder / "strokes").exists(),
        }

    def described(self, number: int) -> dict:
        """What there is of a patient: the sequences, maps, masks and the geometry of the drawing."""
        patient, correction = self.patients[number], self.correction(number)
        return {
            **self.row(number),
            "sequences": patient.sequences,
            "maps": [list(one) for one in patient.maps],
            "expert": patient.case.mask is not None,
            "shape": patient.grid.shape,
            "spacing": patient.grid.spacing,
            "origin": patient.grid.origin,
            "axes": patient.grid.axes.tolist(),
            "structures": correction.classes.structures,
            "members": correction.classes.members.tolist(),
            "drawn": correction.classes.drawn.tolist(),
            "erased": correction.classes.erased.tolist(),
            "strokes": correction.strokes,
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

    def patients(self, query, body):
        return {"patients": self.review.listed(), "reviewer": self.review.reviewer}

    def patient(self, query, body, number):
        return self.review.described(number)

    def image(self, query, body, number, sequence):
        patient = self.review.patients[number]
        return self._nifti(patient.image(sequence), patient)

    def map(self, query, body, number, what, structure):
        patient = self.review.patients[number]
        return self._nifti(patient.map(what, structure), patient)

    def mask(self, query, body, number, which):
        patient, classes = self.review.patients[number], self.review.correction(number).classes
        if which == "drawn":
            return self._nifti(self.review.correction(number).drawing, patient)
        masks = {"predicted": patient.predicted, "expert": patient.expert}[which]()
        if masks is None:
            raise KeyError(which)
        return self._nifti(classes.join(masks), patient)

    def drawing(self, query, body, number):
        correction = self.review.correction(number)
        with correction.lock:
            headers = {"X-Strokes": str(correction.strokes)}
            return Response(correction.drawing.tobytes(), media_type="application/octet-stream", headers=headers)

    def draw(self, query, body, number):
        correction = self.review.correction(number)
        with correction.lock:
            correction.draw(body, int(query["after"]))
            return {"strokes": correction.strokes}

    def save(self, query, body, number):
        correction = self.review.correction(number)
        with correction.lock:
            correction.save(self.review.reviewer, int(query["after"]))
        return self.review.row(number)

    def interpolated(self, query, body, number):
        correction, structure = self.review.correction(number), int(query["structure"])
        with correction.lock:
            mask = correction.classes.split(correction.drawing)[structure]
            filled = interpolate_slices(mask, int(query["axis"]), correction.patient.grid.spacing[::-1])
            return Response(correction.replacing(structure, filled), media_type="application/octet-stream")

    def grown(self, query, body, number):
        correction, structure = self.review.correction(number), int(query["structure"])
        probability = correction.patient.map("probability", correction.classes.structures[structure])
        with correction.lock:
            mask = correction.classes.split(correction.drawing)[structure]
            found = grow(probability, float(query["threshold"]), mask)
            return Response(correction.replacing(structure, found), media_type="application/octet-stream")

    def _nifti(self, array, patient):
        return Response(nifti(array, patient), media_type="application/octet-stream")


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
            except StrokesChanged as error:
                found = JSONResponse({"error": str(error)}, 409)
            except KeyError as error:
                found = JSONResponse({"error": f"there is no {error}"}, 404)
            except (ValueError, OSError, RuntimeError) as error:
                found = JSONResponse({"error": str(error)}, 422)
            if not isinstance(found, Response):
                found = JSONResponse(found)
            found.headers.update(_HEADERS)
            return found

        return Route(f"/{{token}}/{path}", endpoint, methods=[method])

    one = "api/patients/{number:int}"
    return Starlette(
        routes=[
            route("", answers.page),
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
