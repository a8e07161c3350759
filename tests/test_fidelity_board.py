"""The fidelity board as a program: what it writes, its tables and pictures, the noise of its grid."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from turnover.evaluation import subsets as evaluation_subsets

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.fidelity import finetuned, mislabels, plain_bert, table
from benchmarks.fidelity.problems import Problem, Recipe, Split

ROOT = Path(__file__).parents[1]


def problem(classes):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(1500) % classes
    wrong = torch.arange(1500) < 200
    train = Split(torch.randn(1500, 4, generator=generator), y, wrong)
    return Problem(
        "tiny", "", train, replace(train), classes, None, None, (), Recipe(1, 0.1, 10), 2, 1
    )


@pytest.mark.parametrize("rate", [0.05, 0.4])
@pytest.mark.parametrize("kind", mislabels.KINDS)
@pytest.mark.parametrize("classes", [2, 5])
def test_noise_flips_what_it_says(classes, kind, rate):
    given = problem(classes)
    noisy = mislabels.noisy(given, kind, rate, seed=3)
    again = mislabels.noisy(given, kind, rate, seed=3)
    assert torch.equal(noisy.train.y, again.train.y) and torch.equal(noisy.train.x, again.train.x)
    assert len(noisy.train) == 1000
    # Rows are distinct, so they tell which instances were drawn.
    drawn = torch.cdist(noisy.train.x, given.train.x).argmin(dim=1)
    assert len(torch.unique(drawn)) == 1000
    assert not given.train.wrong[drawn].any(), "labels that were wrong before are left out"
    right = given.train.y[drawn]
    wrong = noisy.train.wrong
    assert torch.equal(wrong, noisy.train.y != right)
    able = right == 1 if classes == 2 and kind == "class-dependent" else right >= 0
    assert int(wrong.sum()) == round(rate * int(able.sum())) and not wrong[~able].any()
    if kind == "class-dependent":
        assert torch.equal(noisy.train.y[wrong], (right[wrong] + 1) % classes)
    other = mislabels.noisy(given, kind, rate, seed=4)
    assert not torch.equal(noisy.train.x, other.train.x)


def test_the_grid_is_averaged_over_seeds():
    runs = {
        f"B/uniform/0.1/{seed}": {"loss, standard": {"auc": auc}}
        for seed, auc in enumerate((0.8, 0.9, 1.0))
    }
    (cell,) = mislabels.table(runs).values()
    assert cell["loss, standard"] == {"mean": 0.9, "sd": 0.1, "seeds": 3}
    assert "| loss, standard |" in table.mislabel_table(mislabels.table(runs))


def test_the_fine_tuned_bert_is_trained_by_plain_code():
    text = Path(plain_bert.__file__).read_text()
    assert "import turnover" not in text and "from turnover" not in text


def test_committed_figures_of_fine_tuned_berts_are_those_of_the_page():
    found = json.loads(finetuned.RESULTS.read_text())
    page = table.DOCS.read_text()
    assert table.finetuned_table("The last two blocks themselves", found["whole"]) in page


def test_what_lies_between_markers_is_replaced():
    text = "a\n<!-- board -->\nold\n<!-- end of board -->\nb\n"
    assert table.replaced(text, "board", "new") == (
        "a\n<!-- board -->\n\nnew\n\n<!-- end of board -->\nb\n"
    )
    with pytest.raises(ValueError, match="no markers"):
        table.replaced(text, "ghosts", "new")


@pytest.mark.long
@pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_the_board_of_a_problem_is_written_with_its_subsets(tmp_path):
    write = tmp_path / "board.json"
    command = [sys.executable, "-m", "benchmarks.fidelity.board", "--problems", "A", "--quick"]
    command += ["--methods", "gram,turn-over,same class,random", "--folder", str(tmp_path)]
    subprocess.run([*command, "--write", str(write)], check=True, cwd=ROOT, env=dict(os.environ))
    found = json.loads(write.read_text())["problems"]["A"]
    assert set(found["methods"]) == {"gram", "turn-over", "same class", "random"}
    gram, same = found["methods"]["gram"], found["methods"]["same class"]
    for network in ("standard", "wide", "turnover", "head"):
        for truth in ("standard", "turnover"):
            mean, low, high = gram[network][f"{truth}_truth"]["class_removed"]
            assert low < mean < high
            assert mean > max(same["standard"][f"{truth}_truth"]["class_removed"][0], 0.3)
    # Turn-over's own pairs on the network that turnover fit trains, against those of 512 units.
    own = {
        network: found["methods"]["turn-over"][network]["standard_truth"]["class_removed"]
        for network in ("turnover", "head")
    }
    assert own["head"][1] > max(own["turnover"][2], 0.3)
    assert found["truth"]["standard"]["ceiling"]["raw"] > 0.9
    ghosts = found["ghosts"]
    assert ghosts["pairs"] >= 1_000_000
    assert 0.008 <= ghosts["below"]["0.01"] <= 0.0125
    assert 0.3e-4 <= ghosts["below"]["0.0001"] <= 3e-4
    manifest = json.loads((tmp_path / "A" / "subsets.json").read_text())
    assert found["subsets"]["sha256"] in json.dumps(manifest)
    drawn = evaluation_subsets.draw_subsets(found["train"], found["subsets"]["count"])
    assert drawn.sha256 == found["subsets"]["sha256"]
    assert "| turn-over | wide head |" in table.problem_table("A", found)
    assert "| gram | turn-over |" in table.problem_table("A", found)
    assert np.isfinite(gram["turnover"]["total_s"])
