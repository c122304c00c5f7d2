import argparse
import dataclasses

import pytest

from keras_mmfnet.recipe import Recipe, add_recipe_arguments, recipe_changes


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
    assert (recipe.training.warmup_epochs, recipe.training.folds, recipe.training.validation_fraction) == (5, 5, 0.25)


def test_the_small_recipe_has_the_papers_field_of_view():
    small, paper = Recipe.small(), Recipe()
    assert [n * small.spacing for n in small.patch_shape[1:]] == [n * paper.spacing for n in paper.patch_shape[1:]]
    assert [n * small.spacing for n in small.max_offset[1:]] == [n * paper.spacing for n in paper.max_offset[1:]]
    assert Recipe.small().replace({"training.epochs": 3}).epochs == 3


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe.small(),
        Recipe().replace(
            {
                "data.modalities": ("a", "b"),
                "data.mask_labels": (1, 4),
                "data.spacing": None,
                "data.normalised_scale": 1000.0,
            }
        ),
        Recipe().replace({"data.series": {"t1": "t1.*ax"}, "data.mask_from": "union", "data.align": "rigid"}),
    ],
)
def test_json_and_back(recipe, tmp_path):
    assert Recipe.from_json(recipe.to_json()) == recipe
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert Recipe.load(tmp_path / "recipe.json") == recipe


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modalities", ()),
        ("modalities", ("t1", "t1")),
        ("mask", "t1"),
        ("mask_labels", ()),
        ("series", {"t1": "("}),
        ("mask_from", "flair"),
        ("align", "affine"),
        ("spacing", 0),
        ("normalised_scale", -1),
        ("clip", {"t1": (1, -2)}),
        ("patch_shape", (16, 256)),
        ("patch_shape", (15, 256, 256)),
        ("patch_shape", (16, 0, 256)),
        ("window_stride", (0, None, None)),
        ("offset_fraction", (0.25, 0.25, 1.5)),
        ("max_rotation", -1),
        ("flip_axis", 0),
        ("filters", ()),
        ("filters", (8, 0)),
        ("reduction", 0),
        ("channel_statistics", ("mean",)),
        ("spatial_statistics", ()),
        ("bottleneck", "none"),
        ("modality_dropout", 1.0),
        ("batch_size", 0),
        ("steps_per_epoch", 2.5),
        ("epochs", 0),
        ("warmup_epochs", -1),
        ("pretrain_learning_rate", 0),
        ("warmup_learning_rate", 0),
        ("learning_rate", -1e-4),
        ("schedule", "linear"),
        ("patience", 0),
        ("folds", 1),
        ("validation_fraction", 1.0),
        ("mixed_precision", "float64"),
        ("seed", -1),
    ],
)
def test_a_value_outside_its_range_is_named(field, value):
    with pytest.raises(ValueError, match=rf"`{field}` must be .*Received: {field}="):
        dataclasses.replace(Recipe(), **{field: value})


def test_fewer_halvings_allow_smaller_steps():
    assert Recipe().replace({"network.filters": (8, 16), "patches.shape": (12, 20, 20)}).patch_shape == (12, 20, 20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[1]", "must be a JSON object"),
        ('{"epoch": 3}', r"no such fields\. Received: \['epoch'\]"),
        ('{"epochs": 0}', "`epochs` must be"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, message):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"recipe\.json: .*{message}"):
        Recipe.load(path)


def test_command_line():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data")
    add_recipe_arguments(parser)
    assert recipe_changes(parser.parse_args(["--data", "x"])) == {}
    text = "--mask-name gtv --mask-labels 1 4 --normalised --spacing 0.7 --epochs 3 --mixed-precision off"
    changes = {"mask": "gtv", "mask_labels": [1, 4], "normalised_scale": 1.0, "spacing": 0.7, "epochs": 3}
    assert recipe_changes(parser.parse_args(text.split())) == {**changes, "mixed_precision": "off"}
    text = "--mask-from union --series t1=t1.*tra t2=a=b"
    changes = {"mask_from": "union", "series": {"t1": "t1.*tra", "t2": "a=b"}}
    assert recipe_changes(parser.parse_args(text.split())) == changes


def test_a_pattern_without_a_modality_is_refused(capsys):
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--series", "t1"])
    assert "--series: MODALITY=PATTERN is expected. Received: t1" in capsys.readouterr().err
