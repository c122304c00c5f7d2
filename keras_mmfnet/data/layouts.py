import dataclasses
import difflib
import functools
import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from keras_mmfnet._files import read_json
from keras_mmfnet.data.case import Case, CaseError, StructureFiles, files_of
from keras_mmfnet.data.dicom import (
    SEGMENTATIONS,
    STRUCTURE_SET,
    Series,
    describe_objects,
    describe_unread,
    find_objects,
    is_dicom,
    is_draft,
    is_unread,
    walk_files,
)
from keras_mmfnet.data.image_io import IMAGE_SUFFIXES, Volume, image_stem, image_suffix
from keras_mmfnet.data.names import is_mask_of_tissue, is_named, sequence_of
from keras_mmfnet.data.structures import drawn_mask
from keras_mmfnet.recipe import DataRecipe

_log = logging.getLogger(__name__)

# What BraTS calls its files after the patient's name, in 2020 and from 2023.
_BRATS = {"t1": ("t1", "t1n"), "cet1": ("t1ce", "t1c"), "t2": ("t2", "t2w"), "flair": ("flair", "t2f")}
_ALLOW_MISSING = "patients may lack it with `data.allow_missing`, and `data.modalities` says which sequences are used"
# The number of the channel, at the end of the name of a file in a dataset.
_CHANNEL = re.compile(r"_\d{4}$")
# Of a folder of masks whose patients' images lie elsewhere: it names their folders, and each patient's mask.
MASKS_FILE = "masks.json"
# How the names of the folders begin that systems put among those of users.
_NO_PATIENTS = (
    ".",
    "__MACOSX",
    "@eaDir",
    "#recycle",
    "#snapshot",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
)
# What the file of a mask may be called.
_MASK = r"(?<![a-z])(mask|label|roi|seg|gtv)"


def find_cases(
    directory: str | os.PathLike,
    recipe: DataRecipe,
    require_mask: bool = True,
    on_error: Callable[[CaseError], None] | None = None,
) -> list[Case]:
    """Finds the patients in a folder, in any of these layouts; no voxel is read.

    | layout | what is there |
    |---|---|
    | plain | a folder per patient with one file per modality and one for the mask, named as the recipe says |
    | BraTS | a folder per patient with `<patient>_t1.nii.gz` ... `_seg.nii.gz` (2020) or `-t1n` ... `-seg` (2023) |
    | DICOM | a folder per patient with a folder per series, or with all series in one |
    | nnU-Net, Decathlon | `dataset.json`, `imagesTr` and `labelsTr`, with a file per channel or one of four axes |
    | masks apart | `masks.json`, as `mmfnet review --export` writes it: in `images` the folders of the patients, in \
`masks` the file of a patient's mask or `{structure: file}`; other patients keep their own masks |

    Image files are NIfTI, MetaImage or NRRD. A patient of DICOM series may have the mask as such a file or as
    a series; masks of several sequences are called by their modality, such as `mask_t1.nii.gz` or `ROI-T1WI.nii`. A
    series is recognised by the name of its folder and its description, or by `recipe.series`. Other files, and
    those whose name starts with a dot, are passed over. Which layouts were found is logged.

    Args:
        directory: The folder.
        recipe: What the images are called.
        require_mask: Whether a patient without a mask is an error. If not, an ambiguous mask is left out with a
            warning.
        on_error: Called with the `CaseError` of each patient that lacks something; that patient is then left out.
            `None`: all such errors are raised as one.

    Returns:
        The patients, sorted by name.

    Raises:
        CaseError: Patients lack a modality, or two files or series could be the same one.
        ValueError: The directory is missing, or there is no patient in it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        problem = "is a file" if directory.exists() else "does not exist"
        raise ValueError(f"the patients' directory {problem}. Received: {directory}")
    if (directory / MASKS_FILE).is_file():
        return _read_masks_apart(directory, recipe, require_mask, on_error)
    if (directory / "dataset.json").is_file():
        folders = [directory / "imagesTr", directory / "imagesTs"]
        return _read_dataset(directory, folders, recipe, require_mask, on_error)
    return _read_folders(directory.absolute(), recipe, require_mask, on_error)


def find_patients(
    path: str | os.PathLike, recipe: DataRecipe, on_error: Callable[[CaseError], None] | None = None
) -> list[Case]:
    """Finds the patients to segment: one or many, in any layout of `find_cases`; no voxel is read.

    Masks are taken where they are, but none is needed. The path may be:

    - a patient's folder, or a folder of such folders;
    - a dataset of nnU-Net or the Decathlon: the cases in its `imagesTs`, or else in its `imagesTr`;
    - a folder with images as in such a dataset, with a `dataset.json` in it or one folder above;
    - one case in such a folder: its name (`imagesTs/case_01`) or one of its files (`imagesTs/case_01_0000.nii.gz`).

    A folder of DICOM series is one patient if it holds one series of each modality.

    Args:
        path: The patient or the folder of patients.
        recipe: What the images are called.
        on_error: Called with the `CaseError` of each of many patients that lacks something; that patient is then left
            out. `None`: all such errors are raised as one.

    Returns:
        The patients, sorted by name.

    Raises:
        CaseError: Patients lack a modality, or two files or series could be the same one.
        ValueError: The path is none of these.
    """
    path = Path(os.path.abspath(path))
    if not path.is_dir():
        return _find_dataset_case(path, recipe)
    if (path / MASKS_FILE).is_file():
        return _read_masks_apart(path, recipe, False, on_error)
    if any(_find_files(path, _stems(path), recipe)[1].values()):
        return [read_case_folder(path, recipe, require_mask=False)]
    root = _dataset_root(path)
    if root and (folders := [folder for folder in _image_folders(path, root) if _stems(folder)][:1]):
        return _read_dataset(root, folders, recipe, False, on_error)
    if any(_CHANNEL.search(stem) for stem in _stems(path)):
        raise _no_dataset(path)
    folders, every = _folders(path), len(recipe.modalities)
    complete = list(itertools.islice((folder for folder in folders if _holds(folder, recipe, every)), 2))
    # Two complete patients cannot be one; a single folder that is complete is the patient. Otherwise the DICOM series
    # in all of the folders may be those of one patient.
    several = bool(folders) and len(complete) == min(2, len(folders))
    if not several and (_holds_dicom(path) or (_stems(path) and not complete)):
        try:
            case = read_case_folder(path, recipe, require_mask=False)
            # Of several studies nobody knows whether they are of one patient, unless they lie in one folder.
            studies = {getattr(image, "study", "") for image in case.images.values()} - {""}
            if len(studies) < 2 or not folders:
                return [case]
        except CaseError:
            inside = any(_holds(folder, recipe, 2) for folder in folders)
            if not inside and (_holds(path, recipe, 2) or not _hint(path, recipe)):
                raise
    return _read_folders(path, recipe, False, on_error)


def read_case_folder(folder: str | os.PathLike, recipe: DataRecipe, require_mask: bool = True) -> Case:
    """Finds the files of the one patient in a folder, as `find_cases` does; no voxel is read.

    Args:
        folder: The patient's folder; its name is the patient's name.
        recipe: What the files are called.
        require_mask: Whether a missing mask is an error; if not, neither are missing modalities, where the recipe has
            `allow_missing`.

    Returns:
        The patient.

    Raises:
        CaseError: The folder, an image or a required mask is missing, or two files or series could be the same one.
    """
    return _read_folder(Path(folder).absolute(), recipe, require_mask)[1]


def reviewed_patients(folder: str | os.PathLike) -> list[str]:
    """The patients whose masks were accepted or corrected, if a folder is one that `mmfnet review --export` wrote.

    Args:
        folder: A folder of patients.

    Returns:
        Their names; none for another folder.

    Raises:
        ValueError: `masks.json` there is damaged.
    """
    path = Path(folder, MASKS_FILE)
    return list(read_json(path).get("masks", {})) if path.is_file() else []


def _read_masks_apart(directory, recipe, require_mask, on_error):
    """The patients of the folders that `masks.json` names. A mask there counts, as drawn on the reference modality."""
    about, where = read_json(directory / MASKS_FILE), directory / MASKS_FILE
    if not (isinstance(about.get("images"), list) and isinstance(about.get("masks"), dict)):
        raise ValueError(
            f"{where}: `images`, a list, and `masks`, an object, are expected. Received: {str(about)[:99]}"
        )
    cases = {}
    for place in about["images"]:
        # Of a dataset, `find_patients` would only find those to segment.
        if (directory / place / "dataset.json").is_file():
            found = find_cases(directory / place, recipe, False, on_error)
        else:
            found = find_patients(directory / place, recipe, on_error)
        for case in found:
            if case.name in cases and case.images != cases[case.name].images:
                raise ValueError(f"{where}: patients of different names are expected. Received: {case.name} twice")
            cases[case.name] = case
    if gone := [name for name in about["masks"] if name not in cases]:
        raise ValueError(f"{where}: masks of patients in {', '.join(about['images'])} are expected. Received: {gone}")
    for name, files in about["masks"].items():
        apart = isinstance(files, dict)
        paths = {one: directory / file for one, file in (files if apart else {"": files}).items()}
        if missing := [path for path in paths.values() if not path.is_file()]:
            raise ValueError(f"{where}: files of masks are expected. Received: {missing[0]}, which does not exist")
        mask = StructureFiles(paths) if apart else paths[""]
        cases[name] = dataclasses.replace(cases[name], mask={recipe.modalities[0]: mask})
    without = [case.name for case in cases.values() if require_mask and case.mask is None]
    if without:
        _log.info("Without a mask, and not used: %s", ", ".join(without))
    return [case for name, case in sorted(cases.items()) if name not in without]


def _read_folders(directory, recipe, require_mask, on_error):
    """The patients that have a folder each."""
    folders = _folders(directory)
    files = ", ".join([*recipe.modalities, *([recipe.mask] if require_mask else [])])
    return _read_all(
        [functools.partial(_read_folder, folder, recipe, require_mask) for folder in folders],
        on_error,
        f"the patients' directory must hold one folder per patient with the files {files} "
        f"({', '.join(IMAGE_SUFFIXES)}) or with DICOM series, or a dataset.json",
        f"{directory}, with {len(folders)} folders and no such patient",
        functools.partial(_hint, directory, recipe),
    )


def _read_all(readers, on_error, expected, received, hint=str):
    """The cases that the readers find, sorted by name; each gives the layout and a `Case`, or `None` to pass over."""
    cases, layouts, errors = [], Counter(), []
    for read in readers:
        try:
            found = read()
        except CaseError as error:
            errors.append(error)
            if on_error:
                on_error(error)
        else:
            if found:
                layouts[found[0]] += 1
                cases.append(found[1])
    meant = "" if cases else hint()
    if errors and not meant and not (on_error and cases):
        raise CaseError.of_several(errors, len(cases) + len(errors))
    if not cases:
        raise ValueError(f"{expected}{meant}. Received: {received}")
    for layout, count in sorted(layouts.items()):
        _log.info("%s: %d patient%s", layout, count, "" if count == 1 else "s")
    return sorted(cases, key=lambda case: case.name)


def _hint(directory, recipe):
    """The folder that was probably meant, as the end of a sentence; an empty text if this one looks right."""
    folders = _folders(directory)
    if any(_holds(folder, recipe, 2) for folder in folders):
        return ""
    if _dataset_root(directory.parent) == directory.parent:
        return f"; did you mean the dataset {directory.parent}"
    if _holds(directory, recipe, 2):
        return f"; this is one patient's folder: did you mean the parent folder {directory.parent}"
    for folder in folders:
        if (folder / "dataset.json").is_file() or any(_holds(inner, recipe, 2) for inner in _folders(folder)):
            return f"; the patients lie one folder deeper: did you mean {folder}"
    return ""


def _names(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def _stems(folder):
    """The image files in a folder, `{name without the ending: paths}`."""
    files = {}
    for name in _names(folder):
        if image_suffix(name) and name[0] != ".":
            files.setdefault(image_stem(name), []).append(folder / name)
    return files


def _folders(directory):
    return sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(_NO_PATIENTS))


def _read_folder(folder, recipe, require_mask):
    """The name of the layout, and the `Case`."""
    layout, images, find_mask = _find_images(folder, recipe, recipe.allow_missing)
    return layout, Case(folder.name, images, _mask(find_mask, require_mask))


def _holds(folder, recipe, count):
    """Whether a folder holds so many of one patient's modalities, or all if they are fewer."""
    try:
        return len(_find_images(folder, recipe, optional=True)[1]) >= min(count, len(recipe.modalities))
    except CaseError:
        return False


def _mask(find, required):
    """The mask that `find` gives; one that is ambiguous is an error only where a mask is required."""
    try:
        return find(required)
    except CaseError as error:
        if required:
            raise
        _log.warning("%s; the mask is not used", error)
        return None


def _find_images(folder, recipe, optional):
    """The name of the layout, the images by modality, and a function that finds the mask."""
    if not folder.is_dir():
        raise CaseError(f"{folder.name}: must be a folder with one patient's files. Received: {folder}")
    files = _stems(folder)
    layout, images = _find_files(folder, files, recipe)
    if not any(images.values()) and _holds_dicom(folder):
        return "DICOM", *_find_dicom(folder, recipe, optional)
    if optional and any(images.values()) and not all(images.values()) and _holds_dicom(folder):
        series = {one: (one.description, one.folder.name) for one in find_objects(folder, folder.name)[0]}
        if hidden := [m for m, path in images.items() if not path and _named(series, m, recipe)]:
            raise CaseError(
                f"{folder.name}: {folder}: must hold all sequences as image files, or all as DICOM series. Received: "
                f"{', '.join(path.name for path in images.values() if path)}, and DICOM series of {', '.join(hidden)}"
            )
    for modality, path in images.items():
        is_near = functools.partial(is_named, sequence=sequence_of(modality) or modality)
        # A file with a misspelt name is not a missing sequence.
        meant = not path and [near for near in _near(files, is_near) if near not in images.values()]
        if not path and (meant or not (optional and any(images.values()))):
            raise _missing(folder, files, modality, is_near, "data.modalities", f"; {_ALLOW_MISSING}")
    images = {modality: path for modality, path in images.items() if path}
    others = {stem: [path for path in paths if path not in images.values()] for stem, paths in files.items()}
    return layout, images, functools.partial(_find_mask, folder, others, recipe)


def _find_files(folder, files, recipe):
    """The name of the layout, and by modality the file or `None`."""
    images, layout = {}, "plain"
    for modality in recipe.modalities:
        images[modality] = _find_file(folder, files, [modality])
        if not images[modality]:
            images[modality] = _find_file(folder, files, _brats_stems(folder, _BRATS.get(modality, (modality,))))
            layout = "BraTS" if images[modality] else layout
    return layout, images


def _find_file(folder, files, stems, patient=None):
    """The one of `files`, as from `_stems`, with one of these names before its ending, or `None`."""
    found = [path for stem in stems for path in files.get(stem, ())]
    if len(found) > 1:
        received = ", ".join(path.name for path in found)
        raise CaseError(f"{patient or folder.name}: {folder / stems[0]}: must be one file. Received: {received}")
    return found[0] if found else None


def _brats_stems(folder, endings):
    return [f"{folder.name}{separator}{ending}" for separator in "_-" for ending in endings]


def _missing(folder, files, stem, is_near, field, remedy=""):
    """The error for a file that is missing; with the files of the patient whose names are near."""
    near = [path.name for path in _near(files, is_near)]
    expected = f"a file of that name with one of the endings {', '.join(IMAGE_SUFFIXES)} is expected{remedy}"
    if near:
        expected = f"did you mean {' or '.join(near)} for {stem}? Rename it, or say in `{field}` what it is called"
    received = ", ".join(_names(folder)) or ("a folder without files" if _folders(folder) else "an empty folder")
    return CaseError(f"{folder.name}: {folder / stem}: is missing; {expected}. Received: {received}")


def _near(files, is_near):
    """The image files whose names are near; masks only if masks are looked for."""
    near = [stem for stem in files if is_near(stem) and (is_near == _is_mask or not _is_mask(stem))]
    return [path for stem in near for path in files[stem]]


def _is_mask(name):
    return re.search(_MASK, name.lower()) is not None


def _find_mask(folder, files, recipe, required):
    """The source of the mask, or of the mask drawn on each modality, or `None`."""
    if names := recipe.named_structures:
        return _find_structures(folder, files, names, recipe, required)
    mask = _find_file(folder, files, [recipe.mask, *_brats_stems(folder, ["seg"])])
    mask = mask or _of_each(folder, files, recipe.mask, recipe)
    if required and not mask:
        raise _missing(folder, files, recipe.mask, _is_mask, "data.mask")
    return mask


def _of_each(folder, files, stem, recipe):
    """The file of a mask that was drawn on each modality, `{modality: path}`, or `None`."""
    found = {m: _find_file(folder, files, [f"{stem}_{m}", f"{m}_{stem}"]) for m in recipe.modalities}
    return {modality: path for modality, path in found.items() if path} or None


def _find_structures(folder, files, names, recipe, required):
    """The files of the structures, or those drawn on each modality, or `None`."""
    found = {}
    for structure, pattern in names.items():
        fits = functools.partial(re.fullmatch, pattern, flags=re.IGNORECASE)
        path = _find_file(folder, files, [stem for stem in files if fits(stem)])
        drawn = {m: _find_file(folder, files, [s for s in files if _less(s, m, fits)]) for m in recipe.modalities}
        drawn = {None: path} if path else {modality: path for modality, path in drawn.items() if path}
        for modality, path in drawn.items():
            found.setdefault(modality, {})[structure] = path
    # One that lacks some is no mask, also where none is required.
    lacking = [name for name in names if not any(name in some for some in found.values())]
    if lacking and (found or required) and not recipe.allow_empty:
        raise _missing(folder, files, names[lacking[0]], _is_mask, f"data.structures.{lacking[0]}")
    if not found and required:
        raise _missing(folder, files, " or ".join(names.values()), _is_mask, "data.structures")
    if len(found) > 1 and len({frozenset(some) for some in found.values()}) > 1:
        listed = "; ".join(f"{', '.join(some)} on {modality or 'none'}" for modality, some in found.items())
        raise CaseError(
            f"{folder.name}: {folder}: must hold the files of all structures for each sequence they were drawn on. "
            f"Received: {listed}"
        )
    found = {modality: StructureFiles(some) for modality, some in found.items()}
    return found.get(None) or found or None


def _less(stem, modality, fits):
    """Whether a name without its modality at either end fits a pattern."""
    return any(fits(s) for s in (stem.removesuffix(f"_{modality}"), stem.removeprefix(f"{modality}_")) if s != stem)


# --- DICOM


def _holds_dicom(folder):
    return any(path.suffix.lower() == ".dcm" or is_dicom(path) or is_unread(path) for path in walk_files(folder))


def _named(sources, modality, recipe):
    """Those of the sources, given with `(name, folder)`, that are called as a modality is."""
    pattern = recipe.series.get(modality)

    def fits(source, name, folder):
        # A pattern may choose by number, time or echo.
        labelled = f"{name} {source.label}" if pattern and isinstance(source, Series) else name
        return is_named(name, modality, pattern, folder) or is_named(labelled, modality, pattern, folder)

    return [source for source, (name, folder) in sources.items() if fits(source, name, folder)]


def _find_dicom(folder, recipe, optional):
    """The series of one patient by modality, and a function that finds the mask among the others and files."""
    own, name = recipe.series.get(recipe.mask), re.escape(recipe.mask.lower())
    # Of files, and of series, which may have to do with segmentation and be no mask.
    file_pattern = own or rf"(?<![a-z])({name}|roi|seg|gtv)"
    pattern = own or rf"(?<![a-z])({name}|(roi|seg(mentations?$)?|gtv[pn]?)(?![a-z]))"
    meant = [m for m in recipe.modalities if re.search(rf"{pattern}|number", recipe.series.get(m, "").lower())]
    images, masks = {}, {}
    series, others = find_objects(folder, folder.name)
    drawn = [path for kind in (STRUCTURE_SET, *SEGMENTATIONS) for path in others.get(kind, ())]
    if drafts := [path for path in drawn if is_draft(path, folder.name)]:
        names = ", ".join(path.name for path in drafts)
        _log.info("%s: not used as masks, as no expert has reviewed them: %s", folder.name, names)
        left = {kind: [path for path in paths if path not in drafts] for kind, paths in others.items()}
        others = {kind: paths for kind, paths in left.items() if paths}
    for one in series:
        name = one.description, str(one.folder.relative_to(folder))
        is_mask = own and re.search(own, " ".join(name[::-1]).lower())
        if not own and not any(_named({one: name}, modality, recipe) for modality in meant):
            is_mask = any(re.search(pattern, text.lower()) for text in (one.description, os.path.basename(name[1])))
        (masks if is_mask else images)[one] = name
    for path in walk_files(folder):
        stem = (image_stem(path) or "").lower()
        other = not own and stem != recipe.mask.lower() and is_mask_of_tissue(stem)
        if stem and re.search(file_pattern, path.name.lower()) and not other:
            masks[path] = path.name, str(path.parent.relative_to(folder))
    chosen = {modality: _choose(folder, images, masks, modality, recipe, optional) for modality in recipe.modalities}
    if not any(chosen.values()):
        _choose(folder, images, masks, recipe.modalities[0], recipe, False)
    chosen = {modality: series for modality, series in chosen.items() if series}

    def find_mask(required):
        # Structures count where they are asked for, or where there is no mask as an image.
        named = recipe.named_structures
        ignored = masks and not named
        unused = {kind: others[kind] for kind in (STRUCTURE_SET, *SEGMENTATIONS) if ignored and kind in others}
        if unused:
            _log.info("%s: the mask is an image; not used as masks: %s", folder.name, describe_objects(unused))
        drawn = None if ignored else drawn_mask(others, series, named, folder.name, recipe.allow_empty)
        lacking = {name: text for name, text in named.items() if drawn is None or name not in drawn.files}
        in_files = {}
        if lacking:
            files = {}
            for path in filter(image_suffix, walk_files(folder)):
                files.setdefault(image_stem(path), []).append(path)
            in_files = _find_structures(folder, files, lacking, recipe, False)
        if drawn is None:
            if required and named and not in_files:
                listed = ", ".join(map(repr, named.values()))
                raise CaseError(
                    f"{folder.name}: {folder}: must hold a DICOM structure set or segmentation with {listed}, or a "
                    f"file for each, as --structure says. Received: none{describe_unread(folder)}"
                )
            return in_files if named else _choose_masks(folder, masks, recipe, others, required)
        if in_files:
            raise CaseError(
                f"{folder.name}: {folder}: must hold all structures in one DICOM file or in a file each. "
                f"Received: {drawn} and a file of {', '.join(lacking)}"
            )
        [source, *_] = files_of(drawn)
        modality = next((modality for modality, one in chosen.items() if one == source.series), None)
        return {modality: drawn} if modality else drawn

    return chosen, find_mask


def _choose(folder, named, masks, modality, recipe, optional):
    """The one series whose names are a modality's, or `None` if it is `optional` and there is none."""
    found = _named(named, modality, recipe)
    if len(found) == 1:
        return found[0]
    if optional and not found:
        return None
    listed = "; ".join(str(source) for source in found or named) or "no series"
    if masks and not found:
        listed += f"; and taken for masks: {'; '.join(map(str, masks))}"
    listed += describe_unread(folder)
    names = f"matches {recipe.series[modality]!r}" if modality in recipe.series else "names it"
    raise CaseError(
        f"{folder.name}: {folder}: must hold one series of {modality} (of `data.modalities`), whose folder, "
        f"description or number {names}; "
        f"`data.series.{modality}` may give another pattern{'' if found else f'; {_ALLOW_MISSING}'}. Received: {listed}"
    )


def _choose_masks(folder, named, recipe, others, required):
    """The one mask, or the one of each modality, or `None`."""
    masks = {modality: found for modality in recipe.modalities if (found := _named(named, modality, recipe))}
    if len(named) == 1:
        [source] = named
        return {modality: source for modality in masks} if len(masks) == 1 else source
    for modality, found in masks.items():
        if len(found) > 1:
            listed = "; ".join(map(str, found))
            raise CaseError(f"{folder.name}: {folder}: must hold one mask of {modality}. Received: {listed}")
    if not masks and (named or required):
        listed = "; ".join(map(str, named)) or "none" + (
            f" that is read, and {describe_objects(others)}" if others else ""
        )
        raise CaseError(
            f"{folder.name}: {folder}: must hold one mask, named {recipe.mask!r} or ROI, or one for each of "
            f"{', '.join(recipe.modalities)}. Received: {listed}{describe_unread(folder)}"
        )
    return {modality: found[0] for modality, found in masks.items()} or None


# --- datasets of nnU-Net and the Medical Segmentation Decathlon


def _dataset_root(folder):
    """The folder or the one above, where the `dataset.json` is; or `None`."""
    return next((root for root in (folder, folder.parent) if (root / "dataset.json").is_file()), None)


def _image_folders(folder, root):
    """Where the images of patients to be segmented may lie."""
    if folder.name.startswith("labels"):
        meant = folder.with_name(folder.name.replace("labels", "images"))
        raise ValueError(f"{folder}: must be a folder of images; did you mean {meant}. Received: a folder of masks")
    return [root / "imagesTs", root / "imagesTr", root] if folder == root else [folder]


def _no_dataset(path):
    return ValueError(
        f"{path}: must have a dataset.json beside the images or one folder above, as the dataset has that the network "
        f"was trained on: its `channel_names` say which modality is channel 0000. Received: no dataset.json"
    )


def _case_name(root):
    """The function from the name of an image file of a dataset, without its ending, to the case's.

    Where images and labels are called alike, a file has all channels; otherwise its name ends with that of a channel.
    """
    alike = _stems(root / "labelsTr").keys() & _stems(root / "imagesTr").keys()
    return str if alike else functools.partial(_CHANNEL.sub, "")


def _find_dataset_case(path, recipe):
    """The case of a dataset that a name or a file stands for, in a list."""
    folder, suffix, root = path.parent, image_suffix(path), _dataset_root(path.parent)
    if root and (suffix or not path.exists()):
        case_name = _case_name(root)
        name = case_name(image_stem(path) or path.name)
        for images in _image_folders(folder, root):
            if name in map(case_name, _stems(images)):
                return _read_dataset(root, [images], recipe, False, None, name)
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir()] if folder.is_dir() else [], 1)
        raise ValueError(f"{path}: does not exist{f'; did you mean {near[0]}' if near else ''}. Received: {path.name}")
    if (suffix or is_dicom(path)) and _holds(folder, recipe, 2):
        raise ValueError(f"{path}: must be a folder; did you mean the patient's, {folder}. Received: a file")
    if suffix:
        raise _no_dataset(path)
    raise ValueError(f"{path}: must be a folder, or a case of a dataset. Received: a file")


def _read_dataset(root, folders, recipe, require_mask, on_error, only=None):
    """The patients that a `dataset.json` describes, in some folders: all, or `only` the one of this name."""
    path, optional = root / "dataset.json", recipe.allow_missing
    layout, numbers, channels = _channels(path, recipe, optional)

    def read(folder, name, files, labels, label_files):
        mask = _mask(lambda _: _find_file(labels, label_files, [name], name), require_mask)
        if not mask and require_mask and folder.name == "imagesTs":
            return None
        # A channel is a file of its own, or a volume of the patient's.
        whole = _find_file(folder, files, [name], name)
        found = {m: _find_file(folder, files, [f"{name}_{number:04d}"], name) for m, number in numbers.items()}
        if whole and any(found.values()):
            raise CaseError(
                f"{name}: {folder}: must hold a file for each channel or one of all channels. "
                f"Received: {', '.join(file.name for file in (whole, *found.values()) if file)}"
            )
        if other := sorted(files.keys() - {name, *(f"{name}_{number:04d}" for number in channels)}):
            listed = ", ".join(f"{name}_{number:04d}" for number in channels)
            raise CaseError(
                f"{name}: {folder}: must hold the channels that {path.name} names, {listed}. "
                f"Received: {', '.join(other)}"
            )
        if whole:
            # Of one channel it has three axes.
            found = {m: Volume(whole, number) if len(channels) > 1 else whole for m, number in numbers.items()}
        found = {modality: source for modality, source in found.items() if source}
        if not (len(found) == len(numbers) or (optional and found)) or (require_mask and not mask):
            wanted = ", ".join(f"{name}_{number:04d}" for number in numbers.values())
            label = f", and {labels.name} {name}" if require_mask else ""
            received = [*files, f"{'a' if mask else 'no'} label"]
            raise CaseError(
                f"{name}: {folder}: must hold {wanted} or {name}{label}; {_ALLOW_MISSING}. "
                f"Received: {', '.join(received)}"
            )
        return layout, Case(name, found, mask)

    readers, case_name = [], _case_name(root)
    for folder in folders:
        labels, cases = folder.with_name(folder.name.replace("images", "labels")), {}
        label_files = _stems(labels) if labels != folder else {}
        for stem, paths in _stems(folder).items():
            cases.setdefault(case_name(stem), {})[stem] = paths
        for name, files in cases.items():
            if only in (None, name):
                readers.append(functools.partial(read, folder, name, files, labels, label_files))
    return _read_all(readers, on_error, f"{path}: must lie beside imagesTr with images", f"no patient in {root}")


def _channels(path, recipe, optional):
    """The name of the layout, the number of each modality's channel, and the names of all channels by number."""
    try:
        described = json.loads(path.read_text(encoding="utf-8-sig"))
        channels = described.get("channel_names") or described["modality"]
        channels = {int(number): str(name).lower() for number, name in channels.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path}: must name the channels of the images. Received: {error!r}") from error
    numbers = {}
    for modality in recipe.modalities:
        found = [number for number, name in channels.items() if name == modality.lower()]
        found = found or _named({number: (name, "") for number, name in channels.items()}, modality, recipe)
        if len(found) != 1 and (found or not optional):
            raise ValueError(
                f"{path}: must name one channel of {modality}; `data.series.{modality}` may give a pattern for its "
                f"name. Received: {', '.join(channels.values())}"
            )
        if found:
            numbers[modality] = found[0]
    return "nnU-Net" if "channel_names" in described else "Medical Segmentation Decathlon", numbers, channels
