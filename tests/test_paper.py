"""The experiments of the papers at a tiny size, their verdicts, and their tables."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from test_cli import encoder, sentences  # noqa: F401 - a fixture
from turnover import InputError
from turnover.data.text import TextData
from turnover.evaluation import Masked, Recipe
from turnover.models.text import ClassifierConfig
from turnover.tasks import linear_probe
from turnover.tasks.linear_probe import Frozen
from turnover.tasks.training import TrainingConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.paper import (
    errors,
    full,
    groups,
    hidden,
    images,
    label_errors,
    patches,
    picture,
    random_labels,
    run,
    shift,
    table,
)

MACHINE = {"date": "d", "commit": "c", "torch": "t", "threads": 1}
RECIPE = Recipe(epochs=4, learning_rate=1e-3, batch_size=50, optimizer="adam")


@pytest.fixture(scope="module")
def digits():
    """Inputs, classes with a part of them wrong, right classes; and test rows."""
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    x, right = load_digits(return_X_y=True)
    x, right = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(right)
    y = right.clone()
    y[:600:5] = (y[:600:5] + 1) % 10
    return (x[:600], y[:600], right[:600]), (x[600:1000], right[600:1000])


def rendered(name, found):
    """The table of figures that went through JSON."""
    return table.RENDERED[name](
        json.loads(json.dumps(found)) | {"seconds": 1.0, "machine": MACHINE}
    )


def test_corrupted_sources_are_found_and_compared_with_leaving_them_out(digits):
    (x, _, right), (test_x, test_y) = digits
    found = groups.figures(
        (x, right % 2),
        (test_x, test_y % 2),
        units=512,
        recipe=Recipe(4, 2e-3, 150, optimizer="adam"),
        networks=2,
        truth_seeds=2,
    )
    assert min(found["corrupted_found"]) >= 2
    assert sum(source["rows"] for source in found["sources"]) == 600
    assert found["methods"]["turn-over"]["pearson"] > 0.5
    text = rendered("groups", found)
    assert text.count("(corrupted)") == 3 and "2 seeds" in text


def test_a_source_has_the_wrong_labels_that_were_planted():
    sizes, errors, corrupted = groups.planted(2000)
    source = torch.from_numpy(np.repeat(np.arange(groups.SOURCES), sizes))
    y = torch.zeros(2000, dtype=torch.int64)
    flipped = groups.flipped(y, source, errors)
    assert sizes.sum() == 2000 and corrupted.sum() == groups.CORRUPTED
    shares = torch.bincount(source, flipped.double()).numpy() / sizes
    assert np.abs(shares - errors).max() <= 0.5 / sizes.min()
    assert not y.any(), "what was given stays"


@pytest.mark.skipif(find_spec("cleanlab") is None, reason="cleanlab is not installed")
def test_wrong_labels_are_found_and_removed(digits):
    train, test = digits
    held_out = (test[0][:100], test[1][:100])
    found = label_errors.figures(
        train, held_out, test, seeds=1, units=256, turnover_recipe=RECIPE, standard_recipe=RECIPE
    )
    assert found["wrong"] == 120
    for name, figures in found["finding"].items():
        auc, _ = figures["auc"]
        assert auc > 0.6 or name == "random", name
    removed = found["accuracy_after_removal"]
    assert set(label_errors.REMOVED) < set(removed)
    assert removed["what is wrong (oracle)"][0] > removed["random"][0] - 0.05
    text = rendered("label_errors", {"rows": 600, "test_rows": 400, "labels": {"some": found}})
    assert "Best of ours against best of the others, some" in text and "auc: ours" in text


def test_review_of_as_many_rows_as_are_wrong_has_one_precision_and_recall():
    scores, wrong = np.arange(200.0), np.arange(200) >= 190
    wrong[0], wrong[199] = True, False
    found = label_errors.judged(scores, wrong)
    assert found["precision at as many as are wrong"] == pytest.approx(0.9)
    assert found["recall at as many as are wrong"] == pytest.approx(0.9)
    assert found["recall at 1%"] == pytest.approx(0.1)


def test_hidden_losses_of_masks_on_every_layer_and_of_the_control(digits):
    (x, _, right), test = digits

    def build(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return torch.nn.Sequential(
                torch.nn.Linear(64, 256),
                torch.nn.ReLU(),
                torch.nn.Linear(256, 64),
                torch.nn.ReLU(),
                torch.nn.Linear(64, 10, bias=False),
            )

    recipe = Recipe(epochs=10, learning_rate=3e-3, batch_size=50, optimizer="adam")
    # Few rows, so that a network learns them by heart.
    train = (x[:150], right[:150])
    clean = hidden.followed(build, train, test, recipe, Masked(("1", "3")))
    control = hidden.followed(build, train, test, recipe, Masked(("3",)))
    assert clean["leaking_share"] == 0 and control["leaking_share"] > 0.2
    assert clean["hidden_did_not_learn"] and clean["above_chance"]
    assert not control["hidden_did_not_learn"] and not control["holds"]
    counts = dict.fromkeys(("rows", "other_rows", "test_rows", "sentences", "test_sentences"), 1)
    found = {**counts, "ratio": 0.6, "networks": {"clean": clean, "control": control}}
    assert "clean, over training:" in rendered("hidden", found)


def test_removing_what_is_behind_errors_turns_more_of_them_than_chance():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 6, generator=generator)
    y = (x[:, 0] > 0).long()
    wrong = ((x[:600, 0] > 0) & (x[:600, 1] > 1)).nonzero().flatten()  # a corner, wrongly labelled
    labels = y[:600].clone()
    labels[wrong] = 0
    recipe = Recipe(12, 5e-3, 50, optimizer="adam")
    train, held_out = (x[:600], labels), (x[600:], y[600:])
    found = errors.figures(train, held_out, units=2048, recipe=recipe, seeds=2, draws=2, share=0.1)
    assert found["errors"] > 10
    for by in found["methods"].values():
        assert 0 < by["removed"] <= 60
        assert all(0 <= count <= found["errors"] for count in by["turned"])
    assert found["methods"]["gram"]["more"] > 0.2
    assert found["methods"]["turn-over, q <= 0.05"]["more"] > 0.2
    assert "gram" in rendered("errors", {"sets": {"sentences": found}})


@pytest.mark.parametrize(
    ("exposed", "unexposed", "right", "holds"),
    [(0.5, 1.0, 0.5, True), (0.7, 1.0, 0.5, False), (0.5, 0.7, 0.5, False), (0.5, 1.0, 0.1, False)],
)
def test_the_verdict_asks_for_all_three(exposed, unexposed, right, holds):
    last = {"train_exposed": [exposed, 0.0], "train_hidden": [unexposed, 0.0]}
    last |= {"test_exposed": [1.0, 0.1], "test_hidden": [1.0, 0.1]}
    assert hidden.verdict(last, right, 1000, 10)["holds"] is holds


def test_random_labels_are_learned_by_heart(digits):
    (x, y, right), test = digits
    kinds = 2 * (y != right)
    kinds[1::2] += kinds[1::2] == 0
    found = random_labels.figures((x, y), kinds, test, units=512, recipe=RECIPE)
    assert sum(found["rows"][kind] for kind in random_labels.KINDS) == 600
    last = {
        name: [found["curves"][name][side][-1][0] for side in ("exposed", "hidden")]
        for name in ("easy", "random label")
    }
    assert last["easy"][1] < last["random label"][1]
    assert last["random label"][0] < last["random label"][1]
    assert "random label (60)" in rendered("random_labels", found)


def films_and_electronics():
    """A feature that tells the classes in both; of a fifth of the films another has the label too.

    These films have wrong labels where the electronics are.
    """
    generator = torch.Generator().manual_seed(0)
    pools = []
    for rows, harmful in ((240, 0.2), (160, 0.0)):
        y = torch.arange(rows) % 2
        x = torch.randn(rows, 10, generator=generator)
        x[:, 0] += 2 * (2 * y - 1)
        wrong = torch.rand(rows, generator=generator) < harmful
        x[wrong, 1] += 4
        pools.append(Frozen(x, torch.where(wrong, 1 - y, y), 2))
    pools[1].features[:, 1] += 4
    return pools


@pytest.mark.long
def test_cleansing_for_another_domain_is_compared_with_tuning(monkeypatch):
    monkeypatch.setattr(linear_probe, "_LEAST_STEPS", 1)
    design = shift.Design(
        rows=200,
        held_out=60,
        splits=2,
        heads=1,
        fractions=(0.1, 0.2),
        epochs=(3,),
        decays=(0.01, 0.1),
    )
    found = shift.figures(*films_and_electronics(), design)
    assert found["test_rows"] == 100
    accuracy = {name: one["accuracy"][0] for name, one in found["kinds"].items()}
    for name in ("gram", "turn-over"):
        assert accuracy[name] > accuracy["none"]
        assert set(found["against"][name]) == set(shift.AGAINST)
    assert set(found["curves"]) == set(shift.RANKINGS)
    text = rendered("shift", found)
    assert "| all rows |" in text and "| 10% | 20% |" in text


def test_beating_takes_points_and_more_than_two_standard_errors():
    def of(*accuracies):
        return [shift.Measured(0.0, 0.0, one, 0.0) for one in accuracies]

    base = of(0.7, 0.7, 0.7)
    assert shift.paired(of(0.72, 0.73, 0.72), base)["beats"]
    assert not shift.paired(of(0.71, 0.71, 0.711), base)["beats"], "too few points"
    assert not shift.paired(of(0.7, 0.7, 0.8), base)["beats"], "too uncertain"


def test_the_threshold_is_the_one_that_most_rows_are_right_with():
    logits = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 4.0]])
    labels = torch.tensor([0, 0, 1, 1])
    mended = shift.threshold(logits, labels)(logits)
    assert mended.argmax(dim=1).tolist() == labels.tolist()


def test_reviews_without_a_clear_rating_have_no_label(tmp_path):
    with pytest.raises(InputError, match="give the folder that vader_icwsm2014 lies in"):
        shift.load(tmp_path, "some")
    path = tmp_path / "vader_icwsm2014" / "some_GroundTruth.txt"
    path.parent.mkdir()
    path.write_text("1\t2.5\tgood\n2\t-0.2\tso-so\n3\t-0.3\tbad\n")
    texts, labels = shift.load(tmp_path, "some")
    assert texts == ["good", "bad"] and labels.tolist() == [1, 0]
    assert shift.load(tmp_path / "images.npz", "some")[0] == texts


@pytest.mark.long
def test_a_bert_is_tuned_on_what_every_cleansing_leaves_and_explained(
    tmp_path,
    encoder,  # noqa: F811
):
    rows = [(text, label == "pos", key) for key, text, label in sentences(190)]
    wrong = [(text, label ^ (number % 7 == 0)) for number, (text, label, _) in enumerate(rows)]
    films, electronics = (
        TextData(
            [f"{text}{'' if domain else ' number'}" for text, _ in part],
            [int(label) for _, label in part],
            torch.arange(len(part)),
            [str(row) for row in range(len(part))],
            ["neg", "pos"],
        )
        for domain, part in enumerate((wrong[:110], wrong[110:]))
    )
    design = full.Design(
        ClassifierConfig(str(encoder), head_units=256, lora_rank=2),
        TrainingConfig(epochs=1),
        rows=70,
        own_rows=40,
        held_out=40,
        heads=1,
        fractions=(0.1,),
    )
    found = full.figures(films, electronics, design, tmp_path)
    taken = {name: one["removed"] for name, one in found["sets"].items()}
    assert taken["none"] == 0 and taken["random"] == taken["loss"] == taken["gram"]
    assert found["test_rows"] == 40 and found["leaking_share"] == 0
    assert (tmp_path / "none-0" / "report.html").stat().st_size > 0
    text = rendered("full_bert", found)
    assert "| all rows | 0 |" in text and "errors explained" in text
    again = full.figures(films, electronics, design, tmp_path)
    assert again == found, "finished trainings are not run again"


def test_a_head_on_convolutions_of_other_images_is_explained(tmp_path):
    pytest.importorskip("PIL")
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (240,), generator=generator)
    x = torch.rand(240, 3, 32, 32, generator=generator)
    given = images.Images(x[:200], y[:200], x[200:], y[200:], {})
    design = full.Deep(
        depth=11,
        width=2,
        recipe=Recipe(epochs=1, learning_rate=1e-3, batch_size=50, optimizer="adam"),
        head_units=64,
        training=TrainingConfig(epochs=1),
    )
    found = full.deep(given, design, tmp_path, rows=120)
    assert found["rows"] == 120 and found["other_rows"] == 80 and found["leaking_share"] == 0
    assert (tmp_path / "run" / "errors.png").stat().st_size > 0
    assert "convolutions trained on 80 other images" in rendered("full_vgg", found)


def test_features_of_images_need_no_labels_and_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(patches, "_FILTERS", 40)
    x = torch.randn(300, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = patches.of(x, 280, tmp_path)
    assert made.shape == (300, 256) and torch.isfinite(made).all()
    assert torch.equal(made, patches.of(x, 280, tmp_path))


def test_without_its_data_an_experiment_is_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TURNOVER_DATA", raising=False)
    with pytest.raises(InputError, match="give its path as --data"):
        images.load(tmp_path, 10, 10)
    threads = torch.get_num_threads()
    assert run.experiment("random_labels", run.Settings(tmp_path, tmp_path)) is None
    torch.set_num_threads(threads)
    assert "random_labels left out" in capsys.readouterr().out


def test_experiments_are_kept_beside_one_another(tmp_path):
    path = tmp_path / "results" / "paper.json"
    run.write(path, "b", {"x": 1})
    run.write(path, "a", {"x": 2})
    run.write(path, "b", {"x": 3})
    assert json.loads(path.read_text()) == {"a": {"x": 2}, "b": {"x": 3}}


def test_every_experiment_has_a_table_and_its_place_in_the_docs():
    text = table.DOCS.read_text()
    assert set(table.RENDERED) == set(run.EXPERIMENTS | run.FULL)
    for name in table.RENDERED:
        assert f"<!-- {name} -->" in text and f"<!-- end of {name} -->" in text


def test_the_picture_is_drawn_from_the_figures():
    assert picture.DOCS.read_text() == picture.drawn(json.loads(table.RESULTS.read_text()))
