"""Options from a file, and runs that are made again from their folder."""

from __future__ import annotations

import json
import platform
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

import tomli_w
import typer

import test_cli
from test_cli import fit_arguments, sentences, turnover, write_csv

encoder, data = test_cli.encoder, test_cli.data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, encoder: Path, data: tuple[Path, Path]) -> Path:
    """A run with options of every kind, made from relative paths in another folder."""
    out = tmp_path_factory.mktemp("made") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(data[0].parent)
        more = ("--test", data[1].name, "--id-column", "id", "--keep", 0.4, "--seed", 3)
        sites = ("--site", "head", "--site", "lora", "--memorization")
        turnover(*fit_arguments(data[0].name, encoder, out, *more, *sites))
    return out


WEIGHTS = (
    "model.safetensors",
    "without_turnover/model.safetensors",
    "memorization.safetensors",
    "masks.json",
    "train.jsonl",
)


def test_a_run_is_made_again_bit_for_bit_from_its_folder(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    turnover("fit", "--config", made / "fit.toml", "--out", tmp_path / "again")
    for name in WEIGHTS:
        assert (made / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    first, second = (
        tomllib.loads((run / "fit.toml").read_text()) for run in (made, tmp_path / "again")
    )
    assert first.pop("made")["command"] != second.pop("made")["command"]
    assert first == second


def test_a_run_made_again_with_another_seed_is_another(made: Path, tmp_path: Path) -> None:
    turnover("fit", "--config", made / "fit.toml", "--out", tmp_path / "other", "--seed", 4)
    name = WEIGHTS[0]
    assert (made / name).read_bytes() != (tmp_path / "other" / name).read_bytes()
    assert tomllib.loads((tmp_path / "other" / "fit.toml").read_text())["seed"] == 4


def test_a_run_says_what_made_it(made: Path, data: tuple[Path, Path], encoder: Path) -> None:
    import transformers

    from turnover import __version__

    recipe = tomllib.loads((made / "fit.toml").read_text())
    versions = {
        "turnover": __version__,
        "torch": version("torch"),  # torch itself adds the CUDA version
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    assert recipe["made"].items() >= versions.items()
    assert recipe["made"]["command"][:3] == ["turnover", "fit", data[0].name]
    assert (recipe["data"], recipe["test"]) == tuple(map(str, data))
    assert recipe["model"] == str(encoder)
    assert (recipe["epochs"], recipe["keep"], recipe["site"]) == (2, 0.4, ["head", "lora"])
    assert not {"out", "config", "json", "overwrite", "group-column"} & set(recipe)
    config = json.loads((made / "config.json").read_text())
    assert config["made_with"] == versions and config["data"] == recipe["data-digest"]


def changed(run: Path, folder: Path, **options: object) -> Path:
    recipe = tomllib.loads((run / "fit.toml").read_text())
    path = folder / "changed.toml"
    path.write_text(tomli_w.dumps({**recipe, **options}))
    return path


@pytest.mark.parametrize("which", ["data", "test"])
def test_changed_data_are_noticed(made: Path, tmp_path: Path, which: str) -> None:
    files = {"data": sentences(48), "test": sentences(24, 500)}
    path = write_csv(tmp_path / f"{which}.csv", files[which][::-1])
    config = changed(made, tmp_path, **{which: str(path)})
    out = tmp_path / "again"
    refused = turnover("fit", "--config", config, "--out", out, expect=2).stderr
    assert "changed" in refused and "--data-digest" in refused
    assert not out.exists()
    digest = refused.rpartition(" ")[2].strip()
    more = ("--epochs", 1, "--no-compare", "--data-digest", digest)
    turnover("fit", "--config", config, "--out", out, *more)
    assert tomllib.loads((out / "fit.toml").read_text())["data-digest"] == digest


def test_data_that_are_named_on_the_command_line_are_taken(made: Path, tmp_path: Path) -> None:
    other = write_csv(tmp_path / "other.csv", sentences(40))
    arguments = ("fit", other, "--config", made / "fit.toml", "--out", tmp_path / "r")
    turnover(*arguments, "--epochs", 1, "--no-compare")
    assert len((tmp_path / "r" / "train.jsonl").read_text().splitlines()) == 40


def test_other_versions_are_noted(made: Path, tmp_path: Path) -> None:
    config = changed(made, tmp_path, made={"torch": "1.0", "python": platform.python_version()})
    more = ("--out", tmp_path / "r", "--epochs", 1, "--no-compare")
    said = turnover("fit", "--config", config, *more).stderr
    assert f"torch 1.0 (here {version('torch')})" in said and "python" not in said


def testoptions_of_on_the_command_line_win(
    encoder: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    config = tmp_path / "c.toml"
    config.write_text('compare = false\nepochs = 1\nhead-units = 32\nkeep = 0.5\nsite = ["head"]\n')
    turnover(
        *("fit", data[0], "--model", encoder, "--out", tmp_path / "r", "--lora-rank", 2),
        *("--config", config, "--head-units", 16),
    )
    found = json.loads((tmp_path / "r" / "config.json").read_text())
    assert found["classifier"]["head_units"] == 16
    assert (found["training"]["epochs"], found["compare"], found["sites"]) == (1, False, ["head"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("head_units = 64", "unknown option 'head_units'; did you mean 'head-units'?"),
        ("epoch = 64", "did you mean 'epochs'?"),
        ("zzz = 1", "unknown option 'zzz'; there are augment, batch-size"),
        ("[fit]\nepochs = 1", "unknown option 'fit'"),
        ("epochs = true", "'epochs' must be an integer, got True"),
        ("epochs = 1.5", "'epochs' must be an integer, got 1.5"),
        ("keep = '0.5'", "'keep' must be a number, got '0.5'"),
        ("compare = 1", "'compare' must be true or false, got 1"),
        ("data = 1", "'data' must be text, got 1"),
        ("weights = 1", "'weights' must be text, got 1"),
        ("site = 'head'", "'site' must be a list, each text, got 'head'"),
        ("site = [1]", "'site' must be a list, each text"),
        ("config = 'x'", "unknown option 'config'"),
        ("epochs = ", "cannot be read as TOML"),
        ("epochs = 1\nepochs = 2", "cannot be read as TOML"),
    ],
)
def test_files_that_cannot_be_meant_are_refused_by_name(
    text: str, said: str, tmp_path: Path
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(text + "\n")
    arguments = ("--model", "m", "--out", tmp_path / "r", "--config", config)
    refused = turnover("fit", "data.csv", *arguments, expect=2).stderr
    assert said in refused and str(config) in refused
    assert len(refused.splitlines()) == 1


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused = turnover("fit", "--config", tmp_path / "none.toml", expect=2).stderr
    assert "none.toml" in refused and "No such file" in refused


def test_the_file_of_a_fit_does_for_its_plan(made: Path) -> None:
    found = json.loads(turnover("plan", "--config", made / "fit.toml", "--json").stdout)
    assert found["asked"] == {"instances": 48, "units": 64, "seeds": 1}


def test_choices_from_a_file_are_checked(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('method = "magic"\n')
    refused = turnover("influence", "run", "--config", config, expect=2).stderr
    assert "'method' must be one of linear, exact, rerank, auto, got 'magic'" in refused
    config.write_text('method = "exact"\nghosts = 12\nsite = ["*"]\n')
    assert "run is not a run" in turnover("influence", "run", "--config", config, expect=2).stderr
    config.write_text('ranking = "self"\nfraction = [0.1, 1]\nseeds = 1\nout = "c.csv"\n')
    arguments = ("cleanse", "run", "--validation", "v.csv", "--config", config)
    assert "run is not a run" in turnover(*arguments, expect=2).stderr


def test_every_option_of_a_file_is_a_long_option() -> None:
    from turnover.cli import EXAMPLES, app
    from turnover.cli.config import options_of

    group = typer.main.get_command(app)
    for command in EXAMPLES:
        parameters = group.commands[command.__name__].params
        if not any(one.name == "config" for one in parameters):
            continue
        there = {
            name.removeprefix("--")
            for one in parameters
            for name in (one.opts if one.param_type_name == "option" else [one.name])
        }
        assert set(options_of(command)) == there - {"config", "json", "help"}
        flags = [one for one in parameters if one.param_type_name == "option" and one.is_flag]
        for flag in flags:  # what the file sets can be unset
            assert flag.secondary_opts or flag.name in ("as_json", "help")


def test_a_command_with_odd_names_can_be_made_again(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / 'a "quoted"\nfolder \\ é'
    folder.mkdir()
    train = write_csv(folder / "train.csv", sentences(48))
    monkeypatch.chdir(folder)
    turnover(*fit_arguments("train.csv", encoder, "r", "--no-compare", "--epochs", 1))
    assert tomllib.loads((folder / "r" / "fit.toml").read_text("utf-8"))["data"] == str(train)
    monkeypatch.chdir(tmp_path)
    turnover("fit", "--config", folder / "r" / "fit.toml", "--out", "again")
    name = WEIGHTS[0]
    assert (folder / "r" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_images_are_made_again_from_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("PIL")
    import numpy as np

    drawn = np.random.default_rng(0).integers(0, 256, (40, 32, 32), np.uint8)
    labels = np.array(["a", "b"] * 20)
    source = tmp_path / "images.npz"
    np.savez(source, image=drawn, label=labels)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vgg11").mkdir()  # a folder of that name is not the model
    shape = ("--model", "vgg11", "--width", 4, "--hidden", 16, "--epochs", 1, "--no-compare")
    turnover("fit", source, *shape, "--out", tmp_path / "first")
    recipe = tmp_path / "first" / "fit.toml"
    turnover("fit", "--config", recipe, "--out", tmp_path / "again")
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "again"))
    assert first.read_bytes() == second.read_bytes()
    drawn[0] += 1
    np.savez(source, image=drawn, label=labels)
    refused = turnover("fit", "--config", recipe, "--out", tmp_path / "third", expect=2)
    assert "changed" in refused.stderr
