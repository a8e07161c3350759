"""Language models on the fidelity board: trainings that leave chunks out, its rows, its table."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import turnover
from turnover import evaluation

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.fidelity import language, language_board, language_magic, language_methods, table
from benchmarks.fidelity.peers import bergson_language

pytest.importorskip("transformers", reason="pip install 'turnover[text]'")

CHUNKS, TARGETS, TOKENS = 24, 4, 8
TEXTS = [f"the film number {row} was {'good' if row % 2 else 'dull'} and long" for row in range(60)]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Builds problems of a few chunks of made-up sentences; the folder keeps the pretrained model."""
    monkeypatch.setattr(language, "CHUNKS", CHUNKS)
    monkeypatch.setattr(language, "TARGETS", TARGETS)
    monkeypatch.setattr(language, "TOKENS", TOKENS)
    monkeypatch.setattr(language, "_VOCABULARY", 300)
    monkeypatch.setattr(language, "_EPOCHS", 1)
    monkeypatch.setattr(language, "_PRETRAINING_EPOCHS", 1)
    monkeypatch.setattr(language, "_HALVES", 3)
    monkeypatch.setattr(language, "_PARTS", 4)
    monkeypatch.setattr(language_methods, "_TRAK_NUMBERS", 64)
    monkeypatch.setattr(language.features, "sentences", lambda: (TEXTS, None))
    monkeypatch.setattr(language.shift, "load", lambda data, name: (TEXTS[::-1], None))

    def make(name="whole", folder="problem"):
        if name == "lora":
            pytest.importorskip("peft", reason="pip install 'turnover[text]'")
        return language.Problem(name, tmp_path / folder)

    return make


def given(problem, tmp_path):
    return language_methods.Attribution(problem, problem.training(), tmp_path / "files")


def weights(model):
    return torch.cat([one.detach().flatten() for one in model.parameters()])


@pytest.mark.parametrize("name", list(language.KINDS))
def test_a_problem_has_chunks_targets_and_two_truths(tiny, name):
    problem = tiny(name)
    assert problem.train.shape == (CHUNKS, TOKENS) and problem.test.shape == (TARGETS, TOKENS)
    assert len(problem.texts) == CHUNKS + TARGETS
    assert problem.tokenizer.decode(problem.test[0].tolist()) == problem.texts[CHUNKS]
    truths = problem.truths()
    shapes = {truth: outputs.shape for truth, (_, outputs) in truths.items()}
    assert shapes == {"halves": (3, 2, TARGETS), "leave_5%": (4, 1, TARGETS)}
    assert (truths["halves"][0].keep.sum(axis=1) == CHUNKS // 2).all()
    model = problem.fine_tuned(problem.halves.keep[1], 1001)
    with torch.no_grad():
        again = -language.losses(model(problem.test).logits, problem.test)
    np.testing.assert_allclose(truths["halves"][1][1, 1], again.numpy(), rtol=1e-5)


def test_trainings_repeat_and_depend_on_seed_and_chunks(tiny):
    problem = tiny()
    first = weights(problem.fine_tuned())
    assert torch.equal(first, weights(problem.fine_tuned(np.ones(CHUNKS, dtype=bool))))
    assert not torch.equal(first, weights(problem.fine_tuned(seed=1)))
    assert not torch.equal(first, weights(problem.fine_tuned(problem.parts.keep[0])))
    assert torch.equal(problem.train, tiny(folder="another").train)


def test_chunks_that_are_left_out_are_never_seen(tiny):
    problem = tiny()
    keep = problem.halves.keep[0]
    before = weights(problem.fine_tuned(keep))
    problem.train[torch.from_numpy(~keep)] = 0
    assert torch.equal(before, weights(problem.fine_tuned(keep)))


@pytest.mark.filterwarnings("ignore:turnover. gram knows no rule:UserWarning")
def test_methods_score_every_chunk_for_every_target(tiny, tmp_path):
    task = given(tiny(), tmp_path)
    product = language_methods.gradient_product(task)
    for method in (
        language_methods.gram,
        language_methods.turn_over,
        language_methods.trak,
        language_methods.shared_words,
        language_methods.anything,
    ):
        scores = method(task)
        assert scores.shape == (TARGETS, CHUNKS) and np.isfinite(scores).all()
    # A step along a chunk's gradient lowers a target's loss by their inner product.
    model, step = task.trained.model, 1e-4
    trained = list(model.parameters())
    row = language_methods.gradients(model, task.problem.train[:1])[0]
    with torch.no_grad():
        before = language.losses(model(task.problem.test).logits, task.problem.test)
        for one, part in zip(trained, row.split([p.numel() for p in trained]), strict=True):
            one -= step * part.view_as(one)
        after = language.losses(model(task.problem.test).logits, task.problem.test)
    fallen = (before - after).numpy() / step
    np.testing.assert_allclose(fallen, product[:, 0], atol=0.03 * abs(product[:, 0]).max())


def test_cosines_are_at_most_one(tiny, tmp_path):
    cosines = language_methods.gradient_product(given(tiny(), tmp_path), cosine=True)
    assert np.abs(cosines).max() <= 1 + 1e-5


@pytest.fixture
def in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["whole", "lora"])
def test_metagradients_are_derivatives_by_the_weight_of_a_chunk(
    tiny, tmp_path, monkeypatch, in_double, name
):
    new, plain = language._new, language.losses
    monkeypatch.setattr(language, "_new", lambda kind: new(kind).double())
    problem = tiny(name)
    found = language_magic.metagradients(given(problem, tmp_path))
    same = (problem.train == problem.train[0]).all(dim=1)

    def trained(weight):
        def weighted(logits, tokens):
            each = torch.where((tokens == problem.train[0]).all(dim=1), weight, 1.0)
            return plain(logits, tokens) * each / each.mean()

        with monkeypatch.context() as patched:
            patched.setattr(language, "losses", weighted)
            model = problem.fine_tuned()
        with torch.no_grad():
            return -plain(model(problem.test).logits, problem.test).numpy()

    # AdamW's first steps are nearly signs of gradients, so that slopes change within little.
    slope = (trained(1 + 1e-6) - trained(1 - 1e-6)) / 2e-6
    np.testing.assert_allclose(found[:, same.numpy()].sum(axis=1), slope, rtol=1e-3, atol=1e-6)


def test_a_copy_of_linear_layers_computes_the_same_with_output_weights_apart(tiny):
    model = tiny().fine_tuned()
    copied = language_methods.linear(model)
    tokens = torch.arange(TOKENS)[None]
    with torch.no_grad():
        torch.testing.assert_close(copied(tokens).logits, model(tokens).logits)
        copied.lm_head.weight.zero_()
    assert bool(copied.transformer.wte.weight.any()) and bool(model.lm_head.weight.any())
    assert not any(type(one).__name__ == "Conv1D" for one in copied.modules())


def test_turn_over_masks_the_units_of_every_block(tiny):
    trained = tiny().training(masks=turnover.MaskSpec(keep=0.5))
    assert trained.network.sites == [f"transformer.h.{block}.mlp.act" for block in range(3)]


def test_without_bergson_its_rows_say_how_to_get_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TURNOVER_BERGSON", str(tmp_path / "nowhere"))
    outcome = language_board.attempt(bergson_language.ekfac, given(tiny(), tmp_path))
    assert "make .bench-bergson" in outcome.error


@pytest.mark.skipif(
    not bergson_language.command().exists(),
    reason="bergson is not installed: make .bench-bergson/.done, or TURNOVER_BERGSON",
)
@pytest.mark.long
@pytest.mark.parametrize("name", ["whole", "lora"])
def test_bergson_agrees_in_part_with_gradient_products(tiny, tmp_path, name):
    task = given(tiny(name), tmp_path)
    scores = bergson_language.ekfac(task)
    assert scores.shape == (TARGETS, CHUNKS)
    product = language_methods.gradient_product(task)
    assert np.corrcoef(scores.flatten(), product.flatten())[0, 1] > 0.2


@pytest.mark.skipif(
    find_spec("kronfluence") is None, reason="kronfluence is not installed: make bench-language"
)
@pytest.mark.long
@pytest.mark.parametrize("name", ["whole", "lora"])
def test_kronfluence_agrees_in_part_with_gradient_products(tiny, tmp_path, name):
    task = given(tiny(name), tmp_path)
    scores = language_methods.ekfac(task)
    assert scores.shape == (TARGETS, CHUNKS)
    product = language_methods.gradient_product(task)
    assert np.corrcoef(scores.flatten(), product.flatten())[0, 1] > 0.2


def test_a_board_keeps_rows_reads_failures_and_pairs_differences(tiny, tmp_path, monkeypatch):
    def fail(task):
        raise RuntimeError("no luck")

    def right(task):
        keep = task.problem.halves.keep.astype(float)
        outputs = task.problem.truths()["halves"][1].mean(axis=1)
        return (np.linalg.pinv(keep) @ outputs).T

    methods = {"gram": right, "worse": language_methods.anything, "none": fail}
    monkeypatch.setattr(language_board, "rows", lambda kind: methods)
    tiny("whole", "whole")
    found = language_board.board("whole", tmp_path / "whole", None)
    assert found["train"] == CHUNKS and found["truths"]["halves"]["subsets"] == 3
    entries = found["methods"]
    assert entries["none"] == {"error": "RuntimeError: no luck"}
    assert entries["gram"]["halves"][0] == 1.0 and entries["gram"]["minus"] == {}
    mean, low, high = entries["worse"]["minus"]["gram"]["halves"]
    assert mean == pytest.approx(entries["worse"]["halves"][0] - 1, abs=2e-4) and low <= high
    page = table.language_table(found)
    assert "| none | failed: RuntimeError: no luck | | | | |" in page
    assert page.index("| gram |") < page.index("| worse |") < page.index("| none |")
    methods["worse"] = right
    again = language_board.board("whole", tmp_path / "whole", None, ["none"])
    assert again == found, "rows that are not asked for are those that were kept"
    again = language_board.board("whole", tmp_path / "whole", None, ["worse"])
    assert again["methods"]["worse"]["minus"]["gram"]["halves"] == [0.0, 0.0, 0.0]


def test_differences_see_the_same_resamples():
    generator = np.random.default_rng(0)
    subsets = evaluation.draw_subsets(30, 20)
    outputs = generator.standard_normal((20, 2, 6))
    truths = {"halves": (subsets, outputs)}
    one, other = (
        language_board.judged(generator.standard_normal((6, 30)), truths)["halves"]
        for _ in range(2)
    )
    assert language_board.difference(one, one) == [0.0, 0.0, 0.0]
    assert np.quantile(one.resamples, [0.025, 0.975]) == pytest.approx([one.low, one.high])
    there, back = language_board.difference(one, other), language_board.difference(other, one)
    assert there == pytest.approx([-back[0], -back[2], -back[1]])


def test_committed_figures_are_those_of_the_page():
    found = json.loads(language_board.RESULTS.read_text())
    page = table.DOCS.read_text()
    assert list(found) == list(language.KINDS)
    for one in found.values():
        assert table.language_table(one) in page


def test_committed_figures_are_of_the_subsets_that_are_drawn():
    found = json.loads(language_board.RESULTS.read_text())["whole"]
    drawn = evaluation.draw_subsets(found["train"], found["truths"]["halves"]["subsets"])
    assert drawn.sha256 == found["truths"]["halves"]["sha256"]
