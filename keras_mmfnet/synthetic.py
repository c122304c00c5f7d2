"""Synthetic patients as image files, for the demo, the benchmarks and the tests."""

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from keras_mmfnet._log import progress
from keras_mmfnet.data.geometry import Grid

_MODALITIES = ("t1", "t2", "cet1")

# Intensity of each tissue by modality, before noise.
_TISSUES = {
    "air": (0.0, 0.0, 0.0),
    "bone": (0.08, 0.06, 0.10),
    "marrow": (0.72, 0.42, 0.74),
    "fat": (1.10, 0.62, 0.96),
    "muscle": (0.50, 0.24, 0.52),
    "mucosa": (0.52, 0.66, 0.78),
    "gland": (0.70, 0.52, 0.74),
    "grey": (0.53, 0.50, 0.57),
    "white": (0.70, 0.34, 0.68),
    "csf": (0.24, 1.15, 0.24),
    "tumour": (0.32, 0.80, 1.02),
}
# A look-alike has the intensity of the tumour except in the modality that it is named after. With one modality, two
# kinds of look-alikes cannot be told from the tumour; with two modalities, one kind; with all three, none.
_LOOK_ALIKES = {"t1": 0.64, "t2": 0.38, "cet1": 0.46}

# The head as ellipsoids; later rows overwrite earlier ones. Columns: layers (tissue, and the depth in mm at which it
# starts), centre and radii in mm (left, posterior, superior), tilt about the left-right axis in degrees, roughness of
# the surface relative to the radius and its wavelength in mm. A row off the midline is placed on both sides.
_ANATOMY = (
    ((("fat", 0),), (0, 0, 8), (73, 86, 108), 0, 0.015, 80),
    ((("fat", 0),), (0, -26, -48), (56, 62, 66), 0, 0.02, 60),
    ((("fat", 0),), (0, 18, -95), (60, 62, 90), 0, 0.02, 60),
    ((("muscle", 0),), (0, -88, -30), (10, 11, 22), 15, 0, 60),  # nose
    ((("fat", 0),), (75, 8, -18), (6, 15, 24), 0, 0.1, 30),  # ears
    ((("muscle", 0),), (0, 0, 8), (68, 81, 103), 0, 0.02, 50),
    ((("muscle", 0),), (0, -26, -48), (48, 55, 62), 0, 0.05, 40),
    ((("muscle", 0),), (0, 18, -95), (53, 54, 84), 0, 0.06, 40),
    ((("fat", 0),), (52, -40, -24), (7, 18, 24), 0, 0.2, 25),  # cheeks
    ((("gland", 0),), (54, 0, -50), (11, 17, 24), 0, 0.12, 25),  # parotid
    ((("fat", 0),), (26, -14, -48), (6, 11, 20), 0, 0.15, 20),  # parapharyngeal
    ((("fat", 0), ("muscle", 1.5)), (27, 50, -66), (21, 13, 34), 0, 0.1, 22),  # muscles of the neck
    ((("bone", 0), ("marrow", 2), ("bone", 4.5), ("csf", 6.5)), (0, 5, 36), (68, 80, 70), -20, 0.012, 60),
    ((("grey", 0), ("white", 4)), (0, 5, 37), (58, 70, 60), -20, 0.07, 15),
    ((("csf", 0),), (0, 0, 76), (1.2, 62, 44), 0, 0.3, 12),  # fissure between the hemispheres
    ((("grey", 0),), (17, 4, 38), (9, 24, 15), 0, 0.1, 25),  # deep grey matter
    ((("csf", 0),), (9, 2, 54), (5, 32, 13), 10, 0.15, 30),  # ventricles
    ((("bone", 0), ("marrow", 2)), (0, -4, -22), (40, 20, 12), 20, 0.15, 22),  # base of the skull
    ((("bone", 0), ("air", 8)), (52, 22, -26), (13, 16, 17), 0, 0.25, 9),  # mastoid
    ((("csf", 0), ("grey", 1.5), ("white", 6)), (0, 48, -18), (48, 30, 25), 0, 0.06, 11),  # cerebellum
    ((("csf", 0), ("white", 4)), (0, 22, -40), (16, 15, 56), -8, 0.04, 40),  # brain stem and cord
    ((("bone", 0), ("marrow", 2)), (0, 1, -84), (17, 11, 42), 0, 0.08, 14),  # vertebrae
    ((("fat", 0),), (31, -56, -13), (17, 24, 16), 0, 0.05, 30),  # orbits
    ((("muscle", 0), ("csf", 1.5)), (31, -65, -13), (12.5, 12.5, 12.5), 0, 0, 30),  # eyes
    ((("white", 0),), (27, -42, -13), (2.5, 16, 2.5), 0, 0.1, 30),  # optic nerves
    ((("mucosa", 0),), (0, -54, -34), (14, 30, 22), 0, 0.06, 25),  # nasal cavity
    ((("air", 0),), (5, -56, -34), (3.5, 27, 18), 0, 0.25, 14),
    ((("bone", 0), ("mucosa", 1.5), ("air", 3.5)), (28, -48, -42), (14, 18, 17), 0, 0.08, 30),  # maxillary sinuses
    ((("grey", 0),), (0, -44, -76), (25, 32, 18), 0, 0.06, 12),  # tongue
    ((("bone", 0),), (0, -52, -58), (26, 30, 2.5), 0, 0.1, 30),  # palate
    ((("bone", 0), ("marrow", 2.5)), (45, -30, -68), (7, 16, 30), -15, 0.05, 30),  # jaw
    ((("mucosa", 0), ("air", 2.5)), (0, -18, -58), (14, 8, 42), 0, 0.1, 25),  # pharynx
)

_EDGE = 0.9  # width in mm of the transition between two tissues: the resolution of the images


@dataclasses.dataclass(frozen=True)
class _Waves:
    """The smooth random function `sum(amplitudes * sin(vectors @ point + phases))`."""

    amplitudes: np.ndarray
    vectors: np.ndarray
    phases: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Shape:
    """An ellipsoid with a wavy surface.

    `stretch` maps the unit ball to the ellipsoid; the ellipsoid scaled by `growth` contains the waves. `radius` is the
    smallest radius in mm. `layers` are the tissues and the depths in mm at which they start.
    """

    centre: np.ndarray
    stretch: np.ndarray
    radius: float
    growth: float
    waves: _Waves
    layers: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class _Patient:
    """All random parameters of a patient. `noise` has the level and the seed of the noise."""

    shapes: list[_Shape]
    tumour: _Shape
    levels: dict[str, dict[str, float]]
    grids: dict[str, Grid]
    bias: dict[str, _Waves]
    noise: dict[str, tuple[float, np.random.SeedSequence]]


def make_synthetic_cohort(
    directory: str | os.PathLike,
    patients: int = 16,
    seed: int = 0,
    modalities: Sequence[str] = _MODALITIES,
) -> list[Path]:
    """Writes synthetic head MRI patients with one tumour each, a folder per patient.

    A patient is a head of 20 to 28 slices of 3.5 to 5.5 mm with pixels of 0.33 to 0.69 mm; some are oblique. In every
    second patient each modality has its own grid. The images have a smooth bias field of about 20% and Rician noise.
    Each patient also has look-alikes of the tumour, with the same distribution of positions, sizes and shapes. A
    look-alike has the intensity of the tumour in two modalities and differs in the third, so two modalities are not
    enough to find the tumour.

    A folder appears only when it is complete, and existing folders are kept, so a second call completes an interrupted
    cohort. A patient depends only on `seed` and its number.

    Args:
        directory: Folder for `patient_00`, `patient_01`, ...; created if missing.
        patients: Number of patients.
        seed: Seed, 0 or more.
        modalities: Images to write, of `"t1"`, `"t2"` and `"cet1"`.

    Returns:
        The patients' folders, each with an int16 image `<modality>.nii.gz` per modality and `mask.nii.gz`, uint8 with
        1 in the tumour, on the grid of the first of `modalities`.

    Raises:
        ValueError: `patients` is below 1, a modality is unknown or repeated, or the seed is negative.
    """
    modalities = tuple(modalities)
    if not modalities or len(set(modalities)) < len(modalities) or not set(modalities) <= set(_MODALITIES):
        raise ValueError(f"`modalities` must be distinct names of {_MODALITIES}. Received: modalities={modalities}")
    if patients < 1:
        raise ValueError(f"`patients` must be a positive count. Received: patients={patients}")
    if seed < 0:
        raise ValueError(f"`seed` must be 0 or a positive count. Received: seed={seed}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    folders = [directory / f"patient_{index:02d}" for index in range(patients)]

    def complete(index):
        if not folders[index].exists():
            _write_patient(folders[index], _draw_patient(seed, index), modalities)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # NumPy releases the GIL
        for number, _ in enumerate(pool.map(complete, range(patients)), start=1):
            progress("making patients", number, patients)
    return folders


def _write_patient(folder, patient, modalities):
    """Writes the files to a temporary folder, which is then renamed."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        files = Path(temporary, folder.name)
        files.mkdir()
        for modality in modalities:
            _write(files / f"{modality}.nii.gz", _image(patient, modality), patient.grids[modality])
        grid = patient.grids[modalities[0]]
        _write(files / "mask.nii.gz", _inside(patient.tumour, grid).astype(np.uint8), grid)
        try:
            files.rename(folder)
        except OSError:
            if not folder.exists():  # another process has written the same files
                raise


def _write(path, array, grid):
    # Higher compression levels are slower and gain little on noise.
    sitk.WriteImage(grid.image(array), str(path), useCompression=True, compressionLevel=1)


# Random numbers to parameters.


def _draw_patient(seed, index):
    sequence = np.random.SeedSequence([seed, index])
    rng = np.random.default_rng(sequence)
    centre = rng.uniform(-20, 20, 3)
    pose = _rotation(rng.uniform(-4, 4, 3))
    grids = _draw_grids(rng, centre, own=index % 2 == 1)
    shapes = _draw_anatomy(rng, centre, pose)
    thickness = max(grid.spacing[2] for grid in grids.values())
    blobs = _draw_blobs(rng, centre, thickness)

    tissues = {name: np.array(level) * rng.normal(1, 0.03, 3) for name, level in _TISSUES.items()}
    for channel, modality in enumerate(_MODALITIES):
        tissues[modality] = tissues["tumour"].copy()
        tissues[modality][channel] *= _LOOK_ALIKES[modality] / _TISSUES["tumour"][channel]
    levels, bias, noise = {}, {}, {}
    for channel, modality in enumerate(_MODALITIES):
        scale = rng.uniform(400, 1200)  # the scanner's arbitrary unit
        levels[modality] = {name: scale * float(level[channel]) for name, level in tissues.items()}
        bias[modality] = _draw_waves(rng, 4, 0.3, (200, 400))
        noise[modality] = (scale * 0.6 / rng.uniform(15, 25), sequence.spawn(1)[0])
    return _Patient([*shapes, *blobs], blobs[0], levels, grids, bias, noise)


def _draw_grids(rng, centre, own):
    """The grid of each modality. If `own`, the grids differ."""
    axes = _rotation(rng.uniform(-1, 1, 3) * (12, 3, 3) * (rng.random() < 0.5))

    def draw():
        thickness = rng.uniform(3.5, 5.5)
        slices = int(np.clip(rng.uniform(92, 120) / thickness, 20, 28))
        view = rng.uniform((176, 196), (200, 220))
        pixel = rng.uniform(0.39, 0.68)
        shift = axes @ rng.uniform((-4, -6, -3), (4, 2, 3))
        return _grid((*(int(mm / pixel) for mm in view), slices), (pixel, pixel, thickness), axes, centre + shift)

    shared = draw()
    return {modality: draw() if own else shared for modality in _MODALITIES}


def _grid(size, spacing, axes, centre):
    """The grid with these unit axes (columns) about a centre in mm."""
    origin = centre - axes @ (np.array(spacing) * (np.array(size) - 1) / 2)
    return Grid(size, spacing, tuple(origin.tolist()), tuple(axes.ravel().tolist()))


def _draw_anatomy(rng, centre, pose):
    size = rng.uniform(0.94, 1.0)
    shapes = []
    for layers, place, radii, tilt, roughness, wavelength in _ANATOMY:
        for side in (1, -1) if place[0] else (1,):
            place_ = np.array(place) * (side, 1, 1) * size + rng.normal(0, 0.8, 3)
            radii_ = np.array(radii) * size * rng.normal(1, 0.02, 3)
            waves = _draw_waves(rng, 8, 3 * roughness, (0.7 * wavelength, 1.5 * wavelength))
            shapes.append(_shape(centre + pose @ place_, radii_, pose @ _rotation((tilt, 0, 0)), waves, layers))
    return shapes


def _draw_blobs(rng, centre, thickness):
    """The tumour and its look-alikes, from one distribution: they differ in intensity only."""
    kinds = ("tumour", *_MODALITIES)
    lattice = _grid((34, 34, 26), (3.0, 3.0, 3.0), np.eye(3), centre)
    for attempt in itertools.count():
        if attempt % 120 == 0:  # start over: the first blobs may leave no room for the others
            blobs, taken = [], np.zeros(lattice.shape, bool)
        place = centre + rng.uniform((-25, -25, -15), (25, 25, 15))
        if any(np.linalg.norm(place - other.centre) < 26 for other in blobs):
            continue  # too close for any shape
        axes = _rotation(rng.uniform(-180, 180, 3))
        blob = _shape(place, rng.uniform(12.5, 18, 3), axes, _draw_waves(rng, 6, 0.5, (22, 50)), ())
        inside = _inside(blob, lattice, margin=1.5)
        # Without the margin, 25 to 45 mm and at least five slices.
        extent = [3 * np.any(inside, axis=others).sum() for others in ((1, 2), (0, 2), (0, 1))]
        if min(extent) >= 28 and max(extent) <= 47 and extent[0] >= 6 * thickness and not np.any(inside & taken):
            taken |= inside
            blobs.append(blob)
        if len(blobs) == len(kinds):
            order = rng.permutation(len(kinds))
            return [dataclasses.replace(blobs[i], layers=((kind, 0),)) for i, kind in zip(order, kinds, strict=True)]


def _draw_waves(rng, count, sum_of_amplitudes, wavelengths):
    amplitudes = rng.uniform(0.5, 1, count)
    directions = rng.normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return _Waves(
        amplitudes * (sum_of_amplitudes / amplitudes.sum()),
        directions * (2 * np.pi / rng.uniform(*wavelengths, (count, 1))),
        rng.uniform(0, 2 * np.pi, count),
    )


def _shape(centre, radii, axes, waves, layers):
    radius = radii.min()
    return _Shape(centre, axes * radii, radius, 1 + waves.amplitudes.sum() + _EDGE / radius, waves, layers)


def _rotation(degrees):
    """Rotation about the x, y and z axes."""
    return np.reshape(sitk.Euler3DTransform((0, 0, 0), *np.radians(degrees).tolist()).GetMatrix(), (3, 3))


# Parameters to voxels. The position of voxel [i, j] of a slice is rows[i] + columns[j], so ellipsoids and plane waves
# on a slice are products of two thin matrices.


def _image(patient, modality):
    grid, levels = patient.grids[modality], patient.levels[modality]
    sigma, seed = patient.noise[modality]
    rng = np.random.default_rng(seed)
    image = np.empty(grid.shape, np.int16)
    for number in range(grid.size[2]):
        rows, columns = _slice_points(grid, number)
        signal = np.zeros(image.shape[1:], np.float32)
        for shape in patient.shapes:
            window = _window(grid, number, shape)
            if window:
                part = signal[window]
                depth = _depth(shape, rows[window[0]], columns[window[1]])
                for tissue, begin in shape.layers:
                    share = np.clip(depth * (1 / _EDGE) + (0.5 - begin / _EDGE), 0, 1)
                    part += share * (levels[tissue] - part)
        signal *= 1 + _sum_of_waves(patient.bias[modality], rows, columns)
        real, imaginary = sigma * rng.standard_normal((2, *signal.shape), dtype=np.float32)
        image[number] = np.sqrt((signal + real) ** 2 + imaginary**2)  # Rician: the magnitude of a complex signal
    return image


def _inside(shape, grid, margin=0.0):
    """Voxels inside `shape` or within about `margin` mm of it, a bool array `(z, y, x)`."""
    inside = np.zeros(grid.shape, bool)
    for number in range(grid.size[2]):
        rows, columns = _slice_points(grid, number)
        window = _window(grid, number, shape)
        if window:
            inside[number][window] = _depth(shape, rows[window[0]], columns[window[1]]) > -margin
    return inside


def _slice_points(grid, number):
    """Positions in mm of the rows and offsets of the columns of a slice."""
    rows = grid.origin + number * grid.axes[:, 2] + np.arange(grid.size[1])[:, None] * grid.axes[:, 1]
    return rows, np.arange(grid.size[0])[:, None] * grid.axes[:, 0]


def _window(grid, number, shape):
    """The rows and columns of a slice that `shape` can reach, or `None`."""
    axes = np.reshape(grid.direction, (3, 3))
    place = axes.T @ (shape.centre - grid.origin) - (0, 0, number * grid.spacing[2])
    reach = shape.growth * np.linalg.norm(shape.stretch.T @ axes, axis=0)
    if abs(place[2]) > reach[2]:
        return None
    first, last = (np.maximum(edge / grid.spacing, 0).astype(int) for edge in (place - reach, place + reach))
    return slice(first[1], last[1] + 1), slice(first[0], last[0] + 1)


def _depth(shape, rows, columns):
    """Depth of each point of a slice inside `shape`, in mm near the surface; negative outside."""
    to_ball = np.linalg.inv(shape.stretch).T
    rows_, columns_ = (rows - shape.centre) @ to_ball, columns @ to_ball
    # |r + c|^2 = |r|^2 + |c|^2 + 2 r.c
    left = np.column_stack([(rows_**2).sum(1), np.ones(len(rows)), 2 * rows_])
    right = np.column_stack([np.ones(len(columns)), (columns_**2).sum(1), columns_])
    norm = np.sqrt(np.maximum(_thin_product(left, right), 0))
    return np.float32(shape.radius) * (_sum_of_waves(shape.waves, rows, columns) + 1 - norm)


def _sum_of_waves(waves, rows, columns):
    # sin(a + b) = sin a cos b + cos a sin b
    a, b = rows @ waves.vectors.T + waves.phases, columns @ waves.vectors.T
    left = np.concatenate([waves.amplitudes * np.sin(a), waves.amplitudes * np.cos(a)], axis=1)
    return _thin_product(left, np.concatenate([np.cos(b), np.sin(b)], axis=1))


def _thin_product(left, right):
    """`left @ right.T` without BLAS, whose threads would compete with those of the cohort."""
    return np.einsum("ik,kj->ij", left.astype(np.float32), np.ascontiguousarray(right.T, np.float32))
