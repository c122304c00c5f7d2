"""The patients to review: their images, predicted masks and maps, on the grid of the predicted masks."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from keras_mmfnet._files import read_json
from keras_mmfnet.data import find_cases, find_patients, preprocess_case
from keras_mmfnet.data.case import Case, PreprocessedCase, listed
from keras_mmfnet.data.geometry import Grid, resample, upright_grid
from keras_mmfnet.data.image_io import read_image, write_image
from keras_mmfnet.data.labels import join_masks, split_labels
from keras_mmfnet.data.preprocess import key_of_images, read_masks, recipe_of
from keras_mmfnet.data.registration import apply_transform
from keras_mmfnet.inference import read_segmentation, segment_case, segmentation_endings
from keras_mmfnet.models import load_network
from keras_mmfnet.recipe import RECIPE_FILE, DataRecipe
from keras_mmfnet.run import Run


@dataclasses.dataclass(frozen=True, eq=False)
class ReviewPatient:
    """A patient to review.

    Args:
        case: The files of the images and of the expert's mask.
        recipe: The `DataRecipe` of the networks.
        place: The folder that the patient was found in.
        masks: The files of the predicted masks: by structure, or one for all under `None`.
        maps: The files of maps on the same grid: `{("probability", structure): path}`, and of `"disagreement"`.
        scores: What is known of the prediction, by structure: some of the numbers of `evaluate_case`.
        cache: Folder of the preprocessed patients, or `None`.
        predict: Returns the probabilities by structure, on the same grid, for the files of `maps` that do not exist.
        images: What `key_of_images` gave for the images that were segmented, or `None`.
    """

    case: Case
    recipe: DataRecipe
    place: Path
    masks: Mapping[str | None, Path]
    maps: Mapping[tuple[str, str], Path] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    cache: Path | None = None
    predict: Callable[[], Mapping[str, sitk.Image]] | None = None
    images: str | None = None

    def require_same_images(self) -> None:
        """Raises `ValueError` if the images are not those that were segmented."""
        if self.images not in (None, self._images_now):
            raise ValueError(
                f"{self.name}: {self.place}: the images that were segmented are expected. Received: other images"
            )

    @functools.cached_property
    def _images_now(self):
        return key_of_images(self.case, self.recipe, self.cache)

    @property
    def name(self) -> str:
        """The patient's name."""
        return self.case.name

    @property
    def sequences(self) -> tuple[str, ...]:
        """The names of the sequences that there are, the reference modality first."""
        return recipe_of(self.case, self.recipe).modalities

    @functools.cached_property
    def source(self) -> Grid:
        """The grid of the predicted masks: the reference modality's own."""
        return Grid.from_image(read_image(next(iter(self.masks.values())), self.name))

    @functools.cached_property
    def grid(self) -> Grid:
        """The same voxels with the axes in the order of the patient's, on which the arrays of the other methods lie."""
        return upright_grid(self.source)

    @functools.cached_property
    def _placed(self):
        """The grid of the masks, and what aligned the sequences with it in preprocessing."""
        if self.recipe.align == "header":  # nothing did
            return PreprocessedCase(self.name, {}, None, self.source, self.source, (0, 0, 0))
        return preprocess_case(self.case, self.recipe, self.cache)

    def image(self, sequence: str) -> np.ndarray:
        """A sequence: linearly interpolated where it has another grid, and moved as in preprocessing.

        Args:
            sequence: One of `sequences`.

        Returns:
            A float32 array.

        Raises:
            CaseError: The image cannot be read.
        """
        image = read_image(self.case.images[sequence], self.name, sitk.sitkFloat32)
        if sequence in self._placed.transforms:
            image = apply_transform(image, self._placed.transforms[sequence])
        return resample(image, self.grid, background=float(sitk.GetArrayViewFromImage(image).min()))

    def predicted(self) -> list[np.ndarray]:
        """The predicted masks in the order of the recipe's structures, bool arrays."""
        found = read_segmentation(self.masks, self.recipe.structures)
        return [self.grid.resample(found[name]) > 0 for name in self.recipe.structures]

    def expert(self) -> list[np.ndarray] | None:
        """The expert's masks in the order of the recipe's structures, bool arrays; `None` without a mask."""
        if self.case.mask is None:
            return None
        found = read_masks(self.case, self.recipe, self._placed)
        labels = join_masks(found, self.recipe.structures)
        if labels is not None:  # Of another grid, regions may have been interpolated to combinations without a label.
            found = split_labels(labels, self.recipe.structures)
        image = self.source.image
        return [self.grid.resample(image(found[name].astype(np.uint8))) > 0 for name in self.recipe.structures]

    def map(self, what: str, structure: str) -> np.ndarray:
        """A map of `maps`, a float32 array. One that is not there is predicted, which takes a while, and kept."""
        path = self.maps[what, structure]
        if self.predict and not path.exists():
            for name, image in self.predict().items():
                self.maps[what, name].parent.mkdir(parents=True, exist_ok=True)
                write_image(image, self.maps[what, name])
        return self.grid.resample(read_image(path, path.name, sitk.sitkFloat32))

    def to_source(self, mask: np.ndarray) -> sitk.Image:
        """A mask as a uint8 image on the patient's own grid."""
        return self.source.image(self.source.resample(self.grid.image(mask.astype(np.uint8))))


def find_reviewed(folder: str | os.PathLike, patients: str | os.PathLike | None = None) -> list[ReviewPatient]:
    """The patients to review in a folder.

    Args:
        folder: Folder of a run, or of what `mmfnet segment` wrote.
        patients: The folder of the patients if it has moved since.

    Returns:
        The patients.

    Raises:
        ValueError: The folder is neither; no fold of the run is finished; or the images are gone.
    """
    folder = Path(folder)
    if (folder / RECIPE_FILE).is_file():
        return patients_of_run(folder, patients)
    return patients_of_contours(folder, patients)


def patients_of_contours(folder: str | os.PathLike, patients: str | os.PathLike | None = None) -> list[ReviewPatient]:
    """The patients that `mmfnet segment` segmented.

    Args:
        folder: Folder of the masks.
        patients: The patients' folder if it has moved since.

    Returns:
        The patients by name.

    Raises:
        ValueError: The folder holds no record of a segmented patient, or the images are gone.
    """
    records = {}
    for path in sorted(Path(folder).glob("*.json")):
        about = read_json(path).get("about", {})
        if "found" in about:
            records[path.stem] = about
    if not records:
        raise ValueError(
            f"{folder}: the folder of a run, or of masks that `mmfnet segment` wrote with their PATIENT.json files, is "
            "expected. Received: a folder without"
        )
    read = functools.cache(lambda path, data: _cases(path, DataRecipe.model_validate_json(data)))
    found, missing = [], []
    for name, about in records.items():
        recipe = DataRecipe.model_validate(about["data"])
        place = str(patients or about["input"])
        case = read(place, json.dumps(about["data"])).get(name)
        if case is None:
            missing.append(f"{name} in {place}")
            continue
        files = {key: Path(folder, f"{name}{end}") for key, end in segmentation_endings(recipe).items()}
        masks = {one: path for (what, one), path in files.items() if what == "mask"}
        first = recipe.structure_names[0]
        maps = {(what, one or first): path for (what, one), path in files.items() if what != "mask" and path.exists()}
        images = about.get("images")
        found.append(ReviewPatient(case, recipe, Path(place), masks, maps, about["found"], images=images))
    if missing:
        raise ValueError(
            f"{folder}: the images of the patients are expected where they were segmented, or in --patients. "
            f"Received: none of {listed(missing)}"
        )
    return found


def _cases(path, recipe):
    """The patients of a folder by name."""
    return {case.name: case for case in find_patients(path, recipe, lambda error: None)} if Path(path).exists() else {}


def patients_of_run(run: str | os.PathLike, patients: str | os.PathLike | None = None) -> list[ReviewPatient]:
    """The test patients of the finished folds of a run.

    Args:
        run: Folder of a run.
        patients: The patients' folder if it has moved since.

    Returns:
        The patients by fold and name.

    Raises:
        ValueError: No fold of MMFNet is finished, or the images are gone.
    """
    opened = Run(run)
    results = opened.results().get("mmfnet", [])
    if not results:
        raise ValueError(f"{run}: a finished fold of MMFNet is expected. Received: none")
    place, recipe, found = Path(patients or opened.cohort["data"]), opened.recipe.data, []
    # The run's own folder may be gone.
    cases = {one.name: one for one in find_cases(place, recipe, require_mask=False)} if patients else opened.cases
    if missing := [row["patient"] for result in results for row in result["patients"] if row["patient"] not in cases]:
        missing = listed(list(dict.fromkeys(missing)))
        raise ValueError(f"{run}: the images of its patients are expected. Received: none of {missing} in {place}")
    for result in results:
        file, scores = opened.network(result["fold"]), {}
        # Of the network as it is now; one that is gone can predict nothing more.
        network = hashlib.sha256(file.read_bytes()).hexdigest()[:8] if file.exists() else "none"
        for row in result["patients"]:
            scores.setdefault(row["patient"], {})[row["structure"]] = row
        for name, rows in sorted(scores.items()):
            masks, folder = opened.masks(result["fold"], "mmfnet", name), opened.folder / "corrections" / name
            maps = {("probability", one): folder / f"probability_{one}_{network}.nii.gz" for one in recipe.structures}
            predict = functools.partial(_probabilities, opened, result["fold"], name)
            images = opened.cohort.get("images_alone", {}).get(name)
            found.append(ReviewPatient(cases[name], recipe, place, masks, maps, rows, opened.cache, predict, images))
    return found


def _probabilities(run, fold, patient):
    """What the network of a fold predicts for a patient, by structure."""
    [preprocessed] = run.patients([patient])
    return segment_case(load_network(run.network(fold), run.recipe), preprocessed, run.recipe).probabilities
