"""What a name means: a sequence, or a mask of a tissue. Pure functions of the text."""

import re
import unicodedata

# Contrast agents, and words for them in several languages; and what means contrast only beside "with" or "without".
_AGENT = (
    r"(gd|gad[a-z]*|km|kontras[a-z]*|contras[a-z]*|[mp]dc|ce|inj[a-z]*|dotarem|magnevist|omniscan|prohance|multihance"
    r"|clariscan|elucirem|vueway|optimark|ablavar|eovist|primovist|artirem|pixxoscan)(?![a-z])"
)
_SHORT = r"(con(tr?)?|kontr?|(?<![^t]\d)(?<![^t]\d )cm)(?![a-z])"  # no centimetres
_AFTER = r"(nach|po(st?)?|after|apres|dopo|despues|depois|efter|etter|na)"
_WITH = rf"(with|mit|avec|con|com|{_AFTER})"
_WITHOUT = (
    r"(without|w ?[/\\-]? ?o(ut)?|wout|not?|non?|nicht|ohne|kein[a-z]*|geen|sans|senza|sin|sine|sem|[su]/|zonder|sonder"
    rf"|(?<!i )(?<!i\. )[ov][./]?(?= ?(iv\.? ?)?{_AGENT})|bez|brez|utan|uden|uten|ilman?|fara|tanpa|before|prior( to)?"
    r"|vor|voor|avant|antes|abans|previo( al?)?|prima|før|foer|fore|innan|enne|ennen|przed|pred|prije|inainte|sebelum"
    r"|pr[ae]e?|minus)"
)
# Words in other scripts that say there is no contrast, that there is, and that say neither, in this order.
_OTHER_SCRIPTS = (
    (
        " native ",
        "平扫 平掃 [非未无無不](增强|增強|强化|強化|造影) (增强|增強|强化|強化|造影)剤?(前|なし) 비조영 조영전 "
        "бесконтрастн(ая|ое) (без|до).контраста",  # noqa: RUF001
    ),
    (" contrast ", "(增强|增強|强化|強化|造影)[后後]? 조영(후|증강)? ((с|после).)?контраст[а-я]*"),  # noqa: RUF001
    (
        " ",
        "[轴軸矢冠][位状狀]位? [横橫][断斷][位面]? 压脂 脂肪抑制 扫描 掃描 аксиальн[а-я]* "  # noqa: RUF001
        "сагиттальн[а-я]* корональн[а-я]*",  # noqa: RUF001
    ),
)
# Words that may stand between "without" and the agent.
_FILLER = (
    r"(intraven[a-z]*|iv|any|the|of|der|von|de|del|di|du|la|injection|injecao|inyeccion|inj|gabe|administration|medium"
    r"|medio|meio|mezzo)"
)
# The cervical spine is no contrast, planes joined by a plus are none, and neither are these contrasts of tissues.
_NOT_AGENT = re.compile(
    r"(phase|transfer|high|low|tissue|mt|mixed)[ -]contrast|contrast[ -](ratio|resolution)"
    r"|(?<![a-z+])(?<!\+ )c[ /-]?(t[ /-]?)?sp(ine|inal)?(?![a-z])"
    r"|(?<![a-z])(ax|tra|sag|cor)[a-z]* ?\+(?= ?(ax|tra|sag|cor))"
)
# "Post" alone means after contrast only before the end or words of the sequence; it may be surgery or treatment.
_POST = (
    r"post(?=[ )-]*($|[)]|(iv|c|tra|t?se|tfe|ffe|fse|nd|rep(eat)?|rpt)(?![a-z])|fs|fat|ax|sag|cor|mpr|3d|2d|t1|dixon"
    r"|vibe|space|sense|sella|bravo|cube|flair|iso|dis[23]d|recon|\d))"
)
_TREATMENT = r"(?![a-z])(?! ?-?(op|surg|resec|rt|rad|bestr|chemo|treat|ther|tx|bx|biops|trial|scan))"
# An examination "with and without contrast" has series of both kinds.
_JOIN = r"[ .-]*([/+&,]|(?<= )(and|und|et|e|y|og|och|en|i|a|ve|u\.?)(?= ))[ .-]*"
_BOTH = re.compile(
    rf"((?<![a-z0-9])(w(ith)?({_JOIN}|[ /]*)(w ?/? ?o|without)|(w ?/? ?o|without)({_JOIN}|[ /]*)w(ith)?(?! ?/? ?o)"
    rf"|({_WITH}|met|med|cu|ze?|s){_JOIN}{_WITHOUT}|{_WITHOUT}{_JOIN}({_WITH}|met|med|cu|ze?|s)"
    rf"|[cmn]{_JOIN}[osuv](?=[ ./]*{_AGENT})|[osuv]{_JOIN}[cmn](?=[ ./]*{_AGENT}))(?![a-z])|\+/?-|-/?\+|±)"
    rf"([ ./]*(iv )?({_AGENT}|{_SHORT}|c(?![a-z])))?"
)
_NATIVE = re.compile(
    rf"(?<![a-z])({_WITHOUT}[ ./-]*({_FILLER}[ ./-]+)*({_AGENT}([ -](enh|inj)[a-z]*)?|{_SHORT}|enh[a-z]*"
    rf"|(?<=[ /])c(?![a-z]))|{_AGENT}[ :=/-]*(free|frei|none|no|nein|kein[a-z]*|neg[a-z]*|off|once(si)?|elott|nelkul"
    r"|0(?![.,]))(?![a-z0-9])(?! ?(fs|fat|sat|breath))"
    r"|[ck]ontras[a-z]*(free|frei|fri|vrij|los|loos|less|mentes|s[i\u0131]z)(?![a-z])"
    rf"|({_AGENT}|{_SHORT}|c) ?[(]-[)]|(gd|km|ce|cm|c)-(?![a-z0-9])|pre{_TREATMENT}|nat(i[vf][a-z]*)?(?![a-z])"
    rf"|unenh[a-z]*|w ?[/\\] ?o)|(?<= )(-|[(]-[)] ?)({_AGENT}|{_SHORT}|c(?![a-z]))"
)
_ENHANCED = re.compile(
    rf"(?<![a-z])(({_WITH}|m|n(?=[ ./]*km)|c(?=mdc)|(?<!\d)w)[ ./-]*({_AGENT}|{_SHORT})|w?{_AGENT}|{_POST}|enh[a-z]*"
    rf"|c ?[(]?\+|{_SHORT} ?[(]?\+|[cw]/ ?c(?![a-z])|cet1|t1(c| c(?!\d))(?![a-z]))|\+ ?(c(?![a-z])|{_SHORT})"
)
# No weighted images: differences, time courses, maps and localizers.
_DERIVED = re.compile(
    r"(?<![a-z])(dce|dyn[a-z]*|perf[a-z]*|map(s|ping)?|rho|swi|loc[a-z]*|scout|survey|pc)(?![a-z])"
    r"|su[bs]s?tr|soustr|sottr|t1[^/]* subs?(?![a-z])|(?<![a-z])subs? (t1|ax|sag|cor|tra|post|km|gd)(?![a-z])"
)
# "T1-C" and "- KM", which may mean either kind; letters that may deny an agent; and "without" after an agent or
# too far before it to say that it is meant.
_UNCLEAR = re.compile(
    rf"t1-c(?![a-z])|(?<= )- +{_AGENT}|(?<![a-z])([bkux][ ./]|[fs][./]|(ss|av|be|pa|sen)[ .])[ ./]*{_AGENT}"
    rf"|(?<![a-z]){_AGENT}([ ./-]*-|[^a-z]+{_WITHOUT})[^a-z0-9]*$"
    rf"|(?<![a-z]){_WITHOUT}(?![a-z])([^a-z+]+(?!{_WITH}(?![a-z]))[a-z]+){{0,3}}?[^a-z+]+{_AGENT}"
)
# Words and signs that speak of contrast only together with others.
_ALONE = re.compile(
    rf"(?<![a-z])({_AFTER}{_TREATMENT}|(with|mit|avec|com)[^a-z0-9]*$|(iv|pi|late|delayed|cc?(?!\d))(?![a-z])"
    rf"|[mnpsuv]?{_SHORT}(?! ?(fs|fat|sat)))|[ck]ontr(?!o)|[a-z](gd|gado?|km)(?![a-z])"
    r"|(?<! )\+(?![a-z])|\+(?! ?(mpr|mip|fs|fat|sat|spa?ir|dixon|mt|moco|nd|dis|rep|rpt|\d))"
)
_T1 = re.compile(r"(?<![a-z])(3d|s|ax|sag|cor|tra|ce|t?f?se|gre|ir|fs)?t1(?!\d|rho)")
_T2 = re.compile(r"(?<![a-z])(3d|s|ax|sag|cor|tra|t?f?se|fs)?t2(?!\d|[ -]*(\*|star))")
# Gradient echoes and EPI, whose weighting is that by T2*.
_T2_STAR = re.compile(r"(?<![a-z])(fl[23]d|flash|gre|m?ffe|me[23]d|medic|merge|swan|ep2d|epi|bold)(?![a-z])|ha?emo")
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
    unread = any(letter.isalpha() and "LATIN" not in unicodedata.name(letter, "") for letter in name)
    if is_t1 and (is_t2 or unread or _DERIVED.search(text)):
        return None
    if is_t1:  # "T1 FLAIR" is weighted by T1
        native, rest = _NATIVE.search(text), _NATIVE.sub(" ", text)
        enhanced, alone = _ENHANCED.search(rest), _ALONE.search(_ENHANCED.sub(" ", rest))
        if _UNCLEAR.search(rest) or _BOTH.search(name) or (native and enhanced) or (alone and not enhanced):
            return None
        return "cet1" if enhanced else "t1"
    if _FLAIR.search(text):
        return "flair"
    return "t2" if is_t2 and not (_DERIVED.search(text) or _T2_STAR.search(text)) else None


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
