"""A bundle: a run's networks and what they need, as one folder or zip archive to share. Loading it runs no code."""

import hashlib
import json
import lzma
import math
import os
import re
import shlex
import shutil
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import pydantic

from keras_mmfnet._files import new_folder, read_json
from keras_mmfnet.evaluation import (
    METRICS,
    defined_metrics,
    mean_over_structures,
    metrics_json,
    rows_by_structure,
    summarise,
)
from keras_mmfnet.postprocess import PostProcessing
from keras_mmfnet.recipe import RECIPE_FILE, Recipe
from keras_mmfnet.version import __version__

if TYPE_CHECKING:
    from keras_mmfnet.data.case import Case

# Version of the format, and the file that has it.
_FORMAT, _FILE = 1, "bundle.json"
# The files that a bundle can have; and the most bytes of an archive's files.
_MEMBER, _LARGEST = r"(fold_\d+/)?\w[\w-]*(\.[\w-]+)+", 8 * 2**30
_HUB = "hf://"
_SHOWN = ("dsc", "nsd", "hd95", "sensitivity", "precision", "detection_specificity")


class _Fold(pydantic.BaseModel):
    postprocess: PostProcessing
    versions: dict[str, str]


class _Contents(pydantic.BaseModel):
    """What `bundle.json` holds: the package that wrote it, the folds by number, and the SHA-256 of each file."""

    written_by: str
    folds: Annotated[dict[int, _Fold], pydantic.Field(min_length=1)]
    files: dict[Annotated[str, pydantic.Field(pattern=f"^{_MEMBER}$")], str]


class Bundle:
    """What `Run.save_bundle` wrote. The methods that segmentation needs are those of `Run`.

    | file | holds |
    |---|---|
    | `bundle.json` | the version of the format; of each fold the post-processing and the versions of the packages it \
was trained with; the SHA-256 of the recipe and the networks |
    | `recipe.json` | the `Recipe`, with the reasons of a plan |
    | `fold_<n>/mmfnet.keras` | the networks |
    | `metrics.json` | the numbers of the test patients and their summary |
    | `README.md` | the model card |

    The last two are not read, and other files in the folder or archive are ignored. The networks are loaded by
    `load_network`, which executes no code.

    Args:
        path: The folder or zip archive, or `hf://user/name` for one on the Hugging Face Hub (extra `hub`). An archive
            is unpacked to a temporary folder, which is deleted with the object.

    Raises:
        ValueError: It is no bundle, is damaged, or is of a newer version of the format.
        ImportError: `hf://` is given without the extra `hub`.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = local_folder(path)
        self.folder = self._unpack() if self.path.is_file() else self.path
        if not (self.folder / _FILE).is_file():
            raise ValueError(f"{self.path}: a bundle, with a {_FILE}, is expected. Received: a folder without")
        contents = _read_contents(self.folder / _FILE, self.path)
        networks = {f"fold_{fold}/mmfnet.keras" for fold in contents.folds}
        for name in {RECIPE_FILE, *networks} - set(contents.files):
            raise ValueError(f"{self.path}: {_FILE}: must list {name}. Received: {', '.join(contents.files)}")
        for name, checksum in contents.files.items():
            file = self.folder / name
            if not file.is_file() or _checksum(file) != checksum:
                received = "a damaged one" if file.is_file() else "none"
                raise ValueError(
                    f"{self.path}: {name}: the file whose SHA-256 is in {_FILE} is expected; get the bundle again. "
                    f"Received: {received}"
                )
        self.recipe = Recipe.load(self.folder / RECIPE_FILE)
        self._folds, data = contents.folds, self.recipe.data
        for rules in (fold.postprocess for fold in self._folds.values()):
            if (tuple(rules.structures), rules.exclusive) != (data.structure_names, data.exclusive):
                raise ValueError(
                    f"{self.path}: {_FILE}: must have post-processing for the recipe's {', '.join(data.structures)}. "
                    f"Received: {rules}"
                )

    def __str__(self):
        return str(self.path)

    def network(self, fold: int, name: str = "mmfnet") -> Path:
        """File of the network of a fold."""
        return self.folder / f"fold_{fold}" / f"{name}.keras"

    def trained_folds(self) -> list[int]:
        """Numbers of the folds."""
        return sorted(self._folds)

    def postprocessing(self, folds: Sequence[int]) -> PostProcessing:
        """How masks are made of the mean probability of the networks of some folds."""
        return PostProcessing.of_ensemble([self._folds[fold].postprocess for fold in folds])

    def seen_in_training(self, case: "Case", folds: Iterable[int]) -> str:
        """Empty text: a bundle does not record its training patients."""
        return ""

    def _unpack(self):
        """A temporary folder with the files of the archive that a bundle can have."""
        folder = Path(tempfile.mkdtemp(prefix="mmfnet-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        try:
            with zipfile.ZipFile(self.path) as archive:
                for member, name in _members(self.path, archive.infolist()):
                    (folder / name).parent.mkdir(exist_ok=True)
                    with archive.open(member) as source, open(folder / name, "wb") as target:
                        shutil.copyfileobj(source, target)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{self.path}: must be an undamaged zip archive. Received: {error}") from error
        return folder


def is_bundle(path: str | os.PathLike) -> bool:
    """Whether a path is that of a bundle and not of a run: a file, or a folder with a `bundle.json`."""
    return Path(path).is_file() or (Path(path) / _FILE).is_file()


def local_folder(path: str | os.PathLike) -> Path:
    """The path itself, or for `hf://user/name` the folder to which the Hugging Face Hub's client has downloaded it.

    Args:
        path: A path or `hf://user/name`.

    Returns:
        The path on this machine.

    Raises:
        ValueError: There is nothing at the path.
        ImportError: The client, extra `hub`, is not installed.
    """
    if not (isinstance(path, str) and path.startswith(_HUB)):
        if not Path(path).exists():
            raise ValueError(f"{path}: a folder or file that exists is expected. Received: none")
        return Path(path)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"{path}: hf:// needs the extra: pip install 'keras-mmfnet[hub]'. Received: no module huggingface_hub"
        ) from error
    return Path(snapshot_download(path.removeprefix(_HUB)))


def write_bundle(
    path: str | os.PathLike,
    recipe: Recipe,
    networks: Mapping[int, Path],
    postprocess: Mapping[int, PostProcessing],
    versions: Mapping[int, Mapping[str, str]],
    rows: Sequence[Mapping],
    about: str,
) -> None:
    """Writes a bundle, whole or not at all; `Run.save_bundle` calls it.

    Args:
        path: A new folder, or a new file that ends with `.zip`.
        recipe: The `Recipe`.
        networks: The `.keras` file of each fold.
        postprocess: The `PostProcessing` of each fold.
        versions: The versions of the packages that each fold was trained with.
        rows: The metrics of the test patients, as from `cross_validate`. In the bundle, patients have numbers instead
            of names, ordered by DSC, and metrics the digits of `METRICS`.
        about: What the model card says of the data and their terms, in Markdown.

    Raises:
        FileExistsError: There is something at the path.
    """
    rows = _without_names(rows)
    with new_folder(Path(path)) as folder:
        (folder / RECIPE_FILE).write_text(recipe.to_json(), encoding="utf-8")
        for fold, network in networks.items():
            (folder / f"fold_{fold}").mkdir()
            shutil.copyfile(network, folder / f"fold_{fold}" / "mmfnet.keras")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        contents = {
            "format": _FORMAT,
            "written_by": f"keras-mmfnet {__version__}",
            "folds": {
                fold: {"postprocess": postprocess[fold].model_dump(mode="json"), "versions": dict(versions[fold])}
                for fold in networks
            },
            "files": {file.relative_to(folder).as_posix(): _checksum(file) for file in files},
        }
        (folder / "metrics.json").write_text(metrics_json(rows), encoding="utf-8")
        (folder / _FILE).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
        rules = PostProcessing.of_ensemble(list(postprocess.values()))
        card = _card(Path(path).name, recipe, len(networks), rules, rows, about)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _read_contents(file, bundle):
    values = read_json(file)
    version = values.get("format")
    if isinstance(version, int) and version > _FORMAT:
        by = values.get("written_by", "a newer version")
        raise ValueError(
            f"{bundle}: a bundle of format {_FORMAT} is expected; update keras-mmfnet. Received: {version}, of {by}"
        )
    try:
        if version != _FORMAT:
            raise ValueError(f"format {version!r}")
        return _Contents(**values)
    except ValueError as error:
        reason = str(error)
        if isinstance(error, pydantic.ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ValueError(f"{bundle}: {_FILE}: must be that of a bundle. Received: {reason}") from error


def _checksum(file):
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _members(path, members):
    """The files of an archive that a bundle can have, and their names in it; they may all be in one folder."""
    for name in (member.filename for member in members):
        if name.startswith("/") or ":" in name or "\\" in name or ".." in name.split("/"):
            raise ValueError(f"{path}: names of files inside the archive are expected. Received: {name}")
    if (size := sum(member.file_size for member in members)) > _LARGEST:
        raise ValueError(f"{path}: at most {_LARGEST} bytes are expected. Received: {size}")
    tops = [
        name.removesuffix(_FILE)
        for name in (member.filename for member in members)
        if re.fullmatch(rf"([^/]+/)?{re.escape(_FILE)}", name)
    ]
    if len(tops) != 1:
        raise ValueError(f"{path}: a zip archive with one {_FILE} is expected. Received: one with {len(tops)}")
    for member in members:
        name = member.filename.removeprefix(tops[0])
        if member.filename.startswith(tops[0]) and re.fullmatch(_MEMBER, name):
            yield member, name


def _without_names(rows):
    """The rows with numbers for patients, from the lowest DSC on, and rounded."""
    means = {row["patient"]: row["dsc"] for row in mean_over_structures(rows)}
    order = sorted(means, key=lambda name: (math.isnan(means[name]), means[name]))

    def rounded(key, value):
        return round(value, METRICS[key].digits) if key in METRICS and isinstance(value, float) else value

    numbered = [{key: rounded(key, value) for key, value in row.items()} for row in rows]
    numbered = [{**row, "patient": order.index(row["patient"]) + 1} for row in numbered]
    return sorted(numbered, key=lambda row: row["patient"])


def _card(name, recipe, networks, rules, rows, about):
    """The model card, in Markdown with the header that the Hugging Face Hub reads."""
    structures, sequences = ", ".join(recipe.data.structure_names), ", ".join(recipe.data.modalities)
    some, patients = rows_by_structure(rows), len({row["patient"] for row in rows})
    defined = defined_metrics(rows)
    shown = [key for key in _SHOWN if key in defined]
    lines = ["| structure | patients with it | " + " | ".join(METRICS[key].title for key in shown) + " |"]
    lines.append("|---" * (2 + len(shown)) + "|")
    for structure, found in some.items():
        summary, cells = summarise(found), []
        for key in shown:
            mean, low, high = (METRICS[key].text(summary[key][one]) for one in ("mean", "low", "high"))
            cells.append(mean if summary[key]["low"] is None else f"{mean} ({low} to {high})")
        lines.append(f"| {structure} | {summary['dsc']['patients']} | {' | '.join(cells)} |")
    ensemble = "The ensemble of all folds, which `mmfnet segment` uses, was not evaluated. " if networks > 1 else ""
    postprocess = "\n".join(f"- {structure}: {rule}" for structure, rule in rules.structures.items())
    table = "\n".join(lines)
    return f"""---
library_name: keras-mmfnet
pipeline_tag: image-segmentation
tags: [keras, medical, mri, segmentation]
---

# Segmentation of {structures} in {sequences}

{networks} MMFNet {"network" if networks == 1 else "networks"}, written by keras-mmfnet {__version__}. `recipe.json` \
holds every number of the preprocessing and the training.

```bash
mmfnet segment {shlex.quote(name)} PATIENTS --out FOLDER
```

## Data and terms

{about.strip()}

## Results

Means over {patients} test patients, each segmented by the network of a fold that had not seen them, with 95% \
bootstrap intervals. `metrics.json` has each patient, by number.

{table}

{ensemble}Results may be worse for patients of another hospital, scanner or protocol.

Post-processing:

{postprocess}

## What it must not be used for

- For a diagnosis or a treatment without an expert who reviews and corrects every contour. It is not a medical device.
- For other structures, other sequences or another region of the body than those above.
- For kinds of patients that "Data and terms" does not name, unless it was tested on them: a network segments any \
image, and does not say that it is wrong.
- To identify patients, or to find out whether someone was in the training set.
"""
