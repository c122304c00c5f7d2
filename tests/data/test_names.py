import pytest

from keras_mmfnet.data.names import is_named, sequence_of

NAMES = {
    "t1": [
        "AX T1 PRE CONTRAST",
        "AX T1 WITHOUT CONTRAST",
        "T1 W/O CONTRAST",
        "t1_tse_tra pre KM",
        "T1 ohne KM",
        "T1 nativ",
        "AX T1 NON CONTRAST",
        "T1 non-contrast",
        "T1 pre-Gd",
        "T1 noncontrast",
        "T1W WO CONTRAST",
        "T1 o. KM",
        "T1 vor KM",
        "t1 sans gado",
        "T1 senza mdc",
        "AX T1 FLAIR",
        "Sag 3DT1",
        "AX T1 PRE",
        "t1 unenhanced",
        "T1 -C",
        "T1 C-",
        "AX T1 w/o",
        "T1 post op",
        "T1 preop",
        "T1 precontrast",
        "T1 pregad",
        "t1_mprage_sag_p2_iso",
        "t1w",
        "T1-weighted",
        "pre-contrast T1",
        "t1n",
        "AX T1 NON-ENHANCED",
        "T1 MPRAGE",
        "sub-01_T1w",
        "t1_tirm_dark-fluid",
        "T1 no contrast",
        "T1 SE TRA prä KM",
        "T1 POST-RT",
        "Posterior fossa T1",
        "T1 without Gd",
        "T1 native",
        "T1 sin contraste",
        "T1 (pre)",
        "T1 before contrast",
        "T1 prior to contrast",
        "T1 w/o iv contrast",
        "T1W/O CONTRAST",
        "T1 prae Gd",
    ],
    "cet1": [
        "AX T1 POST CONTRAST",
        "AX T1 +C",
        "T1 TSE TRA KM",
        "t1_tse_fs_gd",
        "AX T1 FS POST",
        "T1 C+",
        "T1_SE+Gd",
        "T1 mit KM",
        "t1 tra gadovist",
        "T1W CE",
        "T1 FS Dotarem",
        "T1 TRA KM MPR",
        "T1+C",
        "T1 W CONTRAST",
        "t1_tse_tra_km",
        "t1ce",
        "t1c",
        "T1 nach KM",
        "T1 m. KM",
        "T1 postcontrast",
        "post-contrast T1",
        "T1-Gd",
        "T1Gd",
        "CE-T1",
        "ce-gadolinium_T1w",
        "cet1",
        "T1 enhanced",
        "T1 without fatsat post contrast",
        "T1 post op +C",
        "t1_vibe_fs_tra_post",
        "AX T1 POST GD",
        "T1 contrast-enhanced",
        "T1POST",
        "T1 + contrast",
        "T1 with contrast",
        "T1 magnevist",
        "T1 fs +GD",
        "T1 KM fs",
        "AX T1 FLAIR +C",
        "T1 CE pre-op",
        "T1 Gadobutrol",
        "AX T1 (POST)",
    ],
    "t2": [
        "AX T2 TSE",
        "t2w",
        "T2 FS post contrast",
        "t2_tse_tra",
        "T2-weighted",
    ],
    "flair": [
        "FLAIR",
        "t2 flair",
        "T2 FLAIR +C",
        "t2_tirm_tra_dark-fluid",
        "t2f flair",
    ],
    None: [
        "AX T1 pre and post contrast",
        "T1 SUB",
        "T1 subtraction",
        "T1 map",
        "DCE T1",
        "T2* GRE",
        "T2 star",
        "T1 W/WO CONTRAST",
        "ADC",
        "T1-C",
        "T1+",
        "part1",
        "post1",
        "T1 map post",
        "T1rho",
    ],
}


@pytest.mark.parametrize(
    ("sequence", "name"), [(sequence, name) for sequence, names in NAMES.items() for name in names]
)
def test_the_sequence_of_a_name(sequence, name):
    assert sequence_of(name) == sequence
    assert sequence_of(name.upper().replace(" ", "_")) == sequence


def test_the_folder_may_say_it():
    assert sequence_of("3d tra", "T1 post contrast") == "cet1"
    # That of an examination with and without contrast says nothing of one series; a contradiction is not resolved.
    assert sequence_of("AX T1", "MRI_BRAIN_W_WO_CONTRAST") == "t1"
    assert sequence_of("AX T1 +C", "MRI BRAIN W/WO CONTRAST") == "cet1"
    assert sequence_of("AX T1 +C", "T1_pre") is None


def test_other_sequences_are_words_of_the_name():
    assert is_named("ep2d_diff_ADC", "adc")
    assert not is_named("ep2d_diff_ADCx", "adc")
    assert is_named("AX T1", "t1")
    assert not is_named("AX T1 +C", "t1")


def test_a_pattern_decides_instead():
    assert is_named("AX T1 W/WO CONTRAST", "cet1", "w/wo")
    assert is_named("3d", "t1", r"^12/", folder="12/")
    assert not is_named("AX T1", "t1", "mprage")
