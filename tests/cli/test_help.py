import pytest

import keras_mmfnet
from keras_mmfnet.cli import app

COMMANDS = (
    *("demo", "check", "plan", "train", "status", "segment", "evaluate", "review", "compare", "explain", "report"),
    "export",
)


def test_the_commands(mmfnet):
    done = mmfnet("--help")
    assert [name for name in (*COMMANDS, "node") if f" {name} " in done.stdout] == [*COMMANDS, "node"]
    assert "--install-completion" in done.stdout
    assert mmfnet("--version").stdout == f"mmfnet {keras_mmfnet.__version__}\n"
    assert len(app.registered_commands) == len(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_shows_an_example_and_can_be_quiet(mmfnet, command):
    done = mmfnet(command, "--help")
    assert f"Example: mmfnet {command}" in done.stdout
    assert ("--quiet" in done.stdout) == (command != "status")  # which shows nothing but its result
    assert "No such option" in mmfnet(command, "--nothing", code=2).stderr


@pytest.mark.parametrize("command", ["start", "status", "retry", "fetch"])
def test_each_of_the_node_shows_an_example(mmfnet, command):
    assert f"Example: mmfnet node {command}" in mmfnet("node", command, "--help").stdout


@pytest.mark.parametrize(("command", "default"), [("demo", "runs/DATE-TIME"), ("segment", "all"), ("train", "0")])
def test_a_default_that_is_no_value_is_shown(mmfnet, command, default):
    assert f"[default: ({default})]" in mmfnet(command, "--help").stdout


def test_report(mmfnet, trained, tmp_path):
    assert "nowhere, which does not exist" in mmfnet("report", tmp_path / "nowhere", code=1).stderr
    assert "error: " in mmfnet("report", trained, code=1).stderr
