import pytest

from keras_mmfnet.recipe import DataRecipe, Recipe, RecipeError, TrainingRecipe


def test_the_defaults_are_the_papers():
    recipe = Recipe()
    assert recipe.data.modalities == ("t1", "t2", "cet1")
    assert recipe.data.spacing == 0.5
    assert recipe.data.clip == {"t1": (-2, 1), "t2": (-3, 2), "cet1": (-2, 3.5)}
    assert recipe.patches.shape == (16, 256, 256)
    assert recipe.patches.stride == (4, None, None)
    assert recipe.patches.max_offset == (4, 32, 32)
    assert recipe.patches.max_rotation == 5
    assert (recipe.network.filters, recipe.network.reduction) == ((8, 16, 32, 64), 12)
    assert (
        recipe.training.batch_size,
        recipe.training.steps_per_epoch,
        recipe.training.epochs,
        recipe.training.patience,
    ) == (8, 75, 100, 10)
    assert (
        recipe.training.pretrain_learning_rate,
        recipe.training.warmup_learning_rate,
        recipe.training.learning_rate,
    ) == (1e-3, 1e-3, 1e-4)
    assert (recipe.training.loss, recipe.training.optimizer, recipe.training.schedule) == ("dice", "adam", "constant")
    assert (recipe.training.clip_norm, recipe.training.weight_average, recipe.training.choose_by) == (None, 0, "loss")
    assert (recipe.training.warmup_epochs, recipe.training.folds, recipe.training.validation_fraction) == (5, 5, 0.25)


def test_the_small_recipe_has_the_papers_field_of_view():
    small, paper = Recipe.small(), Recipe()
    for length in ("shape", "max_offset"):
        ours, papers = (getattr(recipe.patches, length)[1:] for recipe in (small, paper))
        assert [n * small.data.spacing for n in ours] == [n * paper.data.spacing for n in papers]


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe.small(),
        Recipe().replace(
            {
                "data.modalities": ("a", "b"),
                "data.structures.core": (1, 4),
                "data.spacing": None,
                "data.normalised_scale": 1000.0,
            }
        ),
        Recipe().replace({"data.series": {"t1": "t1.*ax"}, "data.mask_from": "union", "data.align": "rigid"}),
        Recipe().replace({"network.strides": [[1, 2, 2]] * 4, "network.kernel_sizes": [[1, 3, 3]] * 4}),
    ],
)
def test_json_and_back(recipe, tmp_path):
    assert Recipe.from_json(recipe.to_json()) == recipe
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert Recipe.load(tmp_path / "recipe.json") == recipe


def test_the_strides_decide_about_the_patch():
    recipe = Recipe().replace(
        {"network.strides": [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 1, 2)], "patches.shape": (4, 24, 16)}
    )
    assert recipe.network.reduction_zyx == (4, 8, 16)
    assert Recipe().network.reduction_zyx == (16, 16, 16)
    with pytest.raises(RecipeError, match=r"the depth a multiple of 4 and the width a multiple of 16, .*: \(6, 8, 8\)"):
        recipe.replace({"patches.shape": (6, 8, 8)})
    with pytest.raises(RecipeError, match=r"`network.deep_supervision` must go with three or more `network.filters`"):
        Recipe().replace({"network.filters": (8, 16), "network.deep_supervision": True})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.modalities", ()),
        ("data.modalities", ("t1", "t1")),
        ("data.mask", "t1"),
        ("data.structures.tumour", ()),
        ("data.series", {"t1": "("}),
        ("data.mask_from", "flair"),
        ("data.align", "affine"),
        ("data.spacing", 0),
        ("data.normalised_scale", -1),
        ("data.clip", {"t1": (1, -2)}),
        ("patches.shape", (16, 256)),
        ("patches.shape", (15, 256, 256)),
        ("patches.shape", (16, 0, 256)),
        ("patches.stride", (0, None, None)),
        ("patches.offset_fraction", (0.25, 0.25, 1.5)),
        ("patches.max_rotation", -1),
        ("patches.flip_axes", 3),
        ("network.filters", ()),
        ("network.filters", (8, 0)),
        ("network.reduction", 0),
        ("network.channel_statistics", ("mean",)),
        ("network.spatial_statistics", ()),
        ("network.bottleneck", "none"),
        ("network.modality_dropout", 1.0),
        ("network.modality_dropout", {"t1": True}),
        ("network.modality_dropout", {"flair": 0.5}),
        ("patches.flip_axes", (1, 1)),
        ("patches.misalignment", (2.0, 50.0)),
        ("patches.foreground", 1.5),
        ("network.strides", ((1, 2, 2),)),
        ("network.strides", ((1, 2, 3), *[(2, 2, 2)] * 3)),
        ("network.strides", ((True, 2, 2), *[(2, 2, 2)] * 3)),
        ("network.kernel_sizes", ((1, 2, 3), *[(3, 3, 3)] * 3)),
        ("network.normalization", "layer"),
        ("network.residual", 1.5),
        ("training.batch_size", 0),
        ("training.steps_per_epoch", 2.5),
        ("training.epochs", 0),
        ("training.warmup_epochs", -1),
        ("training.pretrain_learning_rate", 0),
        ("training.warmup_learning_rate", 0),
        ("training.learning_rate", -1e-4),
        ("training.schedule", "linear"),
        ("training.loss", "dice loss"),
        ("training.optimizer", "rmsprop"),
        ("training.clip_norm", 0),
        ("training.weight_average", -1),
        ("training.choose_by", "ap"),
        ("training.patience", 0),
        ("training.folds", 1),
        ("training.validation_fraction", 1.0),
        ("training.mixed_precision", "float64"),
        ("training.seed", -1),
        ("training.epochs", True),
        ("network.filters", (8, True)),
        ("data.structures", {"tumour": True}),
        ("data.spacing", True),
        ("data.clip", {"t1": (False, True)}),
        ("data.series.flair", "t2"),
        ("data.series", {"t1c": "t1"}),
        ("data.clip.flair", (-1, 1)),
        ("data.clip.t3", (-1, 1)),
    ],
)
def test_a_value_outside_its_range_is_named(field, value):
    with pytest.raises(RecipeError, match=rf"^`{field}[.\w]*` must .*Received: "):
        Recipe().replace({field: value})


def test_fewer_halvings_allow_smaller_steps():
    assert Recipe().replace({"network.filters": (8, 16), "patches.shape": (12, 20, 20)}).patches.shape == (12, 20, 20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[1]", "must be a JSON object"),
        ('{"epochs": 3}', '"format": 1'),
        ('{"format": 2}', '"format": 1'),
        ('{"format": 1, "epochs": 3}', "`epochs` is no field of a recipe"),
        ('{"format": 1, "training": {"epochs": 0}}', "`training.epochs` must be"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, message):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"recipe\.json: .*{message}"):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training.epoch": 3},
            r"^`training.epoch` is no field of a recipe; did you mean `training.epochs`\?",
        ),
        ({"epochs": 3}, r"^`epochs` is no field of a recipe; did you mean `training.epochs`\?"),
        ({"nothing.like.it": 3}, r"^`nothing.like.it` is no field of a recipe; there are data.modalities, "),
        ({"data": 3}, "^`data` is no field of a recipe"),
        (
            {"data.allow_missing": True},
            r"`data.allow_missing` must go with a `network.modality_dropout` above 0, .*dropout=0\.0$",
        ),
        ({"data.modalities": ()}, r"`data.modalities` must have at least 1 item.*Received: \(\)$"),
        ({"patches.flip_axes": (1, 1)}, r"`patches.flip_axes` must be distinct\. Received: \(1, 1\)$"),
        ({"data.clip.t1": (1, -1)}, r"`data.clip.t1` must be \(lowest, highest\)\. Received: \(1, -1\)$"),
        ({"data.series.t1": "("}, r"`data.series.t1` must be a regular expression .*Received: '\('$"),
        ({"training.epochs": 0, "data.spacing": -1}, r"(?s)`data.spacing` must be.*`training.epochs` must be .*: 0$"),
    ],
)
def test_a_change_that_cannot_be(changes, message):
    with pytest.raises(RecipeError, match=message):
        Recipe().replace(changes)


def test_a_file_that_an_editor_of_windows_saved(tmp_path):
    (tmp_path / "recipe.json").write_text(Recipe.small().to_json().replace("\n", "\r\n"), encoding="utf-8-sig")
    assert Recipe.load(tmp_path / "recipe.json") == Recipe.small()


def test_no_sequence_may_be_missing_where_those_that_might_are_left_out():
    able = Recipe().replace({"data.allow_missing": True, "network.modality_dropout": {"t1": 0.3, "t2": 0.1}})
    fewer = able.replace({"data.modalities": ("t2", "cet1")})
    assert (fewer.data.allow_missing, fewer.network.modality_dropout) == (True, {"t2": 0.1})
    fewer = able.replace({"network.modality_dropout": {"t1": 0.3}}).replace({"data.modalities": ("t2", "cet1")})
    assert (fewer.data.allow_missing, fewer.network.modality_dropout) == (False, {})


def test_a_part_by_itself_names_its_fields():
    with pytest.raises(ValueError, match=r"^`epochs` must be greater than or equal to 1. Received: 0$"):
        TrainingRecipe(epochs=0)
    with pytest.raises(ValueError, match=r"^`training.epochs` must be"):
        Recipe(training={"epochs": 0})
    with pytest.raises(ValueError, match=r"^`epoch` is no field of a recipe; did you mean `epochs`\?"):
        TrainingRecipe(epoch=3)


def test_one_entry_of_a_field_by_modality():
    modalities = ("t1", "t2", "cet1", "flair")
    recipe = Recipe().replace(
        {
            "data.modalities": modalities,
            "data.series.t1": "t1.*tra",
            "data.series.mask": "x",
            "data.clip.flair": (-1, 1),
        }
    )
    assert recipe.data.series == {"t1": "t1.*tra", "mask": "x"}
    assert recipe.data.clip == {**Recipe().data.clip, "flair": (-1, 1)}
    # What is said of a modality goes with it.
    fewer = recipe.replace({"data.modalities": "t2"})
    assert (fewer.data.series, fewer.data.clip) == ({"mask": "x"}, Recipe().data.clip)
    with pytest.raises(RecipeError, match=r"^`data.series.flair` must be one of t1, t2, cet1, mask. Received: flair$"):
        Recipe().replace({"data.series.flair": "x"})


def test_the_dropout_of_one_modality():
    recipe = Recipe().replace({"network.modality_dropout": 0.1})
    one = recipe.replace({"network.modality_dropout.t1": 0.3})
    assert one.network.modality_dropout == {"t1": 0.3, "t2": 0.1, "cet1": 0.1}
    two = one.replace({"network.modality_dropout.t2": 0.5, "data.allow_missing": True})
    assert two.network.modality_dropout == {"t1": 0.3, "t2": 0.5, "cet1": 0.1}
    own = recipe.replace({"network.modality_dropout.flair": 0.2, "data.modalities": ("t1", "flair")})
    assert own.network.modality_dropout == {"t1": 0.1, "flair": 0.2}
    with pytest.raises(RecipeError, match=r"^`network.modality_dropout.flair` must be one of t1, t2, cet1. Received: "):
        recipe.replace({"network.modality_dropout.flair": 0.2})
    with pytest.raises(RecipeError, match=r"^`network.modality_dropout` must be in \[0, 1\), or .* Received: "):
        recipe.replace({"network.modality_dropout.t1": "much"})


def test_one_value_stands_for_a_tuple():
    recipe = Recipe().replace({"data.modalities": "flair", "data.structures.tumour": 4, "network.filters": 8})
    assert (recipe.data.modalities, recipe.data.structures["tumour"], recipe.network.filters) == (
        ("flair",),
        (4,),
        (8,),
    )


def test_equal_recipes_have_one_hash():
    changes = {"data.series.t1": "x", "training.epochs": 3}
    assert len({Recipe(), Recipe.small(), Recipe().replace(changes), Recipe().replace(changes)}) == 3


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"recipe\.json: the JSON file of a recipe is expected\. Received: No such file"
    ):
        Recipe.load(tmp_path / "recipe.json")


def test_a_recipe_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().training.epochs = 3


@pytest.mark.parametrize(
    ("structures", "named", "files"),
    [
        ({"tumour": None}, {}, (None,)),
        ({"gtv": "GTV.*"}, {"gtv": "GTV.*"}, (None,)),
        ({"gtv": 1, "node": 2}, {}, (None,)),
        ({"gtv": "gtv", "ctv": "ctv"}, {"gtv": "gtv", "ctv": "ctv"}, ("gtv", "ctv")),
    ],
)
def test_structures_that_are_named_have_a_file_each(structures, named, files):
    data = DataRecipe(structures=structures)
    assert (data.named_structures, data.mask_files) == (named, files)


@pytest.mark.parametrize(
    "name", ["probability", "Disagreement", "gtv_probability", "GTV_DISAGREEMENT", "probability_gtv", "a_probability_b"]
)
def test_a_structure_is_not_named_as_the_other_files_of_a_patient(name):
    expected = rf"^`structures.{name}` must be a name without the words probability and .*\. Received: '{name}'$"
    with pytest.raises(RecipeError, match=expected):
        DataRecipe(structures={"gtv": "gtv", name: "x"})
    DataRecipe(structures={"improbability": "x", "probability-gtv": "y"})


def test_names_of_structures():
    with pytest.raises(RecipeError, match=r"^`data.structures.GTV p` must be a name of letters, digits, _ and -\. Rec"):
        Recipe().replace({"data.structures": {"GTV p": 1}})
    with pytest.raises(RecipeError, match=r"differ in more than upper and lower case, .* Received: \{'GTV': 1, "):
        DataRecipe(structures={"GTV": 1, "gtv": 2})


def test_no_voxel_lies_between_the_windows():
    with pytest.raises(RecipeError, match=r"stride` must be at most `patches.shape` \(16, 256, 256\), .* Received"):
        Recipe().replace({"patches.stride": (17, None, 256)})
    assert Recipe().replace({"patches.stride": (16, None, 256)}).patches.stride == (16, None, 256)
