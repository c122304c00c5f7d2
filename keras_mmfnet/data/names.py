"""What a name means: a sequence, or a mask of a tissue. Pure functions of the text."""

import re
import unicodedata

# Contrast agents, and words for them in several languages.
_AGENT = (
    r"(gd|gad[a-z]*|km|kontras[a-z]*|contras[a-z]*|mdc|ce|inj[a-z]*|dotarem|magnevist|omniscan|prohance|multihance"
    r"|clariscan|elucirem|vueway|optimark|ablavar|eovist|primovist|artirem|pixxoscan)(?![a-z])"
)
_WITH = r"(with|mit|nach|post|after|avec|apres|con|com|dopo|despues|depois|efter|etter|na|po|pos)(?![a-z])"
_WITHOUT = (
    r"(without|w ?/ ?o(ut)?|wo(ut)?|not?|non?|nicht|ohne|o\.?(?= ?km)|kein[a-z]*|sans|senza|sin|sine|sem|s/|zonder|bez"
    r"|utan|uden|uten|ilman|before|prior( to)?|vor|voor|avant|antes|prima|før|fore|przed|pr[aä]e?|pre|minus)"
)
# Words in other scripts that say there is no contrast, that there is, and that say neither, in this order.
_OTHER_SCRIPTS = (
    (" native ", "平扫 平掃 非增强 非造影 조영전 бесконтрастн(ая|ое) без.контраста"),  # noqa: RUF001
    (" contrast ", "增强[后後]? 增強[后後]? 强化 強化 造影[后後]? 조영(후|증강)? (с.)?контраст[а-я]*"),  # noqa: RUF001
    (" ", "[轴軸矢冠][位状狀]位? [横橫][断斷][位面]? 压脂 脂肪抑制 аксиальн[а-я]* сагиттальн[а-я]* корональн[а-я]*"),  # noqa: RUF001
)
# Words that may stand between "without" and the agent.
_FILLER = (
    r"(intraven[a-zöø]*|iv|any|the|of|der|von|de|del|di|du|la|injection|injecao|inyeccion|inj|gabe|administration"
    r"|medium)"
)
_NOT_AGENT = re.compile(r"(phase|transfer|high|low|tissue|mt|mixed)[ -]contrast|contrast[ -](ratio|resolution)")
# "Post" alone means after contrast only before the end or words of the sequence; it may be surgery or treatment.
_POST = (
    r"post(?=[ )-]*($|[)]|iv(?![a-z])|fs|fat|tra(?![a-z])|ax|sag|cor|mpr|mprage|3d|2d|t1|t?se|dixon|vibe|space|iso|\d))"
)
_TREATMENT = r"(?![a-z])(?! ?-?(op|surg|resec|rt|rad|chemo|treat|ther|tx|bx|biops|trial|scan))"
# An examination "with and without contrast" has series of both kinds.
_BOTH = re.compile(rf"(?<![a-z0-9])w(ith)? ?(/|\+|&|and)? ?(w ?/? ?o|without)(?![a-z])( (iv )?{_AGENT})?")
_NATIVE = re.compile(
    rf"(?<![a-z])({_WITHOUT}[ ./-]*({_FILLER}[ ./-]+)*({_AGENT}([ -](enh|inj)[a-z]*)?|enh[a-z]*)"
    rf"|{_AGENT}[ :/-]*(free|frei|none|no|nein|0)(?![a-z0-9])|(gd|km)-(?![a-z0-9])|pre{_TREATMENT}|nativ[a-z]*"
    rf"|unenh[a-z]*|w ?/ ?o|c-(?![a-z0-9])|kontrasts[i\u0131]z)|(?<= )(-|[(]-[)]) ?({_AGENT}|c(?![a-z]))"
)
_ENHANCED = re.compile(
    rf"(?<![a-z])({_AGENT}|post-?{_AGENT}|{_POST}|enh[a-z]*|c ?\+|cet1|t1 ?c(?![a-z]))|\+ ?c(?![a-z])"
)
# Differences, time courses, maps and localizers; "T1-C" and "T1+", which may mean either kind; and "without" too far
# before an agent to say that it is meant.
_UNCLEAR = re.compile(
    r"(?<![a-z])(dce|dyn[a-z]*|perf[a-z]*|map(s|ping)?|rho|swi|loc[a-z]*|scout|survey|pc)(?![a-z])|subtr"
    r"|t1( sub(?![a-z])|-c(?![a-z])|\+(?! ?[a-z]))"
    rf"|(?<![a-z]){_WITHOUT}(?![a-z])([^a-z+]+(?!{_WITH})[a-z]+){{0,3}}?[^a-z+]+{_AGENT}"
)
# Words that speak of contrast only together with others.
_ALONE = re.compile(rf"(?<![a-z])(post{_TREATMENT}|(iv|pi|late|delayed)(?![a-z]))")
_T1 = re.compile(r"(?<![a-z])(3d|s|ax|sag|cor|tra|ce|t?f?se|gre|ir|fs)?t1(?!\d|rho)")
_T2 = re.compile(r"(?<![a-z])(3d|s|ax|sag|cor|tra|t?f?se|fs)?t2(?!\d| ?\*| ?star)")
_FLAIR = re.compile(r"flair|dark.?fluid")
_TISSUE = re.compile(r"(brain|skull|head|body|tissue|(?<![a-z])(bet|wm|gm|csf))[ _.-]*(mask|seg|roi|label)")
SEQUENCES = ("t1", "t2", "cet1", "flair")


def sequence_of(name: str, folder: str = "") -> str | None:
    """The sequence that a name means.

    A T1-weighted image counts as contrast-enhanced where the name says so ("post contrast", "+C", "KM", an agent), and
    as `t1` where the name denies it ("pre", "w/o contrast", "nativ") or says nothing. A name that says both, or that
    speaks of a difference, a time course or a map, means no sequence. Neither does a name of T1 with words of another
    script that are not known here.

    Args:
        name: What the scanner or the dataset calls the image, ignoring case.
        folder: The folder it lies in, which may say it instead.

    Returns:
        One of `SEQUENCES`, or `None`.
    """
    name, folder = map(_plain, (name, folder))
    folder = _BOTH.sub(" ", folder)
    text = f"{folder} {name}"
    is_t1, is_t2 = _T1.search(text), _T2.search(text)
    # A word that cannot be read here may say that there is contrast.
    if is_t1 and (is_t2 or any(letter.isalpha() and "LATIN" not in unicodedata.name(letter, "") for letter in name)):
        return None
    if is_t1:  # "T1 FLAIR" is weighted by T1
        native, rest = _NATIVE.search(text), _NATIVE.sub(" ", text)
        enhanced, alone = _ENHANCED.search(rest), _ALONE.search(_ENHANCED.sub(" ", rest))
        if _UNCLEAR.search(rest) or _BOTH.search(name) or (native and enhanced) or (alone and not enhanced):
            return None
        return "cet1" if enhanced else "t1"
    if _FLAIR.search(text):
        return "flair"
    return "t2" if is_t2 and not _UNCLEAR.search(text) else None


def _plain(text):
    """The text in lower case, without accents, underscores, and the dots of abbreviations such as "i.v."."""
    text = text.lower()
    for meaning, words in _OTHER_SCRIPTS:
        text = re.sub("|".join(words.split()), meaning, text)
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = re.sub(r"(?<![a-z])([a-z])\.(?=[a-z](?![a-z]))", r"\1", text)
    return _NOT_AGENT.sub(" ", re.sub(r"[_\s]+", " ", text)).strip()


def is_named(name: str, sequence: str, pattern: str | None = None, folder: str = "") -> bool:
    """Whether a name means a sequence.

    Args:
        name: What the scanner or the dataset calls the image.
        sequence: The sequence; any word, or one of `SEQUENCES`.
        pattern: A regular expression that decides instead, searched, ignoring case, in folder and name.
        folder: The folder it lies in.

    Returns:
        Whether `pattern` is found; without one, whether `sequence_of` gives the sequence or, where it is none of
        `SEQUENCES`, whether it stands in the folder or the name as a word.
    """
    if pattern is None and sequence in SEQUENCES:
        return sequence_of(name, folder) == sequence
    pattern = pattern or rf"(?<![a-z0-9]){re.escape(sequence)}(?![a-z0-9])"
    return re.search(pattern, f"{folder} {name}", re.IGNORECASE) is not None


def is_mask_of_tissue(name: str) -> bool:
    """Whether a name is that of a mask of the head or a tissue, as tools for brain images leave them."""
    return bool(_TISSUE.search(name.lower()))
