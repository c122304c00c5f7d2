import json
import logging
import re
from collections import Counter
from pathlib import Path

from keras_mmfnet.data.case import Case, CaseError
from keras_mmfnet.data.dicom import find_series, is_dicom
from keras_mmfnet.data.image_io import IMAGE_SUFFIXES, Volume, image_suffix

_CONTRAST = r"((?<![a-z])(ce|gd|gad[a-z]*|contrast|post|km|c\+)|\+ ?c)(?![a-z])"
_FLAIR = r"flair|dark.?fluid"
_CET1 = rf"t1.*({_CONTRAST})|({_CONTRAST}).*t1|t1[ _-]?(ce|c|gd)(?![a-z])|cet1"
# What a series or a channel is called, by modality; searched in lower case.
_PATTERNS = {
    "cet1": _CET1,
    "t1": rf"^(?!.*({_CET1})).*t1",
    "t2": rf"^(?!.*({_FLAIR})).*t2",
    "flair": _FLAIR,
}
# What BraTS calls its files after the patient's name, in 2020 and from 2023.
_BRATS = {"t1": ("t1", "t1n"), "cet1": ("t1ce", "t1c"), "t2": ("t2", "t2w"), "flair": ("flair", "t2f")}
_BRATS_MASK = ("seg",)


def find_cases(directory, recipe, require_mask=True, on_error=None):
    """Finds the patients in a folder, in any of these layouts; no voxel is read.

    | layout | what is there |
    |---|---|
    | plain | a folder per patient with one file per modality and one for the mask, named as the recipe says |
    | BraTS | a folder per patient with `<patient>_t1.nii.gz` ... `_seg.nii.gz` (2020) or `-t1n` ... `-seg` (2023) |
    | DICOM | a folder per patient with a folder per series, or with all series in one |
    | nnU-Net, Decathlon | `dataset.json`, `imagesTr` and `labelsTr`, with a file per channel or one of four axes |

    Image files are NIfTI, MetaImage, NRRD or MINC. A patient of DICOM series may have the mask as such a file or as a
    series; masks of several sequences are called by their modality, such as `mask_t1.nii.gz` or `ROI-T1WI.nii`. What
    a series is, follows from the names of its folder and of the series; `recipe.series` says it where they do not.
    Other files, and those whose name starts with a dot, are passed over. Which layouts were found is logged.

    Args:
        directory: The folder.
        recipe: A `DataRecipe`.
        require_mask: Whether a patient without a mask is an error. If not, one without some of the modalities is none
            either, where the recipe has `allow_missing`.
        on_error: Called with the `CaseError` of each patient that lacks something; that patient is then left out.
            `None`: the first such error is raised.

    Returns:
        A list of `Case`, sorted by name.

    Raises:
        CaseError: A patient lacks a modality, or two files or series could be the same one.
        ValueError: The directory is missing, or there is no patient in it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        problem = "is a file" if directory.exists() else "does not exist"
        raise ValueError(f"the patients' directory {problem}. Received: {directory}")
    if (directory / "dataset.json").is_file():
        return _find_dataset(directory, recipe, require_mask, on_error)
    folders = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    cases, layouts = [], Counter()
    for folder in folders:
        try:
            layout, case = _read_folder(folder.absolute(), recipe, require_mask)
        except CaseError as error:
            if on_error is None:
                raise
            on_error(error)
        else:
            cases.append(case)
            layouts[layout] += 1
    if not cases:
        files = ", ".join([*recipe.modalities, *([recipe.mask] if require_mask else [])])
        raise ValueError(
            f"the patients' directory must hold one folder per patient with the files {files} "
            f"({', '.join(IMAGE_SUFFIXES)}) or with DICOM series, or a dataset.json. "
            f"Received: {directory}, with {len(folders)} folders and no such patient"
        )
    _log(layouts)
    return cases


def read_case_folder(folder, recipe, require_mask=True):
    """Finds the files of the one patient in a folder, as `find_cases` does; no voxel is read.

    Args:
        folder: The patient's folder; its name is the patient's name.
        recipe: A `DataRecipe`, which says what the files are called.
        require_mask: Whether a missing mask is an error; if not, neither are missing modalities, where the recipe has
            `allow_missing`.

    Returns:
        A `Case`.

    Raises:
        CaseError: The folder, an image or a required mask is missing, or two files or series could be the same one.
    """
    return _read_folder(Path(folder).absolute(), recipe, require_mask)[1]


def _log(layouts):
    for layout, count in sorted(layouts.items()):
        logging.getLogger(__name__).info("%s: %d patient%s", layout, count, "" if count == 1 else "s")


def _read_folder(folder, recipe, require_mask):
    """The name of the layout, and the `Case`."""
    if not folder.is_dir():
        raise CaseError(f"{folder.name}: must be a folder with one patient's files. Received: {folder}")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    images, layout = {}, "plain"
    for modality in recipe.modalities:
        images[modality] = _find_file(folder, names, [modality])
        if not images[modality]:
            images[modality] = _find_file(folder, names, _brats_stems(folder, _BRATS.get(modality, (modality,))))
            layout = "BraTS" if images[modality] else layout
    if not any(images.values()) and _holds_dicom(folder):
        return "DICOM", _read_dicom(folder, recipe, require_mask)
    for modality, path in images.items():
        if not path and not (_may_be_missing(recipe, require_mask) and any(images.values())):
            raise _missing(folder, names, modality)
    images = {modality: path for modality, path in images.items() if path}
    return layout, Case(folder.name, images, _find_mask(folder, names, recipe, require_mask))


def _may_be_missing(recipe, require_mask):
    """Whether a patient may lack modalities: one to be segmented, by a network that was trained for it."""
    return recipe.allow_missing and not require_mask


def _find_file(folder, names, stems):
    """The one image file with one of these names before its ending, or `None`."""
    found = [name for name in names if (suffix := image_suffix(name)) and name[: -len(suffix)] in stems]
    if len(found) > 1:
        raise CaseError(f"{folder.name}: {folder / stems[0]}: must be one file. Received: {', '.join(found)}")
    return folder / found[0] if found else None


def _brats_stems(folder, endings):
    return [f"{folder.name}{separator}{ending}" for separator in "_-" for ending in endings]


def _missing(folder, names, stem):
    return CaseError(
        f"{folder.name}: {folder / stem}: is missing; a file of that name with one of the endings "
        f"{', '.join(IMAGE_SUFFIXES)} is expected. Received: {', '.join(names) or 'an empty folder'}"
    )


def _find_mask(folder, names, recipe, required):
    """The path of the mask, or of the mask drawn on each modality, or `None`."""
    mask = _find_file(folder, names, [recipe.mask, *_brats_stems(folder, _BRATS_MASK)])
    if mask:
        return mask
    masks = {m: _find_file(folder, names, [f"{recipe.mask}_{m}", f"{m}_{recipe.mask}"]) for m in recipe.modalities}
    masks = {modality: path for modality, path in masks.items() if path}
    if required and not masks:
        raise _missing(folder, names, recipe.mask)
    return masks or None


# --- DICOM


def _holds_dicom(folder):
    return any(is_dicom(path) or path.suffix.lower() == ".dcm" for path in folder.rglob("*") if path.is_file())


def _pattern(modality, recipe):
    return recipe.series.get(modality) or _PATTERNS.get(modality) or rf"(?<![a-z0-9]){re.escape(modality)}(?![a-z0-9])"


def _read_dicom(folder, recipe, require_mask):
    """The `Case` of one patient's DICOM series and the masks beside them."""
    mask_pattern = recipe.series.get(recipe.mask) or rf"(?<![a-z])({re.escape(recipe.mask.lower())}|roi|seg|gtv)"
    images, masks = {}, {}
    for one in find_series(folder, folder.name):
        name = f"{one.folder.relative_to(folder)} {one.description}".lower()
        (masks if re.search(mask_pattern, name) else images)[one] = name
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder)).lower()
        if image_suffix(path) and not path.name.startswith(".") and re.search(mask_pattern, path.name.lower()):
            masks[path] = name
    optional = _may_be_missing(recipe, require_mask)
    chosen = {modality: _choose(folder, images, modality, recipe, optional) for modality in recipe.modalities}
    return Case(
        folder.name,
        {modality: series for modality, series in chosen.items() if series},
        _choose_masks(folder, masks, recipe, require_mask),
    )


def _choose(folder, named, modality, recipe, optional):
    """The one series whose names are a modality's, or `None` if it is `optional` and there is none."""
    pattern = _pattern(modality, recipe)
    found = [source for source, name in named.items() if re.search(pattern, name, re.IGNORECASE)]
    if len(found) == 1:
        return found[0]
    if optional and not found:
        return None
    listed = "; ".join(str(source) for source in found or named) or "no series"
    names = f"matches {pattern!r}" if modality in recipe.series else "names it"
    raise CaseError(
        f"{folder.name}: {folder}: must hold one series of {modality}, one whose folder or description {names}; the "
        f"recipe's `series` may say another pattern. Received: {listed}"
    )


def _choose_masks(folder, named, recipe, required):
    """The one mask, or the one of each modality, or `None`."""
    masks = {}
    if len(named) == 1:
        [(source, name)] = named.items()
        drawn_on = [m for m in recipe.modalities if re.search(_pattern(m, recipe), name, re.IGNORECASE)]
        return {drawn_on[0]: source} if len(drawn_on) == 1 else source
    for modality in recipe.modalities:
        pattern = _pattern(modality, recipe)
        found = [source for source, name in named.items() if re.search(pattern, name, re.IGNORECASE)]
        if len(found) > 1:
            listed = "; ".join(map(str, found))
            raise CaseError(f"{folder.name}: {folder}: must hold one mask of {modality}. Received: {listed}")
        if found:
            masks[modality] = found[0]
    if not masks and (named or required):
        listed = "; ".join(map(str, named)) or "none"
        raise CaseError(
            f"{folder.name}: {folder}: must hold one mask, named {recipe.mask!r} or ROI, or one for each of "
            f"{', '.join(recipe.modalities)}. Received: {listed}"
        )
    return masks or None


# --- datasets of nnU-Net and the Medical Segmentation Decathlon


def _find_dataset(directory, recipe, require_mask, on_error):
    """The patients that a `dataset.json` describes."""
    path = directory / "dataset.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        channels = described.get("channel_names") or described["modality"]
        channels = {int(number): str(name).lower() for number, name in channels.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path}: must name the channels of the images. Received: {error!r}") from error
    numbers = {}
    for modality in recipe.modalities:
        found = [number for number, name in channels.items() if name == modality.lower()] or [
            number for number, name in channels.items() if re.search(_pattern(modality, recipe), name, re.IGNORECASE)
        ]
        if len(found) != 1:
            raise ValueError(f"{path}: must name one channel of {modality}. Received: {', '.join(channels.values())}")
        numbers[modality] = found[0]

    cases, layout = [], "nnU-Net" if "channel_names" in described else "Medical Segmentation Decathlon"
    for folder, labels in (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs")):
        files = sorted(file for file in (directory / folder).glob("*") if image_suffix(file) and file.name[0] != ".")
        stems = {file.name[: -len(image_suffix(file))]: file for file in files}
        names = dict.fromkeys(re.sub(r"_\d{4}$", "", stem) for stem in stems)
        for name in names:
            mask = _find_file(directory / labels, _names(directory / labels), [name])
            if not mask and require_mask and folder == "imagesTs":
                continue
            try:
                images = {modality: _channel(stems, name, number) for modality, number in numbers.items()}
                if not all(images.values()) or (require_mask and not mask):
                    wanted = [f"{name}_{number:04d}" for number in numbers.values()]
                    raise CaseError(
                        f"{name}: {directory / folder}: must hold {', '.join(wanted)} or {name}, and {labels} {name}. "
                        f"Received: {', '.join(stem for stem in stems if stem.startswith(name))}, "
                        f"{'a' if mask else 'no'} label"
                    )
                cases.append(Case(name, images, mask))
            except CaseError as error:
                if on_error is None:
                    raise
                on_error(error)
    if not cases:
        raise ValueError(f"{path}: must lie beside imagesTr with images. Received: no patient in {directory}")
    _log({layout: len(cases)})
    return sorted(cases, key=lambda case: case.name)


def _names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _channel(stems, name, number):
    """Where one channel of a patient is: a file of its own, or a volume of the patient's."""
    file = stems.get(f"{name}_{number:04d}")
    return file or (Volume(stems[name], number) if name in stems else None)
