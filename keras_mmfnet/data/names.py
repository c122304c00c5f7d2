"""Which sequence a name means: a DICOM series, a channel of a dataset, a file. Pure functions of the text."""

import re

# Contrast agents, and words for them in several languages.
_AGENT = (
    r"(gd|gad[a-z]*|km|kontrast[a-z]*|contrast[a-z]*|mdc|ce|dotarem|magnevist|omniscan|prohance|multihance|clariscan"
    r"|elucirem|vueway|optimark|ablavar|eovist|primovist)(?![a-z])"
)
_NEGATION = (
    r"(without|w ?/ ?o|wo|non?|ohne|o\.?(?= ?km)|sans|senza|sin|sem|zonder|bez|utan|uden|before|prior to|vor|avant"
    r"|prä|prae|pre|minus)"
)
# "Pre" and "post" may also refer to surgery or treatment.
_NO_TREATMENT = r"(?![a-z])(?! ?-?(op|surg|resec|rt|rad|chemo|treat|ther|tx|bx|biops|trial|scan))"
# An examination "with and without contrast" has series of both kinds.
_BOTH = re.compile(rf"(?<![a-z0-9])w(ith)? ?(/|\+|&|and)? ?(w ?/? ?o|without)(?![a-z])( (iv )?{_AGENT})?")
_NATIVE = re.compile(
    rf"(?<![a-z])({_NEGATION}[ /-]*(i\.?v\.? )?({_AGENT}|enh[a-z]*)|pre{_NO_TREATMENT}|nativ[a-z]*|unenh[a-z]*"
    r"|w ?/ ?o|c-(?![a-z0-9]))|(?<= )-c(?![a-z])"
)
_ENHANCED = re.compile(
    rf"(?<![a-z])({_AGENT}|post-?{_AGENT}|post{_NO_TREATMENT}|enh[a-z]*|c ?\+|cet1|t1 ?c(?![a-z]))|\+ ?c(?![a-z])"
)
# Differences, time courses, maps of relaxation times, and "T1-C" and "T1+", which may mean either kind.
_UNCLEAR = re.compile(
    r"(?<![a-z])(dce|dyn[a-z]*|perf[a-z]*|map(s|ping)?|rho)(?![a-z])|subtr|t1 sub(?![a-z])|t1(-c|\+)(?![a-z])"
)
_T1 = re.compile(r"(?<![a-z])(3d|s|ax|sag|cor|tra|ce|t?f?se|gre|ir|fs)?t1(?!\d|rho)")
_T2 = re.compile(r"(?<![a-z])(3d|s|ax|sag|cor|tra|t?f?se|fs)?t2(?!\d| ?\*| ?star)")
_FLAIR = re.compile(r"flair|dark.?fluid")
SEQUENCES = ("t1", "t2", "cet1", "flair")


def sequence_of(name: str, folder: str = "") -> str | None:
    """The sequence that a name means.

    A T1-weighted image counts as contrast-enhanced where the name says so ("post contrast", "+C", "KM", an agent), and
    as `t1` where the name denies it ("pre", "w/o contrast", "nativ") or says nothing. A name that says both, or that
    speaks of a difference, a time course or a map, means no sequence.

    Args:
        name: What the scanner or the dataset calls the image, in any case.
        folder: The folder it lies in, which may say it instead.

    Returns:
        One of `SEQUENCES`, or `None`.
    """
    name, folder = (re.sub(r"[_\s]+", " ", text.lower()) for text in (name, folder))
    folder = _BOTH.sub(" ", folder)
    text = f"{folder} {name}"
    is_t1, is_t2 = _T1.search(text), _T2.search(text)
    if is_t1 and is_t2:
        return None
    if is_t1:  # "T1 FLAIR" is weighted by T1
        native, enhanced = _NATIVE.search(text), _ENHANCED.search(_NATIVE.sub(" ", text))
        if _UNCLEAR.search(text) or _BOTH.search(name) or (native and enhanced):
            return None
        return "cet1" if enhanced else "t1"
    if _FLAIR.search(text):
        return "flair"
    return "t2" if is_t2 and not _UNCLEAR.search(text) else None


def is_named(name: str, sequence: str, pattern: str | None = None, folder: str = "") -> bool:
    """Whether a name means a sequence.

    Args:
        name: What the scanner or the dataset calls the image.
        sequence: The sequence; any word, or one of `SEQUENCES`.
        pattern: A regular expression that decides instead, searched in any case in folder and name.
        folder: The folder it lies in.

    Returns:
        Whether `pattern` is found; without one, whether `sequence_of` gives the sequence or, where it is none of
        `SEQUENCES`, whether it stands in the folder or the name as a word.
    """
    if pattern is None and sequence in SEQUENCES:
        return sequence_of(name, folder) == sequence
    pattern = pattern or rf"(?<![a-z0-9]){re.escape(sequence)}(?![a-z0-9])"
    return re.search(pattern, f"{folder} {name}", re.IGNORECASE) is not None
