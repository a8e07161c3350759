"""The command line from outside: real processes, real files, a small BERT of the real architecture."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

GOOD = ["a fine warm film", "great acting and great fun", "moving , wise and funny"]
BAD = ["a dull cold film", "poor acting and no fun", "boring , flat and silly"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@dataclass(frozen=True)
class Finished:
    stdout: str
    stderr: str


def turnover(*arguments: object, expect: int = 0) -> Finished:
    """The command in this process: importing the libraries anew takes longer than the work."""
    from turnover import cli

    out, err = io.StringIO(), io.StringIO()
    argv = ["turnover", *map(str, arguments)]
    with (  # noqa: PT012 - the patches have to be undone with it
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):
        patch.setattr(sys, "argv", argv)
        patch.setenv("COLUMNS", "200")
        cli.main()
    assert (stop.value.code or 0) == expect, err.getvalue()[-3000:]
    return Finished(out.getvalue(), err.getvalue())


def turnover_process(
    *arguments: object, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "turnover", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, cwd=cwd
    )


def write_csv(path: Path, rows: list[tuple[object, ...]], header: str = "id,text,label") -> Path:
    lines = [header, *(",".join(f'"{value}"' for value in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def sentences(count: int, start: int = 0) -> list[tuple[object, ...]]:
    return [
        (
            start + i,
            f"{(GOOD if i % 2 else BAD)[i % 3]} number {start + i}",
            "pos" if i % 2 else "neg",
        )
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = sorted({word for text in GOOD + BAD for word in text.split()} | {"number"})
    digits = [str(i) for i in range(10)]
    vocabulary = [*special, *words, *digits, *(f"##{d}" for d in digits)]
    tokenizer = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    fast.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    with torch.random.fork_rng():  # what the tests see may not hang on those before
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    test = [(i, t, "neg" if n < 4 else label) for n, (i, t, label) in enumerate(sentences(24, 500))]
    return write_csv(folder / "train.csv", sentences(48)), write_csv(folder / "test.csv", test)


def fit_arguments(train: object, encoder: Path, out: Path, *more: object) -> list[object]:
    return [
        *("fit", train, "--model", encoder, "--out", out, "--head-units", 64, "--lora-rank", 4),
        *("--epochs", 2, "--batch-size", 8, "--head-learning-rate", 0.01, *more),
    ]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, encoder: Path, data: tuple[Path, Path]) -> Path:
    out = tmp_path_factory.mktemp("runs") / "small"
    turnover(*fit_arguments(data[0], encoder, out, "--test", data[1], "--id-column", "id"))
    turnover("influence", out, "--ghosts", 200)
    return out


@pytest.fixture
def copy_of_run(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_fit_influence_explain_and_report_work_end_to_end(run: Path, tmp_path: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["n_train"] == 48
    assert metrics["n_test"] == 24
    assert metrics["mask_units"] == 64 + 2 * 2 * 4
    assert metrics["audit"]["leaking_share"] == 0
    assert metrics["audit"]["clean"]
    assert metrics["seconds"]["influence"] > 0
    assert len(metrics["curves"]["steps"]) == 9
    explained = json.loads(turnover("explain", run, "--json", "--show", 100).stdout)
    assert len(explained) == metrics["errors_explained"] > 0
    assert {"key", "label", "score", "z", "q", "text"} <= set(explained[0]["helpful"][0])
    gram = explained[0]["gram"]
    assert gram["helpful"] and gram["harmful"]
    assert all(one["score"] > 0 and one["standard_error"] > 0 for one in gram["helpful"])
    assert all(one["score"] < 0 and one["standard_error"] > 0 for one in gram["harmful"])
    shown = turnover("explain", run, "--show", 1).stdout
    assert "Turn-over:" in shown and "Gram:" in shown
    turnover("report", run, "--out", tmp_path / "with.html")
    turnover("report", run, "--out", tmp_path / "without.html", "--no-text")
    for instance in (explained[0]["helpful"][0]["text"], gram["helpful"][0]["text"]):
        assert instance in (tmp_path / "with.html").read_text()
        assert instance not in (tmp_path / "without.html").read_text()


def test_the_pairs_of_gram_in_a_run_are_those_of_the_estimator(run: Path) -> None:
    from turnover import Influence
    from turnover.runs.run import Run

    loaded = Run.load(run)
    train, test = loaded.encode(loaded.train), loaded.encode(loaded.test)
    explained = json.loads(turnover("explain", run, "--json", "--show", 100).stdout)
    order = [loaded.test.keys.index(one["key"]) for one in explained]
    fitted = Influence(loaded.network, method="gram").fit([train.batch(range(48))])
    result = fitted.estimate([test.batch(order)])
    for scores, errors, one in zip(result.scores, result.standard_error, explained, strict=True):
        for side, best in (("helpful", scores.argsort()[::-1]), ("harmful", scores.argsort())):
            listed = one["gram"][side]
            first = int(best[0])
            assert listed[0]["key"] == loaded.train.keys[first]
            assert listed[0]["score"] == pytest.approx(scores[first], rel=1e-3)
            # Halves are of row numbers, and the run has its rows in another order.
            assert listed[0]["standard_error"] == pytest.approx(errors[first], rel=1.0)


def test_gram_can_be_left_out(copy_of_run: Path) -> None:
    turnover("influence", copy_of_run, "--no-gram", "--ghosts", 100)
    assert not (copy_of_run / "results" / "gram.zarr").exists()
    (explained,) = json.loads(turnover("explain", copy_of_run, "--json", "--show", 1).stdout)
    assert explained["gram"] is None
    assert "Gram:" not in turnover("explain", copy_of_run, "--show", 1).stdout
    turnover("report", copy_of_run)


def test_a_run_holds_only_data_and_no_leftovers(run: Path) -> None:
    endings = {path.suffix for path in run.rglob("*") if path.is_file()}
    chunks = {""}
    assert endings <= {".json", ".jsonl", ".toml", ".safetensors", ".html", ".txt"} | chunks
    assert not list(run.parent.glob(".*")) + list(run.rglob(".*"))


def test_a_new_text_can_be_explained(run: Path) -> None:
    arguments = ("explain", run, "--text", "a dull film", "--label", "neg", "--json")
    (explanation,) = json.loads(turnover(*arguments).stdout)
    assert explanation["true_label"] == "neg"
    assert explanation["noise_floor"] > 0
    assert explanation["gram"]["helpful"][0]["standard_error"] > 0
    (bare,) = json.loads(turnover(*arguments, "--no-gram").stdout)
    assert bare == explanation | {"gram": None}


def test_a_loaded_run_predicts_what_was_trained(run: Path) -> None:
    import torch

    from turnover.runs.run import Run
    from turnover.tasks.training import evaluate

    loaded = Run.load(run)
    encoded = loaded.encode(loaded.test)
    result = evaluate(loaded.model, encoded, range(24), lambda _: loaded.network.mean())
    metrics = json.loads((run / "metrics.json").read_text())
    assert result.accuracy()[0] == pytest.approx(metrics["accuracy"]["turnover"])
    assert result.loss.mean().item() == pytest.approx(metrics["loss"]["test_mean"], abs=1e-5)
    assert torch.equal(loaded.train.ids, torch.arange(48))


def test_fit_without_test_data_holds_some_out(
    encoder: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    turnover(*fit_arguments(data[0], encoder, tmp_path / "r", "--no-compare", "--epochs", 1))
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert metrics["n_train"] + metrics["n_test"] == 48
    assert metrics["n_test"] > 0
    assert "without_turnover" not in metrics["accuracy"]


def test_explaining_the_plan_names_every_method_and_writes_nothing(copy_of_run: Path) -> None:
    before = sorted(path.name for path in (copy_of_run / "results").iterdir())
    metrics = (copy_of_run / "metrics.json").read_text()
    out = turnover("influence", copy_of_run, "--explain-plan", "--ghosts", 100).stdout
    if "no misclassified" not in out:
        assert all(word in out for word in ("linear", "rerank", "exact", "GiB", "noise floor"))
    assert sorted(path.name for path in (copy_of_run / "results").iterdir()) == before
    assert (copy_of_run / "metrics.json").read_text() == metrics


@pytest.mark.parametrize("method", ["auto", "exact", "rerank"])
def test_every_method_scores_a_run(method: str, copy_of_run: Path) -> None:
    turnover("influence", copy_of_run, "--method", method, "--ghosts", 100)
    metrics = json.loads((copy_of_run / "metrics.json").read_text())
    chosen = metrics["influence"]["plan"]["chosen"] if method == "auto" else method
    assert metrics["influence"]["method"] == chosen
    assert not list((copy_of_run / "results").glob(".*"))
    turnover("report", copy_of_run)


def test_groups_share_a_mask(encoder: Path, tmp_path: Path) -> None:
    rows = [(f"source {i % 5}", text, label) for i, (_, text, label) in enumerate(sentences(60))]
    path = write_csv(tmp_path / "grouped.csv", rows)
    out = tmp_path / "r"
    more = ("--group-column", "id", "--test", path, "--no-compare", "--epochs", 1)
    turnover(*fit_arguments(path, encoder, out, *more))
    turnover("influence", out, "--ghosts", 100)
    explained = json.loads(turnover("explain", out, "--json", "--top", 50, "--show", 1).stdout)
    assert len(explained[0]["helpful"]) + len(explained[0]["harmful"]) <= 5
    rows = [one["text"] for side in explained[0]["gram"].values() for one in side]
    assert len(rows) > 5, "gram tells the rows of a group apart"


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "tsv"])
def test_other_formats_give_the_same_data(
    ending: str, data: tuple[Path, Path], tmp_path: Path
) -> None:
    import datasets

    from turnover.data.base import Columns
    from turnover.data.text import read

    table = datasets.Dataset.from_csv(str(data[0]), keep_in_memory=True)
    path = tmp_path / f"data.{ending}"
    if ending == "tsv":
        table.to_csv(str(path), sep="\t", index=False)
    else:
        {"jsonl": table.to_json, "parquet": table.to_parquet}[ending](str(path))
    first, second = (read(str(p), Columns(id="id")) for p in (data[0], path))
    assert first.texts == second.texts
    assert first.labels == second.labels
    assert first.ids.tolist() == second.ids.tolist()


BAD_FILES = {
    "missing column": (
        [(1, "good", "pos"), (2, "bad", "neg")],
        "id,sentence,label",
        "no column 'text'",
    ),
    "empty file": (None, "", "the file is empty"),
    "no rows": ([], "id,text,label", "no rows"),
    "duplicate ids": ([(1, "good", "pos"), (1, "bad", "neg")], "id,text,label", "duplicate ids"),
    "one class": ([(1, "good", "pos"), (2, "bad", "pos")], "id,text,label", "one class 'pos'"),
    "regression": ([(1, "good", "0.25"), (2, "bad", "-1.5")], "id,text,label", "regression"),
    "no label": ([(1, "good", "pos"), (2, "bad", "")], "id,text,label", "row 2 has no label"),
    "no text": ([(1, " ", "pos"), (2, "bad", "neg")], "id,text,label", "row 1 has no text"),
    "no id": ([(1, "good", "pos"), ("", "bad", "neg")], "id,text,label", "no id"),
    "negative id": ([(-1, "good", "pos"), (2, "bad", "neg")], "id,text,label", "ghosts"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_data_is_refused_by_name(name: str, encoder: Path, tmp_path: Path) -> None:
    rows, header, message = BAD_FILES[name]
    path = tmp_path / "data.csv"
    if rows is None:
        path.touch()
    else:
        write_csv(path, rows, header)
    out = tmp_path / "run"
    result = turnover(*fit_arguments(path, encoder, out, "--id-column", "id"), expect=2)
    assert message in result.stderr
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_multi_label_targets_are_refused(encoder: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": "good", "label": [0, 1]}) + "\n" for _ in range(3)))
    result = turnover(*fit_arguments(path, encoder, tmp_path / "run"), expect=2)
    assert "multi-label" in result.stderr


def test_an_unknown_label_in_the_test_data_is_named(
    encoder: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    test = write_csv(tmp_path / "test.csv", [(900, "so so", "neutral")])
    result = turnover(*fit_arguments(data[0], encoder, tmp_path / "r", "--test", test), expect=2)
    assert "unknown label 'neutral'" in result.stderr
    assert "neg, pos" in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model", "no/such-model", "no/such-model"),
        ("--keep", "1.5", "keep must lie"),
        ("--head-units", "0", "--head-units"),
        ("--epochs", "0", "epochs"),
        ("--learning-rate", "nan", "learning"),
        ("--site", "encoder.encoder.layer.1.attention.self.qurey", "layer.1.attention.self.query"),
        ("--text-column", "texts", "did you mean 'text'"),
    ],
)
def test_bad_settings_are_refused_before_training(
    option: str, value: str, message: str, encoder: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    result = turnover(*fit_arguments(data[0], encoder, tmp_path / "r", option, value), expect=2)
    assert message in result.stderr
    assert not (tmp_path / "r").exists()


def test_a_loss_that_becomes_nan_ends_the_fit_with_the_mend(
    encoder: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    more = ("--learning-rate", "1e30", "--head-learning-rate", "1e30")
    result = turnover(*fit_arguments(data[0], encoder, tmp_path / "r", *more), expect=2)
    assert "loss became" in result.stderr
    assert "lower the learning rates" in result.stderr
    assert not list(tmp_path.iterdir())


def test_sites_that_leak_are_reported(
    encoder: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    more = ("--site", "lora", "--no-compare", "--epochs", 1, "--test", data[1])
    result = turnover(*fit_arguments(data[0], encoder, tmp_path / "r", *more))
    assert "head.spread.weight" in result.stdout
    assert "freeze these" in result.stdout


def test_an_existing_run_is_not_overwritten_unasked(
    encoder: Path, data: tuple[Path, Path], copy_of_run: Path
) -> None:
    result = turnover(*fit_arguments(data[0], encoder, copy_of_run), expect=2)
    assert "--overwrite" in result.stderr


def test_a_folder_that_is_not_a_run_is_never_replaced(
    encoder: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    turnover(*fit_arguments(data[0], encoder, tmp_path / "mine", "--overwrite"), expect=2)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_result_of_another_model_is_refused(copy_of_run: Path) -> None:
    from safetensors.torch import load_file, save_file

    from turnover.runs.run import write_digests

    weights = load_file(copy_of_run / "model.safetensors")
    weights["head.spread.weight"][0, 0] += 1e-3
    save_file(weights, copy_of_run / "model.safetensors")
    write_digests(copy_of_run)
    for command in ("explain", "report"):
        result = turnover(command, copy_of_run, expect=2)
        assert "belongs to another model or mask spec" in result.stderr


def test_a_result_of_another_spec_is_refused(copy_of_run: Path) -> None:
    from turnover import MaskSpec, attach
    from turnover.runs.run import Run, write_digests

    path = copy_of_run / "masks.json"
    masks = json.loads(path.read_text())
    masks["spec"]["seed"] = 99
    path.write_text(json.dumps(masks))
    write_digests(copy_of_run)
    assert "fingerprint" in turnover("explain", copy_of_run, expect=2).stderr

    masks["spec"]["seed"] = 0
    path.write_text(json.dumps(masks))
    write_digests(copy_of_run)
    loaded = Run.load(copy_of_run)
    loaded.network.detach()
    other = attach(loaded.model, loaded.network.sites, MaskSpec(seed=99))
    other.units.update(loaded.network.units)
    path.write_text(json.dumps(other.to_dict()))
    write_digests(copy_of_run)
    assert (
        "belongs to another model or mask spec" in turnover("explain", copy_of_run, expect=2).stderr
    )


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "masks.json", "classifier.json", "model.safetensors", "train.jsonl"),
        *(
            "encoder/config.json",
            "results/errors.zarr/zarr.json",
            "results/errors.zarr/score/c/0/0",
            "results/targets.json",
            "metrics.json",
        ),
    ],
)
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_run_is_refused_by_name(name: str, damage: str, copy_of_run: Path) -> None:
    path = copy_of_run / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = turnover("report", copy_of_run, expect=2)
    assert str(copy_of_run) in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "magic"), "'linear', 'exact'"),
        (("--objective", "accuracy"), "'margin', 'cross_entropy'"),
        (("--ghosts", "3"), "'--ghosts'"),
    ],
)
def test_bad_influence_settings_list_what_there_is(
    arguments: tuple[str, ...], message: str, run: Path
) -> None:
    assert message in turnover("influence", run, *arguments, expect=2).stderr


def test_gram_in_place_of_the_pairs_is_refused_with_what_to_do(run: Path) -> None:
    from turnover import InputError
    from turnover.runs.run import Run
    from turnover.tasks.score import ScoreConfig, score

    with pytest.raises(InputError, match="estimated beside those of every method"):
        score(Run.load(run), ScoreConfig("gram"))


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    assert "is not a run" in turnover("influence", tmp_path, expect=2).stderr


def test_explaining_an_unknown_label_lists_the_classes(run: Path) -> None:
    result = turnover("explain", run, "--text", "fine", "--label", "maybe", expect=2)
    assert "neg, pos" in result.stderr


def test_a_real_process_exits_with_2_and_one_line(tmp_path: Path) -> None:
    finished = turnover_process("influence", tmp_path)
    assert finished.returncode == 2
    assert finished.stderr.startswith("turnover: ")
    assert len(finished.stderr.splitlines()) == 1


@pytest.mark.long
def test_a_killed_fit_resumes_and_ends_as_an_uninterrupted_one(
    encoder: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    def arguments(name: str) -> list[object]:
        more = ("--test", data[1], "--id-column", "id", "--epochs", 12, "--memorization")
        return fit_arguments(data[0], encoder, tmp_path / name, *more)

    turnover(*arguments("whole"))
    process = subprocess.Popen(
        [sys.executable, "-m", "turnover", *map(str, arguments("killed"))],
        env=ENVIRONMENT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    checkpoint = tmp_path / ".killed.partial" / "turnover.checkpoint"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert checkpoint.exists()
    assert not (tmp_path / "killed").exists()
    turnover(*arguments("killed"))
    files = ("model.safetensors", "without_turnover/model.safetensors", "memorization.safetensors")
    for name in files:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    curves = [
        json.loads((tmp_path / n / "metrics.json").read_text())["curves"]
        for n in ("killed", "whole")
    ]
    assert curves[0] == curves[1]
    assert not list(tmp_path.glob(".*"))


def test_a_cut_off_fit_is_not_resumed_under_other_masks(
    encoder: Path, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turnover.tasks import fit as module

    def arguments(name: str, keep: float) -> list[object]:
        more = ("--test", data[1], "--id-column", "id", "--no-compare", "--keep", keep)
        return fit_arguments(data[0], encoder, tmp_path / name, *more)

    with monkeypatch.context() as patch:  # trained and cut off before the run is written
        patch.setattr(module, "_metrics", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        turnover(*arguments("cut", 0.5), expect=130)
    (tmp_path / ".cut.partial" / ".turnover.checkpoint.1").write_bytes(b"half a checkpoint")
    turnover(*arguments("cut", 0.3))
    turnover(*arguments("whole", 0.3))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]
    assert not list((tmp_path / "cut").glob(".*"))


def test_training_rows_are_predicted_by_the_networks_that_never_learned_them(
    copy_of_run: Path, tmp_path: Path
) -> None:
    from turnover.runs.run import Run

    said = turnover("predict", copy_of_run, "--hidden", "--no-calibrate").stdout
    with (copy_of_run / "results" / "hidden_predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    loaded = Run.load(copy_of_run)
    assert [row["key"] for row in rows] == loaded.train.keys
    assert "share of the exposed network 0.00" in said
    encoded = loaded.encode(loaded.train)
    for row in (0, 17, 47):
        with loaded.network.without(int(loaded.train.ids[row])), torch.no_grad():
            (alone,) = encoded.batch([row]).call(loaded.model).softmax(dim=1)
        given = [float(rows[row][f"p({name})"]) for name in loaded.train.classes]
        assert given == pytest.approx(alone.tolist(), abs=1e-2)  # bfloat16 where the machine has it
        label = loaded.train.labels[row]
        assert rows[row]["label"] == loaded.train.classes[label]
        assert float(rows[row]["probability_of_label"]) == given[label]
    out = tmp_path / "calibrated.csv"
    turnover("predict", copy_of_run, "--hidden", "--out", out)
    assert len(out.read_text().splitlines()) == 49


def test_test_rows_are_predicted_with_and_without_an_instance(copy_of_run: Path) -> None:
    path = copy_of_run / "results" / "predictions.csv"
    turnover("predict", copy_of_run)
    whole = path.read_text()
    turnover("predict", copy_of_run, "--without", 5)
    assert len(path.read_text().splitlines()) == 25
    assert path.read_text() != whole


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--hidden", "--without", "5"), "one of the two"),
        (("--without", "no such key"), "no training row has the key 'no such key'"),
        (("--out", "no/such/folder/p.csv"), "does not exist"),
    ],
)
def test_predictions_of_what_is_not_there_are_refused(
    copy_of_run: Path, arguments: tuple[str, ...], said: str
) -> None:
    assert said in turnover("predict", copy_of_run, *arguments, expect=2).stderr
    assert not list(copy_of_run.rglob("*predictions.csv*"))


def test_a_run_without_groups_says_so(run: Path) -> None:
    assert "--group-column" in turnover("groups", run, expect=2).stderr


@pytest.mark.slow
def test_a_corrupted_source_is_found_and_predicted_without(encoder: Path, tmp_path: Path) -> None:
    from turnover.runs.run import Run

    flipped = {"pos": "neg", "neg": "pos"}
    train = [
        (f"source {i % 8}", text, flipped[label] if i % 8 == 3 else label)
        for i, text, label in sentences(240)
    ]
    data = write_csv(tmp_path / "train.csv", train, "source,text,label")
    test = write_csv(tmp_path / "test.csv", sentences(60, 500))
    run = tmp_path / "run"
    turnover(
        *fit_arguments(data, encoder, run, "--test", test, "--group-column", "source"),
        *("--no-compare", "--head-units", 2048, "--head-learning-rate", 0.001),
    )
    found = json.loads(turnover("groups", run, "--json").stdout)
    listed = found["groups"]
    assert len(listed) == 8 and sum(one["rows"] for one in listed) == 240
    assert [one["score"] for one in listed] == sorted(one["score"] for one in listed)
    worst = listed[0]
    assert worst["key"] == "source 3" and worst["score"] < 0 and worst["q"] <= 0.05
    assert all(one["score"] > worst["score"] / 2 for one in listed[1:])
    shown = turnover("groups", run, "--show", 2).stdout
    assert "source 3" in shown and json.loads((run / "results" / "groups.json").read_text())
    # What the table says of the network without it is what the network without it predicts.
    turnover("predict", run, "--without", "source 3")
    with (run / "results" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["predicted"] == row["label"] for row in rows) / len(rows)
    assert right == pytest.approx(worst["accuracy_without"])
    loaded = Run.load(run)
    with loaded.network.without(int(loaded.train.ids[3])), torch.no_grad():
        encoded = loaded.encode(loaded.test)
        (alone,) = encoded.batch([7]).call(loaded.model).softmax(dim=1)
    given = [float(rows[7][f"p({name})"]) for name in loaded.train.classes]
    assert given == pytest.approx(alone.tolist(), abs=1e-2)
    for wrong, said in (
        (("--method", "rerank"), "'linear', 'exact'"),
        (("--objective", "accuracy"), "'margin', 'cross_entropy'"),
        (("--show", "-1"), "'--show'"),
    ):
        assert said in turnover("groups", run, *wrong, expect=2).stderr


@pytest.fixture(scope="session")
def noisy_run(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    """A run whose training rows 7, 20, 33 and 46 have the other label."""
    folder = tmp_path_factory.mktemp("noisy")
    rows = [
        (i, text, ("neg" if label == "pos" else "pos") if i % 13 == 7 and i < 50 else label)
        for i, text, label in sentences(160)
    ]
    data = write_csv(folder / "train.csv", rows)
    test = write_csv(folder / "test.csv", sentences(60, 500))
    out = folder / "run"
    turnover(
        *fit_arguments(data, encoder, out, "--test", test, "--id-column", "id"),
        *("--no-compare", "--head-units", 2048, "--head-learning-rate", 0.001, "--epochs", 4),
        "--memorization",
    )
    return out


def test_wrong_labels_are_listed_decided_on_and_written(noisy_run: Path, tmp_path: Path) -> None:
    from turnover.data.base import Columns
    from turnover.data.text import read

    listed = tmp_path / "review.csv"
    turnover("review", noisy_run, "--out", listed, "--budget", 10)
    with listed.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    doubts = [float(row["probability_wrong"]) for row in rows]
    assert doubts == sorted(doubts, reverse=True)
    assert {row["key"] for row in rows[:4]} == {"7", "20", "33", "46"}
    for row in rows:
        assert row["suggested"] != row["label"] and row["decision"] == ""
        # Of two classes, the other one is right where the label is wrong.
        assert row["probability_of_suggested"] == row["probability_wrong"]
        votes = dict(vote.split(" ")[::-1] for vote in row["influencers"].split(", "))
        assert sum(map(int, votes.values())) == 10
    for row, decision in zip(rows, (rows[0]["suggested"], "remove", "keep", ""), strict=False):
        row["decision"] = decision
    with listed.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for ending in ("csv", "tsv", "jsonl", "parquet"):
        out = tmp_path / f"cleaned.{ending}"
        said = turnover("review", noisy_run, "--decisions", listed, "--out", out).stdout
        assert "158 kept, 1 removed, 1 relabelled" in said
        cleaned = read(str(out), Columns(id="id"))
        labels = dict(zip(cleaned.keys, cleaned.labels, strict=True))
        assert len(labels) == 159 and rows[1]["key"] not in labels
        assert cleaned.classes[labels[rows[0]["key"]]] == rows[0]["suggested"]
        assert cleaned.classes[labels[rows[2]["key"]]] == rows[2]["label"]
    assert not list(tmp_path.glob(".*"))


def test_where_nothing_is_sure_all_rows_are_kept(noisy_run: Path, tmp_path: Path) -> None:
    run, out = Path(shutil.copytree(noisy_run, tmp_path / "run")), tmp_path / "applied.csv"
    arguments = ("--apply", "relabel", "--least", 0.9999999999, "--out", out)
    said = turnover("review", run, *arguments).stdout
    assert "no label is wrong with a probability of 0.9999999999 or more" in said
    assert "160 kept, 0 removed, 0 relabelled" in said
    with out.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 160


@pytest.mark.parametrize(("way", "labels"), [("relabel", 160), ("remove", 156)])
def test_what_is_sure_is_relabeled_or_removed_and_measured(
    noisy_run: Path, tmp_path: Path, way: str, labels: int
) -> None:
    from turnover.runs.run import Run

    run, out = Path(shutil.copytree(noisy_run, tmp_path / "run")), tmp_path / "applied.csv"
    loaded = Run.load(run).train
    before = dict(zip(loaded.keys, (loaded.classes[one] for one in loaded.labels), strict=True))
    found = json.loads(turnover("review", run, "--apply", way, "--out", out, "--json").stdout)
    with out.open(newline="") as file:
        after = {row["id"]: row["label"] for row in csv.DictReader(file)}
    wrong = {"7", "20", "33", "46"}
    assert len(after) == labels
    changed = {key for key, label in before.items() if after.get(key) != label}
    assert changed == wrong
    assert found["removed"] + found["relabelled"] == 4 and set(found["accuracy"]) == {
        *("keep", "relabel", "remove")
    }
    again = tmp_path / "again.csv"
    turnover("review", run, "--decisions", found["decisions_file"], "--out", again)
    assert again.read_text() == out.read_text()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("key,decision\n7,maybe", "line 2: unknown decision 'maybe'"),
        ("key,decision\n7,keep\nnone,keep", "line 3: no training row has the key 'none'"),
        ("key,decision\n7,keep\n7,remove", "line 3: a second decision"),
        ("key\n7", "lacks a column"),
    ],
)
def test_decisions_that_cannot_be_meant_are_refused(
    noisy_run: Path, tmp_path: Path, lines: str, said: str
) -> None:
    path, out = tmp_path / "d.csv", tmp_path / "out.csv"
    path.write_text(lines + "\n")
    refused = turnover("review", noisy_run, "--decisions", path, "--out", out, expect=2)
    assert said in refused.stderr and not out.exists()


def test_reviews_that_cannot_be_written_are_refused(noisy_run: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (("--out", tmp_path / "review.xlsx"), "cannot write that format"),
        (("--out", tmp_path / "review.jsonl"), "is a CSV file"),
        (("--out", tmp_path / "no" / "review.csv"), "does not exist"),
        (("--budget", 0), "'--budget'"),
        (("--decisions", tmp_path / "none.csv", "--out", tmp_path / "o.csv"), "cannot be read"),
        (("--decisions", tmp_path / "n.csv", "--apply", "remove"), "give one of the two"),
        (("--least", 0.5), "give both"),
        (("--apply", "remove", "--least", 1.5), "above 0 and below 1, got 1.5"),
        (("--apply", "remove", "--least", "nan"), "above 0 and below 1, got nan"),
    ):
        assert said in turnover("review", noisy_run, *arguments, expect=2).stderr
    assert not list(tmp_path.iterdir())


def test_what_was_learned_by_heart_is_told_over_training(noisy_run: Path) -> None:
    from turnover.runs.run import Run
    from turnover.tasks.memorize import memorization

    shown = turnover("memorize", noisy_run, "--show", 4).stdout
    with (noisy_run / "results" / "memorization.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 160
    memorized = [float(row["memorization"]) for row in rows]
    assert memorized == sorted(memorized, reverse=True)
    assert {"7", "20", "33", "46"} <= {row["key"] for row in rows[:8]}
    assert rows[0]["text"] in shown and "epoch 4" in shown
    for row in rows:
        left = float(row["hidden_4"]) - float(row["exposed_4"])
        assert left == pytest.approx(float(row["memorization"]), abs=2e-4)
    found = memorization(Run.load(noisy_run))
    loss = json.loads((noisy_run / "metrics.json").read_text())["loss"]
    assert found.exposed.shape == (4, 160)
    assert found.exposed[-1].mean() == pytest.approx(loss["train_exposed"], rel=1e-4)
    assert found.hidden[-1].mean() == pytest.approx(loss["train_hidden"], rel=1e-4)
    curves = found.curves()
    assert np.allclose(curves["all"][0], found.exposed.mean(axis=1))
    gap = {name: (hidden - exposed)[-1] for name, (exposed, hidden) in curves.items()}
    assert gap["memorized"] > gap["all"] > 0
    assert curves["easy"][1][-1] < curves["all"][1][-1] < curves["memorized"][1][-1]


def test_a_run_that_was_not_followed_or_whose_file_is_damaged_says_so(
    run: Path, noisy_run: Path, tmp_path: Path
) -> None:
    from turnover.runs.run import write_digests

    assert "--memorization" in turnover("memorize", run, expect=2).stderr
    copy = Path(shutil.copytree(noisy_run, tmp_path / "copy"))
    path = copy / "memorization.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in turnover("memorize", copy, expect=2).stderr
    path.write_bytes(whole)
    lines = (copy / "train.jsonl").read_text().splitlines()
    (copy / "train.jsonl").write_text("\n".join(lines[:100]) + "\n")
    write_digests(copy)
    assert "other training data" in turnover("memorize", copy, expect=2).stderr


def test_decisions_are_written_into_a_run_that_has_no_results_yet(
    noisy_run: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(noisy_run, tmp_path / "copy"))
    shutil.rmtree(copy / "results", ignore_errors=True)
    (tmp_path / "d.csv").write_text("key,decision\n7,remove\n")
    turnover("review", copy, "--decisions", tmp_path / "d.csv")
    assert len((copy / "results" / "decided.csv").read_text().splitlines()) == 160
