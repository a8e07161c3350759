"""Models that plain code trained, explained from their folder: scores, classes, layers, commands."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("typer")

import encoders
import trained
from test_cli import turnover as command
from turnover import Batch, Influence, InputError, attribute, objectives
from turnover.data.base import Columns
from turnover.io.parsing import read_json
from turnover.models.classifiers import load_classifier
from turnover.runs.run import Run
from viewing import serving

TRAIN, TEST = trained.rows(60, 0), trained.rows(40, 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training and test texts, a model of them, and an adapter."""
    folder = tmp_path_factory.mktemp("trained")
    trained.write(folder / "train.csv", TRAIN, source=[f"s{row % 5}" for row in range(60)])
    trained.write(folder / "test.csv", TEST)
    trained.texts(folder / "model", TRAIN)
    trained.adapter(folder / "adapter", folder / "model", TRAIN)
    return folder


@pytest.fixture(scope="module")
def run(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    said = command(
        *("attribute", "--model", files / "model", "--train", files / "train.csv"),
        *("--test", files / "test.csv", "--id-column", "id", "--layers", "all", "--out", out),
    )
    assert "expected: " in said.stdout and "by gram" in said.stdout
    return out


XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}


def explained(files: Path, out: Path, **options: Any) -> Run:
    options = {"columns": Columns(id="id"), "model": files / "model"} | options
    train, test = (options.pop(name, files / f"{name}.csv") for name in ("train", "test"))
    return attribute(options.pop("model"), train, test, out, **options)


def in_order(run: Run) -> np.ndarray[Any, Any]:
    """Scores (test rows, training rows) of a run with all targets."""
    result = run.read_result("errors")
    rows = read_json(run.folder / "results" / "targets.json")["rows"]
    at = {one: column for column, one in enumerate(result.train_ids.tolist())}
    found = np.empty((len(run.test), len(run.train)), dtype=np.float32)
    found[rows] = result.scores[:, [at[one] for one in run.train.ids.tolist()]]
    return found


def by_hand(
    model: Any, tokenizer: Any, train: Any = TRAIN, test: Any = TEST
) -> np.ndarray[Any, Any]:
    """The same scores by the Python API, from batches of rows of similar length, as runs make them."""

    def batches(data: list[tuple[str, int]]) -> list[Batch]:
        tokens = tokenizer([text for text, _ in data])["input_ids"]
        order = sorted(range(len(data)), key=lambda row: len(tokens[row]))
        made = []
        for start in range(0, len(order), 32):
            rows = order[start : start + 32]
            some = tokenizer([data[row][0] for row in rows], padding=True, return_tensors="pt")
            inputs = {name: some[name] for name in tokenizer.model_input_names if name in some}
            labels = torch.tensor([data[row][1] for row in rows])
            made.append(Batch(inputs, labels, torch.tensor(rows)))
        return made

    influence = Influence(model, objectives.margin, method="gram").fit(batches(train))
    result = influence.estimate(batches(test))
    found = np.empty_like(result.scores)
    assert result.target_ids is not None
    found[result.target_ids] = result.scores
    return found[:, np.argsort(result.train_ids)]


@pytest.mark.parametrize("layers", ["all", "last", "head", "*layer.1*"])
def test_scores_are_those_of_the_python_interface_bit_for_bit(
    files: Path, tmp_path: Path, layers: str
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    found = in_order(explained(files, tmp_path / "run", targets="all", layers=layers))
    model = AutoModelForSequenceClassification.from_pretrained(files / "model").eval()
    above = ["layer.1.", "pooler", "classifier"]
    wanted = {"all": [""], "last": above, "head": above[2:], "*layer.1*": above[:1]}[layers]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in wanted))
    assert np.array_equal(found, by_hand(model, AutoTokenizer.from_pretrained(files / "model")))


def test_an_adapter_is_explained_by_what_was_trained_of_it(files: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    before = {path: path.read_bytes() for path in (files / "adapter").iterdir()}
    run = explained(files, tmp_path / "run", model=files / "adapter", targets="all")
    base = AutoModelForSequenceClassification.from_pretrained(files / "model")
    model = PeftModel.from_pretrained(base, files / "adapter", is_trainable=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    assert np.array_equal(in_order(run), by_hand(model, tokenizer))
    assert {path: path.read_bytes() for path in (files / "adapter").iterdir()} == before
    names = {name for name, one in run.model.named_parameters() if one.requires_grad}
    assert names == {name for name, one in model.named_parameters() if one.requires_grad}
    loras = explained(files, tmp_path / "loras", model=files / "adapter", layers="lora")
    chosen = [name for name, one in loras.model.named_parameters() if one.requires_grad]
    assert chosen and all("lora_" in name for name in chosen)


def test_an_adapter_may_have_another_number_of_classes_than_its_base(
    files: Path, tmp_path: Path
) -> None:
    wide = trained.texts(tmp_path / "wide", TRAIN, id2label={0: "a", 1: "b", 2: "c"}, num_labels=3)
    model = trained.adapter(tmp_path / "adapter", wide, TRAIN)
    with pytest.raises(InputError, match="does not name its 2 classes"):
        explained(files, tmp_path / "run", model=model)
    run = explained(files, tmp_path / "run", model=model, classes=("neg", "pos"))
    assert run.read_result("aggregate").scores.any()
    found = json.loads(command("predict", run.folder, "--json").stdout)
    assert found["accuracy"] > 0.6


@pytest.mark.parametrize("kind", ["biases", "dora", "ia3", "prompt"])
def test_other_adapters_predict_as_peft_has_them_or_are_refused(
    files: Path, tmp_path: Path, kind: str
) -> None:
    import peft
    from transformers import AutoModelForSequenceClassification

    settings = {
        "biases": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=4, bias="all"),
        "dora": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=4, use_dora=True),
        "ia3": lambda: peft.IA3Config(
            task_type="SEQ_CLS", target_modules=["key", "value"], feedforward_modules=[]
        ),
        "prompt": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    }[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(files / "model")
        model = peft.get_peft_model(base, settings)
        if kind != "prompt":
            trained.train(model, encoders.tokenizer(), TRAIN, steps=5)
    model.save_pretrained(tmp_path / "adapter")
    if kind == "prompt":
        with pytest.raises(InputError, match="PROMPT_TUNING"):
            load_classifier(str(tmp_path / "adapter"))
        return
    batch = encoders.tokenizer()([text for text, _ in TRAIN[:5]], padding=True, return_tensors="pt")
    found = load_classifier(str(tmp_path / "adapter")).model
    with torch.no_grad():
        assert torch.equal(found(**batch).logits, model.eval()(**batch).logits)


def test_every_command_takes_the_run(run: Path, tmp_path: Path) -> None:
    metrics = json.loads(command("influence", run, "--json").stdout)["metrics"]
    assert metrics["influence"]["method"] == "gram"
    errors = json.loads(command("explain", run, "--json").stdout)
    assert len(errors) == min(3, metrics["errors_explained"]) > 0
    for one in errors:
        assert all(item["standard_error"] > 0 for item in one["helpful"] + one["harmful"])
    [given] = json.loads(command("explain", run, "--text", "good bad film", "--json").stdout)
    assert given["helpful"] and given["gram"] is None
    page = tmp_path / "page.html"
    command("report", run, "--out", page)
    assert "trained elsewhere" in page.read_text() and "of the ghosts" not in page.read_text()
    found = json.loads(command("review", run, "--budget", "5", "--json").stdout)
    assert len(found["rows"]) == 5
    predicted = json.loads(command("predict", run, "--json").stdout)
    assert predicted["accuracy"] == pytest.approx(metrics["accuracy"]["model"])
    with serving(run) as server:
        about = server.get("about")
        assert about["floor"] == "typical standard error" and len(about["meanings"]) == 1
        listed = server.get("errors")["items"]
        assert server.get(f"errors/{listed[0]['error']}")["helpful"]
        assert server.get("train/0")["own"]["score"] > 0


def test_what_needs_masks_says_so_in_one_line(run: Path) -> None:
    for given in (("predict", run, "--hidden"), ("predict", run, "--without", "r1")):
        assert "needs turn-over training" in command(*given, expect=2).stderr
    assert "--memorization" in command("memorize", run, expect=2).stderr
    for option in (("--method", "exact"), ("--ghosts", "20"), ("--site", "*"), ("--no-gram",)):
        said = command("influence", run, *option, expect=2).stderr
        assert "trained without" in said and len(said.splitlines()) == 1


def test_review_finds_rows_whose_label_is_not_that_of_their_words(run: Path) -> None:
    wrong = {
        f"r{row}"
        for row, (text, label) in enumerate(TRAIN)
        if text.split()[0] in (trained.GOOD, trained.BAD)[label]
    }
    rows = json.loads(command("review", run, "--budget", len(wrong), "--json").stdout)["rows"]
    right = sum(one["key"] in wrong for one in rows)
    assert right > 2 * len(wrong) ** 2 / len(TRAIN)
    assert all(one["suggested"] != one["label"] for one in rows)


def test_labels_of_a_model_that_knows_another_class_are_reviewed_and_changed(
    files: Path, tmp_path: Path
) -> None:
    names = {0: "neg", 1: "pos", 2: "neutral"}
    trained.texts(tmp_path / "model", TRAIN, num_labels=3, id2label=names)
    explained(files, tmp_path / "run", model=tmp_path / "model", layers="head")
    rows = json.loads(command("review", tmp_path / "run", "--json").stdout)["rows"]
    assert {one["suggested"] for one in rows} == {"neg", "pos"}
    least, out = rows[1]["probability_wrong"], tmp_path / "changed.csv"
    said = command(
        *("review", tmp_path / "run", "--apply", "relabel", "--least", least, "--out", out)
    )
    assert "2 relabelled" in said.stdout
    before, after = ((path.read_text().splitlines()) for path in (files / "train.csv", out))
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 2
    assert "has learned the labels: gains come out too small" in said.stderr


@pytest.mark.long
def test_cleanse_ranks_rows_by_a_validation_file(files: Path, run: Path, tmp_path: Path) -> None:
    known = {text for text, _ in TRAIN + TEST}
    held = [one for one in trained.rows(60, 7) if one[0] not in known]
    held = trained.write(tmp_path / "held.csv", held)
    for given, warned in ((run, True), (tmp_path / "adapter", False)):
        if not warned:
            explained(files, given, model=files / "adapter")
        said = command(
            *("cleanse", given, "--validation", held, "--out", tmp_path / "cleaned.csv"),
            *("--seeds", 1, "--fraction", 0.1),
        )
        assert ("gains come out too small" in said.stderr) == warned
        assert (tmp_path / "cleaned.csv").exists()


def test_groups_are_sums_over_their_rows(files: Path, tmp_path: Path) -> None:
    rows = explained(files, tmp_path / "rows").read_result("aggregate")
    grouped = explained(files, tmp_path / "groups", columns=Columns(group="source"))
    found = json.loads(command("groups", grouped.folder, "--json").stdout)
    keys = grouped.train.groups
    assert sorted(one["key"] for one in found["groups"]) == sorted(set(keys))
    ids = Run.load(tmp_path / "rows").train.ids.tolist()
    score = dict(zip(rows.train_ids.tolist(), rows.scores.tolist(), strict=True))
    for one in found["groups"]:
        members = [ids[row] for row, key in enumerate(keys) if key == one["key"]]
        assert one["rows"] == len(members) == 12
        assert one["score"] == pytest.approx(sum(score[member] for member in members), rel=1e-4)
        assert one["standard_error"] > 0 and one["accuracy_with"] is None
    assert "accuracies with and without" in command("groups", grouped.folder).stdout
    assert "leave it out" in command("groups", grouped.folder, "--method", "exact", expect=2).stderr


@pytest.mark.parametrize(
    ("names", "own", "said"),
    [
        (("neg", "pos"), ("neg", "pos"), None),
        (("Neg", "POS"), ("neg", "pos"), "another case"),
        (("0", "1"), ("neg", "pos"), "0 = neg, 1 = pos"),
        (("0", "1"), None, "numbers of the model's outputs"),
        (("LABEL_0", "LABEL_1"), None, "numbers of the model's outputs"),
    ],
)
def test_labels_are_matched_with_the_classes_of_the_model(
    files: Path, tmp_path: Path, names: Any, own: Any, said: str | None
) -> None:
    model = tmp_path / "model"
    shutil.copytree(files / "model", model)
    config = json.loads((model / "config.json").read_text())
    config["id2label"] = {str(i): name for i, name in enumerate(own)} if own else None
    config["label2id"] = {name: i for i, name in enumerate(own)} if own else None
    (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v}))
    data = {
        name: trained.write(tmp_path / f"{name}.csv", rows, names)
        for name, rows in (("train", TRAIN), ("test", TEST))
    }
    out = command(
        *("attribute", "--model", model, "--train", data["train"], "--test", data["test"]),
        *("--id-column", "id", "--out", tmp_path / "run"),
    ).stdout
    assert ("numbers" in out or "case" in out) if said else "case" not in out
    assert said is None or said in out
    run = Run.load(tmp_path / "run")
    assert run.train.labels == [label for _, label in TRAIN]
    assert run.train.classes == list(names)  # as the user's files write them
    assert np.array_equal(
        run.read_result("aggregate").scores,
        explained(files, tmp_path / "same").read_result("aggregate").scores,
    )


def test_labels_that_are_no_class_are_refused_and_can_be_named(files: Path, tmp_path: Path) -> None:
    other = trained.write(tmp_path / "other.csv", TRAIN, ("down", "up"))
    test = trained.write(tmp_path / "test.csv", TEST, ("down", "up"))
    given = ("--train", other, "--test", test, "--id-column", "id", "--out", tmp_path / "run")
    said = command("attribute", "--model", files / "model", *given, expect=2).stderr
    assert "down, up" in said and "neg, pos" in said and not (tmp_path / "run").exists()
    named = ("--class-name", "down", "--class-name", "up")
    command("attribute", "--model", files / "model", *given, *named)
    assert Run.load(tmp_path / "run").train.labels == [label for _, label in TRAIN]
    for wrong, hint in ((("--class-name", "down"), "2 outputs"), (named[:2] * 2, "twice")):
        assert (
            hint
            in command(
                "attribute", "--model", files / "model", *given, *wrong, "--overwrite", expect=2
            ).stderr
        )
    numbers = trained.write(tmp_path / "numbers.csv", TRAIN, (1, 2))
    said = command(
        *("attribute", "--model", files / "model", "--train", numbers, "--test", numbers),
        *("--out", tmp_path / "none"),
        expect=2,
    ).stderr
    assert "none of the classes" in said


def test_names_that_look_made_up_are_names_where_their_numbers_are_others(
    files: Path, tmp_path: Path
) -> None:
    names = ("LABEL_1", "LABEL_0")
    model = trained.texts(tmp_path / "model", TRAIN, id2label=dict(enumerate(names)))
    data = {
        name: trained.write(tmp_path / f"{name}.csv", rows, names)
        for name, rows in (("train", TRAIN), ("test", TEST))
    }
    run = explained(files, tmp_path / "run", model=model, **data)
    assert run.train.labels == [label for _, label in TRAIN]
    assert run.train.classes == list(names)


def test_labels_and_names_that_fall_together_are_refused(files: Path, tmp_path: Path) -> None:
    mixed = [(text, label + 2 * (row % 2)) for row, (text, label) in enumerate(TRAIN)]
    train = trained.write(tmp_path / "mixed.csv", mixed, ("neg", "Pos", "neg", "pos"))
    with (
        pytest.warns(UserWarning, match="case alone"),
        pytest.raises(InputError, match="case alone"),
    ):
        explained(files, tmp_path / "run", train=train)
    model = trained.texts(tmp_path / "model", TRAIN, id2label={0: "neg", 1: "neg"})
    with pytest.raises(InputError, match="two classes of one name"):
        explained(files, tmp_path / "run", model=model)
    assert not (tmp_path / "run").exists()


def test_classes_in_the_wrong_order_are_noticed_by_the_training_rows(
    files: Path, tmp_path: Path
) -> None:
    data = ("--train", files / "train.csv", "--test", files / "test.csv", "--id-column", "id")
    given = ("attribute", "--model", files / "model", *data)
    right = command(*given, "--out", tmp_path / "right").stdout
    assert "of training rows" in right and "are these its training data" not in right
    swapped = ("--class-name", "pos", "--class-name", "neg")
    assert (
        "are these its training data" in command(*given, *swapped, "--out", tmp_path / "x").stdout
    )


def test_a_run_keeps_its_objective_and_the_random_generator_its_state(
    files: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run = explained(files, tmp_path / "run", objective="cross_entropy")
    assert torch.equal(torch.get_rng_state(), before)
    scores = run.read_result("aggregate").scores
    metrics = json.loads(command("influence", run.folder, "--json").stdout)["metrics"]
    assert metrics["influence"]["objective"] == "cross_entropy"
    assert np.array_equal(Run.load(run.folder).read_result("aggregate").scores, scores)


def test_an_adapter_of_a_distilbert_brings_both_layers_of_its_classifier(
    files: Path, tmp_path: Path
) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model

    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 19}
    encoders.folder(transformers.DistilBertConfig(**shape), tmp_path / "base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        saved = ["pre_classifier", "classifier"]
        lora = LoraConfig(task_type="SEQ_CLS", target_modules=["q_lin"], modules_to_save=saved)
        model = get_peft_model(whole, lora)
        trained.train(model, encoders.tokenizer(), TRAIN)
    model.save_pretrained(tmp_path / "adapter")
    run = explained(files, tmp_path / "run", model=tmp_path / "adapter", classes=("neg", "pos"))
    chosen = [name for name, one in run.model.named_parameters() if one.requires_grad]
    assert any("pre_classifier" in name for name in chosen)
    assert run.read_result("aggregate").scores.any()


def test_pairs_reach_the_model_as_its_tokenizer_makes_them(files: Path, tmp_path: Path) -> None:
    seconds = [text for text, _ in trained.rows(60, 5)]
    paired = trained.write(tmp_path / "pairs.csv", TRAIN, second=seconds)
    run = explained(
        files,
        tmp_path / "run",
        train=paired,
        test=paired,
        columns=Columns(id="id", second="second"),
        targets="all",
    )
    tokenizer = run.pipeline.tokenizer  # type: ignore[attr-defined]
    rows = [3, 9, 20]
    batch = run.encode(run.train).batch(rows)
    firsts, others = [TRAIN[row][0] for row in rows], [seconds[row] for row in rows]
    wanted = tokenizer(firsts, others, padding=True, return_tensors="pt")
    assert set(batch.inputs) == set(wanted)
    assert all(torch.equal(batch.inputs[name], wanted[name]) for name in wanted)
    assert run.train.shown(3) == f"{firsts[0]} | {others[0]}"
    command("report", run.folder)
    assert "pairs" in command("explain", run.folder, "--text", "good", expect=2).stderr
    others = [one for one in trained.rows(60, 7) if one[0] not in dict(TRAIN)]
    held = trained.write(tmp_path / "held.csv", others, second=[text for text, _ in others])
    cleanse = ("cleanse", run.folder, "--validation", held, "--out", tmp_path / "cleaned.csv")
    assert "--second-column" in command(*cleanse, expect=2).stderr
    command(*cleanse, "--second-column", "second", "--seeds", 1, "--fraction", 0.1)


def test_targets_are_all_or_those_of_a_file(files: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen.csv"
    chosen.write_text("key\nr7\nr2\n")
    # Keys of test rows are those of their id column.
    some = explained(files, tmp_path / "some", targets=chosen)
    every = explained(files, tmp_path / "every", targets="all")
    rows = read_json(some.folder / "results" / "targets.json")["rows"]
    assert sorted(rows) == [2, 7]
    assert np.allclose(in_order(some)[rows], in_order(every)[rows], atol=1e-5)
    for bad, said in (
        ("no.csv", "no such file"),
        ("key\nnobody\n", "line 2"),
        ("key\n", "no test"),
    ):
        path = tmp_path / "no.csv"
        if "\n" in bad:
            path = tmp_path / "bad.csv"
            path.write_text(bad)
        with pytest.raises(InputError, match=said):
            explained(files, tmp_path / "bad", targets=path)


def test_one_text_is_explained_for_the_predicted_or_a_given_class(
    files: Path, tmp_path: Path
) -> None:
    given = ("attribute", "--model", files / "model", "--train", files / "train.csv")
    text = ("--text", "good film", "--id-column", "id", "--json")
    for label in (None, "neg"):
        more = () if label is None else ("--label", label)
        out = tmp_path / f"run-{label}"
        [one] = json.loads(command(*given, *text, *more, "--out", out).stdout)["explanations"]
        assert one["true_label"] == (label or one["predicted_label"])
    for bad in (("--test", "x.csv"), ("--label", "no"), ("--targets", "all")):
        command(*given, *text, *bad, "--out", tmp_path / "none", expect=2)
    assert not (tmp_path / "none").exists()


def test_the_plan_is_printed_before_anything_is_written(files: Path, tmp_path: Path) -> None:
    given = ("--train", files / "train.csv", "--test", files / "test.csv", "--id-column", "id")
    out = tmp_path / "run"
    said = command(
        "attribute", "--model", files / "model", *given, "--out", out, "--plan", "--json"
    )
    plan = json.loads(said.stdout)["plan"]
    assert plan["seconds"] > 0 and plan["memory"] > 0 and not out.exists()
    command("attribute", "--model", files / "model", *given, "--out", out)
    assert plan["written"] == pytest.approx((out / "model.safetensors").stat().st_size, rel=0.2)


def test_what_an_interruption_leaves_is_completed_by_influence(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turnover.tasks import attribute as task

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(task, "score", stop)
        with pytest.raises(KeyboardInterrupt):
            explained(files, out)
    assert "turnover influence" in command("explain", out, expect=2).stderr
    command("influence", out)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["turnover.cli.attribute"], "score", stop)
        data = ("--train", files / "train.csv", "--test", files / "test.csv")
        given = ("attribute", "--model", files / "model", *data, "--out", tmp_path / "cut")
        assert f"turnover influence {tmp_path / 'cut'}" in command(*given, expect=130).stdout
    said = command(*given, expect=2).stderr
    assert f"its scores are missing: `turnover influence {tmp_path / 'cut'}`" in said
    whole = explained(files, tmp_path / "whole")
    for name in ("errors", "aggregate", "self"):
        found = Run.load(out).read_result(name)
        assert np.array_equal(found.scores, whole.read_result(name).scores)
    assert (
        "exists"
        in command(
            *("attribute", "--model", files / "model", "--train", files / "train.csv"),
            *("--test", files / "test.csv", "--out", out),
            expect=2,
        ).stderr
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_said(
    files: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(files / "model").to(dtype)
    model.save_pretrained(tmp_path / "model")
    encoders.tokenizer().save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match=str(dtype).removeprefix("torch.")):
        run = explained(files, tmp_path / "run", model=tmp_path / "model", targets="all")
    assert {one.dtype for one in run.model.parameters()} == {torch.float32}
    other = explained(files, tmp_path / "other", targets="all")
    both = np.corrcoef(in_order(run).ravel(), in_order(other).ravel())[0, 1]
    assert both > 0.99


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("albert", {"embedding_size": 16}),  # one layer's weights are all layers'
        ("distilbert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("xlnet", XLNET | {"side": "left"}),
    ],
)
def test_other_architectures(tmp_path: Path, files: Path, kind: str, changes: Any) -> None:
    model = trained.texts(tmp_path / "model", TRAIN, kind, **changes)
    layers = "head" if kind == "xlnet" else "all"  # its attention has no rule
    run = explained(files, tmp_path / "run", model=model, layers=layers, targets="all")
    assert np.isfinite(in_order(run)).all() and np.abs(in_order(run)).max() > 0


def test_images_are_explained_as_texts_are(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    random = np.random.default_rng(0)
    labels = random.integers(3, size=60)
    pixels = random.integers(0, 120, size=(60, 16, 16, 3), dtype=np.uint8)
    pixels[np.arange(60), :, :, labels] += 60
    np.savez(tmp_path / "train.npz", image=pixels[:40], label=labels[:40])
    np.savez(tmp_path / "test.npz", image=pixels[40:], label=labels[40:])
    model = trained.images(tmp_path / "model", pixels[:40], labels[:40], steps=3)
    out = tmp_path / "run"
    train, test = ("--train", tmp_path / "train.npz"), ("--test", tmp_path / "test.npz")
    more = ("--targets", "all", "--layers", "head", "--out", out)
    command("attribute", "--model", model, *train, *test, *more)
    run = Run.load(out)
    from transformers import AutoModelForImageClassification, ViTImageProcessor

    plain = AutoModelForImageClassification.from_pretrained(model).eval().requires_grad_(False)
    plain.classifier.requires_grad_(True)
    processor = ViTImageProcessor.from_pretrained(model)
    inputs = processor(images=list(pixels), return_tensors="pt")["pixel_values"]
    parts = [(inputs[:32], labels[:32]), (inputs[32:40], labels[32:40])]
    batches = [Batch(one, torch.tensor(two)) for one, two in parts]
    influence = Influence(plain, objectives.margin, method="gram").fit(batches)
    found = influence.estimate([Batch(inputs[40:], torch.tensor(labels[40:]))])
    assert np.allclose(in_order(run), found.scores, rtol=1e-3, atol=1e-5)
    command("report", out)
    with serving(out) as server:
        assert server.get("about")["images"]
    assert "--image" in command("explain", out, "--text", "good", expect=2).stderr
    said = command(
        "attribute",
        "--model",
        model,
        *train,
        *test,
        "--max-tokens",
        9,
        "--out",
        tmp_path / "none",
        expect=2,
    ).stderr
    assert "takes images" in said
