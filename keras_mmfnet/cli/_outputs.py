"""The files that `mmfnet segment` writes."""

import contextlib
import hashlib
import json
from collections import Counter

# What they end with.
DICOM = {"rtstruct": "_rtstruct.dcm", "seg": "_seg.dcm"}


def source_of(images, networks):
    """A hash of what a patient's files are made from: those of the images and of the networks."""
    return hashlib.sha256(json.dumps([networks, images]).encode()).hexdigest()


class Outputs:
    """The files of each patient in a folder, by what they hold and the structure, `None` for all; the masks are last.

    Beside them is `PATIENT.json`, the record of what they were made from; and, as `about`, where the images were, how
    they were read, and what was found in each structure.
    """

    def __init__(self, folder, recipe):
        from keras_mmfnet.inference import segmentation_endings

        self.folder, self.recipe = folder, recipe
        dicom = {(what, None): end for what, end in DICOM.items()}
        self.ends = {**dicom, ("picture", None): ".png", **segmentation_endings(recipe)}
        # What a file holds of each structure: its label values, or 1 where it has no other.
        several = len(recipe.structures) > 1 and not recipe.named_structures
        self.labels = {name: list(values) if several else [1] for name, values in recipe.structures.items()}

    def require_distinct(self, cases):
        """Refuses patients of whom one's file would have the name of another's."""
        files = Counter(case.name + end for case in cases for end in self.ends.values())
        if twice := [name for name, count in files.items() if count > 1]:
            from keras_mmfnet.data.case import listed

            expected = "patients whose files have different names are expected"
            raise ValueError(f"{expected}. Received: {listed(twice)} of two patients")

    def there(self, case):
        """The files of a patient that exist."""
        files = {about: self.folder / f"{case.name}{end}" for about, end in self.ends.items()}
        return {about: path for about, path in files.items() if path.exists()}

    def missing(self, case, wanted):
        """The files of a patient that are to be written. No DICOM file of empty masks is.

        They are all of them if it is not known what was found: the patient was interrupted.
        """
        from keras_mmfnet._files import read_json

        record = self._record(case)
        there = self.there(case) if record.exists() and "found" in read_json(record).get("about", {}) else {}
        missing = {
            about: self.folder / f"{case.name}{end}"
            for about, end in self.ends.items()
            if about[0] in (*wanted, "mask") and about not in there
        }
        if missing and {what for what, _ in missing} <= DICOM.keys():
            import SimpleITK as sitk

            from keras_mmfnet.data.image_io import read_image

            masks = [path for (what, _), path in there.items() if what == "mask"]
            return missing if any(sitk.GetArrayFromImage(read_image(path, case.name)).any() for path in masks) else {}
        return missing

    def require_same(self, case, record, dicom):
        """Refuses to add to a patient's files, or to keep them, if they were made from something else.

        `dicom` has the options of each kind of DICOM file that is wanted.
        """
        from keras_mmfnet._files import read_json

        path, there = self._record(case), self.there(case)
        before = read_json(path) if path.exists() else {}
        about = before.pop("about", {})
        for kind, options in dicom.items():
            made = about.get("dicom", {}).get(kind, options)
            if (kind, None) in there and made != options:
                raise ValueError(
                    f"{case.name}: {there[kind, None]}: must be made with {options}, as now; choose another --out. "
                    f"Received: a file made with {made}"
                )
        if there and before != record:
            listed = ", ".join(key for key in {**record, **before} if record.get(key) != before.get(key))
            raise ValueError(
                f"{case.name}: {next(iter(there.values()))}: must be made from the same images, networks and options "
                f"as now; choose another --out. Received: a file made with another {listed}"
            )

    def write_record(self, case, record, about):
        """Writes the record of a patient, before the files, and again when what was found is known."""
        from keras_mmfnet._files import read_json, write

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._record(case)
        before = read_json(path).get("about", {}) if path.exists() else {}
        dicom = before.get("dicom", {}) | about["dicom"]
        write(path, json.dumps({**record, "about": before | about | {"dicom": dicom}}, indent=2) + "\n")

    @contextlib.contextmanager
    def claim(self, case):
        """Holds a patient's files for this process. The record is removed if no file is written."""
        import filelock

        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / f".{case.name}.lock"
        try:
            with filelock.FileLock(lock, timeout=0):
                try:
                    yield
                finally:
                    if not self.there(case):
                        self._record(case).unlink(missing_ok=True)
                    with contextlib.suppress(PermissionError):  # Windows keeps files that are open
                        lock.unlink()
        except filelock.Timeout:
            expected = "no other `mmfnet segment` may write the same files at the same time; choose another --out"
            raise ValueError(f"{case.name}: {expected}. Received: one that is running") from None

    def _record(self, case):
        return self.folder / f"{case.name}.json"
