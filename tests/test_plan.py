"""Planning: the law, what a pilot makes of it, and the command, each against real scores."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("typer")


from turnover import Influence, InputError, MaskSpec, WideHead, attach
from turnover.results.calibration import q_values
from turnover.tasks.pilot import Pilot, Setting, measure, needed_z_of, pilot_training, without_noise
from turnover.tasks.training import TrainingConfig

SETTINGS = st.builds(Setting, st.integers(1000, 10**6), st.integers(64, 10**6), st.integers(1, 100))


def synthetic(scale: float = 1.5, targets: int = 100, ids: int = 500, seed: int = 0) -> np.ndarray:
    """Sparse heavy-tailed influences (targets, ids) in noise floors."""
    rng = np.random.default_rng(seed)
    return scale * rng.laplace(size=(targets, ids)) * (rng.random((targets, ids)) < 0.5)


def pilot_of(influences: np.ndarray, seed: int = 1) -> Pilot:
    z = influences + np.random.default_rng(seed).normal(size=influences.shape)
    setting = Setting(influences.shape[1], 1024)
    return measure(z, np.full(len(z), 0.1), setting, rows=influences.shape[1])


PILOT = pilot_of(synthetic())


@given(SETTINGS, SETTINGS, st.integers(2, 100))
def test_the_law_is_relative_and_seeds_do_what_units_do(
    one: Setting, other: Setting, times: int
) -> None:
    assert one.over(other) * other.over(one) == pytest.approx(1)
    wider, more = (
        replace(one, units=one.units * times),
        replace(one, seeds=one.seeds * times),
    )
    fewer = replace(one, instances=one.instances * times)
    assert wider.over(one) == pytest.approx(times**0.5)
    assert more.over(other) == pytest.approx(wider.over(other))
    assert fewer.over(one) == pytest.approx(times**-0.5)


@given(SETTINGS, st.integers(1, 1000), st.integers(2, 50))
def test_predictions_follow_units_seeds_and_instances(
    setting: Setting, top: int, times: int
) -> None:
    now = PILOT.predict(setting, top)
    wider = PILOT.predict(replace(setting, units=setting.units * times), top)
    more = PILOT.predict(replace(setting, seeds=setting.seeds * times), top)
    assert wider.noise_floor < now.noise_floor
    assert wider.signal_to_noise > now.signal_to_noise
    assert wider.top_z >= now.top_z
    assert wider.significant >= now.significant
    assert wider.top_size == pytest.approx(now.top_size)
    for name in ("noise_floor", "signal_to_noise", "top_z"):
        assert getattr(more, name) == pytest.approx(getattr(wider, name))
    bigger = PILOT.predict(replace(setting, instances=setting.instances * times), top)
    assert bigger.signal_to_noise < now.signal_to_noise
    assert bigger.signal < now.signal


@given(SETTINGS, st.integers(1, 100))
def test_the_needed_units_and_seeds_are_just_enough(setting: Setting, top: int) -> None:
    needed_z = needed_z_of(top, setting.instances)
    units = PILOT.needed_units(setting, top)
    seeds = PILOT.needed_seeds(setting, top)
    assert units is not None
    assert seeds is not None
    for name, count in (("units", units), ("seeds", seeds)):
        enough = replace(setting, **{name: count})
        assert PILOT.predict(enough, top).top_z >= needed_z * (1 - 1e-9)
        if count > 1:
            short = replace(setting, **{name: count - 1})
            assert PILOT.predict(short, top).top_z < needed_z


def test_the_z_that_is_asked_is_what_benjamini_hochberg_asks() -> None:
    instances, top = 3000, 10
    z = np.full(instances, 0.1)
    z[:top] = needed_z_of(top, instances)
    p = torch.special.erfc(torch.from_numpy(z / 2**0.5)).numpy()
    assert q_values(p)[:top] == pytest.approx(0.05)
    with pytest.raises(InputError, match="top must be between 1 and the 5"):
        needed_z_of(6, 5)


def test_the_strongest_are_measured_without_the_luck_of_the_strongest() -> None:
    influences = synthetic()
    for top in (1, 5, 20):
        found = PILOT.predict(PILOT.setting, top)
        truth = np.sort(np.abs(influences).ravel())[-top * len(influences)]
        assert found.top_z == pytest.approx(truth, rel=0.08)
    lucky = np.abs(influences + np.random.default_rng(1).normal(size=influences.shape))
    assert np.sort(lucky.ravel())[-5 * len(influences)] > PILOT.predict(PILOT.setting, 5).top_z


def test_the_size_of_signal_and_noise_is_told_apart() -> None:
    influences = synthetic()
    assert PILOT.noise_floor == pytest.approx(0.1)
    assert PILOT.signal == pytest.approx(0.1 * influences.std(), rel=0.05)


@pytest.mark.parametrize("units", [512, 1024, 4096])
@pytest.mark.parametrize("instances", [500, 2000])
def test_expected_discoveries_are_those_of_benjamini_hochberg(units: int, instances: int) -> None:
    setting = Setting(instances, units)
    z = synthetic(ids=instances, seed=5) * setting.over(PILOT.setting)
    z = z + np.random.default_rng(6).normal(size=z.shape)
    p = torch.special.erfc(torch.from_numpy(np.abs(z) / 2**0.5)).numpy()
    measured = (q_values(p) <= 0.05).sum(axis=1).mean()
    predicted = PILOT.predict(setting, 1).significant
    assert predicted == pytest.approx(measured, rel=0.1, abs=1)


@pytest.mark.parametrize("seed", range(5))
def test_pure_noise_promises_nothing(seed: int) -> None:
    pilot = pilot_of(np.zeros((100, 500)), seed)
    found = pilot.predict(pilot.setting, 5)
    assert found.significant == found.signal_to_noise == found.top_z == 0
    assert pilot.needed_units(pilot.setting, 5) is None


def test_no_influence_at_a_rank_has_no_answer() -> None:
    sizes, shares = np.array([0.0, 5.0]), np.array([0.999, 0.001])
    pilot = replace(PILOT, sizes=sizes, shares=shares)
    assert pilot.needed_units(Setting(100, 64), 50) is None
    assert pilot.needed_seeds(Setting(100, 64), 50) is None
    assert pilot.needed_units(Setting(10_000, 64), 5) is not None


def test_shares_are_a_distribution() -> None:
    sizes, shares = without_noise(np.abs(synthetic()))
    assert sizes[0] == 0
    assert (np.diff(sizes) > 0).all()
    assert shares.sum() == pytest.approx(1)
    assert (shares >= 0).all()


def test_scores_that_are_all_0_are_refused() -> None:
    with pytest.raises(InputError, match="did not learn"):
        measure(np.zeros((3, 60)), np.zeros(3), Setting(60, 64), rows=60)


@given(st.integers(50, 10**5), st.integers(50, 10**5), st.integers(1, 256))
def test_a_pilot_makes_as_many_steps_or_larger_ones(rows: int, wanted: int, size: int) -> None:
    pilot_rows = min(rows, wanted)
    config = TrainingConfig(batch_size=size)
    pilot = pilot_training(config, rows, pilot_rows)
    assert pilot.epochs == config.epochs
    steps, pilot_steps = -(-rows // size), -(-pilot_rows // pilot.batch_size)
    moved = pilot_steps * pilot.head_learning_rate**2
    assert moved == pytest.approx(steps * config.head_learning_rate**2)
    assert pilot.learning_rate / pilot.head_learning_rate == pytest.approx(10)
    if pilot_rows == rows:
        assert pilot == config


def train_and_measure(rows: int, units: int, config: TrainingConfig) -> Pilot:
    """A wide head on synthetic features, trained under masks and scored on held-out targets."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1000, 48, generator=generator)
    teacher = torch.randn(48, generator=generator)
    noise = torch.randn(1000, generator=generator) * 4
    labels = (features @ teacher + noise > 0).long()
    torch.manual_seed(0)
    head = WideHead(48, units, 2)
    network = attach(head, ["activation"], MaskSpec())
    ids = torch.arange(rows)
    optimizer = torch.optim.AdamW(head.parameters(), config.head_learning_rate, weight_decay=0.0)
    for _ in range(config.epochs):
        for batch in torch.randperm(rows, generator=generator).split(config.batch_size):
            with network.exposed(ids[batch]):
                loss = nn.functional.cross_entropy(head(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    influence = Influence(network, ghosts=500)
    result = influence.estimate([(features[900:], labels[900:])], ids)
    return measure(result.z, result.noise_floor, Setting(rows, units), rows=rows)


@pytest.mark.parametrize(("rows", "units"), [(800, 512), (800, 1024), (400, 2048)])
def test_a_small_training_predicts_a_larger_one(rows: int, units: int) -> None:
    """Scales with the width: learning rate like 1 / sqrt(units), as the law asks."""
    pilot_units = 512
    small = TrainingConfig(batch_size=16, head_learning_rate=1e-3)
    pilot = train_and_measure(200, pilot_units, pilot_training(small, rows, 200))
    rate = small.head_learning_rate * (pilot_units / units) ** 0.5
    full = train_and_measure(rows, units, replace(small, head_learning_rate=rate))
    predicted = pilot.predict(full.setting, 10)
    measured = full.predict(full.setting, 10)
    assert predicted.noise_floor == pytest.approx(measured.noise_floor, rel=0.4)
    assert predicted.signal_to_noise == pytest.approx(measured.signal_to_noise, rel=0.2)
    assert predicted.top_z == pytest.approx(measured.top_z, rel=0.2)


# The command

GOOD = ["a fine warm film", "great acting and great fun", "moving wise and funny"]
BAD = ["a dull cold film", "poor acting and no fun", "boring flat and silly"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({word for text in GOOD + BAD for word in text.split()})
    vocabulary = ["[PAD]", "[UNK]", *words, *map(str, range(300))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "source", "text", "label"])
        for i in range(200):
            text = f"{(GOOD if i % 2 else BAD)[i % 3]} {i}"
            writer.writerow([i, f"source {i // 4}", text, "pos" if i % 2 else "neg"])
    return path


def turnover(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *arguments: object,
    expect: int = 0,
) -> tuple[str, str]:
    from turnover import cli

    monkeypatch.setattr(sys, "argv", ["turnover", "plan", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    assert (stop.value.code or 0) == expect, captured.err[-3000:]
    return captured.out, captured.err


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: Path, encoder: Path
):
    def call(*more: object, expect: int = 0) -> tuple[str, str]:
        first = (data, "--model", encoder, "--id-column", "id", "--lora-rank", 2)
        return turnover(capsys, monkeypatch, *first, *more, expect=expect)

    return call


PILOT_OPTIONS = ("--pilot", "--pilot-rows", 60, "--batch-size", 8, "--head-learning-rate", 0.003)


def test_without_a_pilot_the_table_says_that_it_is_relative(run) -> None:
    out, _ = run("--head-units", 64)
    assert "relative" in out
    assert "--pilot" in out
    assert "nats" not in out
    found = json.loads(run("--head-units", 64, "--seeds", 2, "--json")[0])
    assert found["pilot"] is None
    assert found["needed_units_with_one_seed"] is None
    assert 120 <= found["asked"]["instances"] <= 190
    by_setting = {(o["units"], o["seeds"]): o for o in found["options"]}
    assert by_setting[64, 2]["relative_signal_to_noise"] == 1
    assert by_setting[256, 2]["relative_signal_to_noise"] == 2
    assert by_setting[64, 8]["relative_signal_to_noise"] == 2
    assert all(option["prediction"] is None for option in found["options"])


def test_a_pilot_measures_and_prints(run) -> None:
    out, _ = run("--head-units", 256, "--top", 3, *PILOT_OPTIONS)
    assert "z of number 3" in out
    assert "pilot: 60 rows" in out


def test_a_pilot_on_a_part_predicts_the_noise_of_the_whole(run) -> None:
    options = ("--head-units", 256, *PILOT_OPTIONS, "--json")
    part = json.loads(run(*options)[0])
    whole = json.loads(run(*options, "--pilot-rows", 1000)[0])
    assert part["pilot"]["rows"] == 60
    assert whole["pilot"]["rows"] == whole["asked"]["instances"]
    predicted, measured = (
        next(o["prediction"] for o in found["options"] if o["relative_signal_to_noise"] == 1)
        for found in (part, whole)
    )
    assert measured["noise_floor"] == pytest.approx(whole["pilot"]["noise_floor"])
    assert measured["noise_floor"] / 2 < predicted["noise_floor"] < measured["noise_floor"] * 2


def test_a_pilot_leaves_the_random_generator_and_the_folder_alone(
    run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run("--head-units", 64, *PILOT_OPTIONS, "--json")
    assert torch.equal(torch.rand(3), expected)
    assert not list(tmp_path.iterdir())
    assert [path.name for path in data.parent.iterdir()] == ["train.csv"]


def test_groups_are_instances_and_come_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: Path, encoder: Path
) -> None:
    arguments = (data, "--model", encoder, "--group-column", "source", "--lora-rank", 2)
    out, _ = turnover(
        capsys, monkeypatch, *arguments, "--head-units", 64, *PILOT_OPTIONS, "--top", 2, "--json"
    )
    found = json.loads(out)
    assert found["asked"]["instances"] <= 50
    assert found["pilot"]["rows"] == 4 * found["pilot"]["instances"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--top", 0), "'--top'"),
        (("--top", 5000), "top must be between 1 and"),
        (("--seeds", 0), "'--seeds'"),
        (("--head-units", 0), "'--head-units'"),
        (("--pilot", "--pilot-rows", 3), "--pilot-rows"),
        (("--pilot", "--model", "no/such-model"), "no/such-model"),
        (("--text-column", "texts"), "did you mean 'text'"),
        (("--epochs", 0), "'--epochs'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: tuple[object, ...], message: str, run
) -> None:
    out, err = run(*options, expect=2)
    assert message in err
    assert err.startswith("turnover: ")
    assert len(err.splitlines()) == 1
    assert not out


def test_a_pilot_without_all_classes_asks_for_more_rows(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    encoder: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "rare.jsonl"
    rows = [{"text": f"a film {i}", "label": "rare" if i < 2 else "usual"} for i in range(400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = (path, "--test", path, "--model", encoder, "--pilot", "--pilot-rows", 50)
    _, err = turnover(capsys, monkeypatch, *arguments, expect=2)
    assert "'rare'" in err
    assert "--pilot-rows" in err


@pytest.mark.long
def test_a_pilot_on_real_sentences_predicts_the_whole_training(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from turnover.data.demo import model_folder, write_sentences

    try:
        model = model_folder()
        train_file, test_file = write_sentences(tmp_path)
    except InputError as error:
        pytest.skip(str(error))
    arguments = (train_file, "--test", test_file, "--model", model, "--id-column", "id")
    more = ("--head-units", 4096, "--pilot", "--json", "--pilot-rows")
    part, whole = (
        json.loads(turnover(capsys, monkeypatch, *arguments, *more, rows)[0])["options"][1][
            "prediction"
        ]
        for rows in (500, 3000)
    )
    assert part["noise_floor"] == pytest.approx(whole["noise_floor"], rel=0.35)
    assert part["signal_to_noise"] == pytest.approx(whole["signal_to_noise"], rel=0.2)
    assert part["top_z"] == pytest.approx(whole["top_z"], rel=0.25)
    assert part["significant"] == pytest.approx(whole["significant"], rel=0.5, abs=5)
