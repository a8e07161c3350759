"""Results as tables, data frames, plots and in notebooks."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
import turnover
from turnover import Gram, Influence, InputError
from turnover.results import strongest as strongest_module

IDS = torch.arange(100, 112)
TARGETS = torch.tensor([7, 8, 9])


@pytest.fixture(scope="module")
def influence() -> Influence:
    network = turnover.attach(tiny.randomise(tiny.mlp()).eval(), "mlp")
    return Influence(network, ghosts=20)


def batch() -> turnover.Batch:
    return turnover.Batch(tiny.features(3), tiny.labels(3), TARGETS)


@pytest.fixture(scope="module")
def result(influence: Influence) -> turnover.Result:
    return influence.estimate([batch()], IDS)


def test_the_strongest_are_those_of_both_ends_in_order(result: turnover.Result) -> None:
    rows = result.top(2)
    assert [row.target for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    for target in range(3):
        own = [row for row in rows if row.target == target]
        order = np.argsort(-result.scores[target])
        chosen = [*order[:2], *order[-2:]]
        assert [row.target_id for row in own] == [TARGETS[target]] * 4
        assert [row.rank for row in own] == [1, 2, 11, 12]
        for name in ("scores", "z", "p", "q"):
            found = [getattr(row, name.removesuffix("s")) for row in own]
            assert found == getattr(result, name)[target][chosen].tolist()
        assert [row.train_id for row in own] == result.train_ids[chosen].tolist()
        assert [row.noise for row in own] == pytest.approx([result.noise_floor[target]] * 4)


def test_more_than_there_are_is_all_of_them_once(result: turnover.Result) -> None:
    assert [row.rank for row in result.top(7)[:12]] == list(range(1, 13))
    assert len(result.top(1000)) == 36
    with pytest.raises(InputError, match="count must be >= 1"):
        result.top(0)


def test_extremes_and_rankings_have_their_strongest_too(influence: Influence) -> None:
    extremes = influence.estimate([batch()], IDS, top=3)
    assert [row.rank for row in extremes.top(1)[:2]] == [1, 6]
    assert extremes.top(1)[1].train_id == extremes.train_ids[0, -1]
    ranking = influence.aggregate([batch()], IDS)
    first, last = ranking.top(1)
    assert first.target is None and first.score == ranking.scores.max()
    assert last.train_id == IDS[ranking.scores.argmin()]


def test_a_table_prints_the_columns_that_it_has(
    result: turnover.Result, influence: Influence
) -> None:
    header, *lines = repr(result.top(1)).splitlines()
    assert header.startswith("target  target id  training id  rank ")
    assert header.split()[-4:] == ["noise", "z", "p", "q"]
    assert len(lines) == 6 and len({len(line) for line in (header, *lines)}) == 1
    ranking = influence.aggregate([batch()], IDS)
    assert repr(ranking.top(1)).split()[:3] == ["training", "id", "rank"]


def test_results_without_targets_or_training_ids_are_shown(result: turnover.Result) -> None:
    none = result.select(np.zeros(12, dtype=bool))
    for empty in (result.of_targets(slice(0)), none):
        assert not len(empty.top(3)) and repr(empty.top(3)) == ""
        assert empty._repr_html_().endswith("<table><tr></tr></table>")
        pytest.importorskip("pandas")
        assert not len(empty.to_dataframe())


def test_long_tables_are_cut(influence: Influence) -> None:
    long = influence.estimate([batch()], torch.arange(100)).top(40)
    assert len(long) == 240
    assert repr(long).endswith("\n... and 180 more rows")
    assert long._repr_html_().count("<tr>") == 61 and "and 180 more rows" in long._repr_html_()


def test_a_result_is_one_line_and_in_a_notebook_a_short_escaped_table(
    result: turnover.Result, influence: Influence
) -> None:
    assert repr(result) == (
        "<turnover.Result: 3 targets x 12 training ids, linear, objective margin>"
    )
    extremes = influence.estimate([batch()], IDS, top=3)
    assert "3 targets x the strongest 6 of 12 training ids" in repr(extremes)
    assert repr(influence.aggregate([batch()], IDS)).startswith(
        "<turnover.Result: 12 training ids,"
    )
    page = replace(result, objective="<b>mine</b>")._repr_html_()
    assert "&lt;b&gt;mine" in page and "<b>" not in page
    assert page.count("<tr>") == 1 + 3 * 6
    assert str(result.train_ids[result.scores[0].argmax()]) in page


def test_a_data_frame_has_a_row_for_each_target_and_training_id(result: turnover.Result) -> None:
    pandas = pytest.importorskip("pandas")
    frame = result.to_dataframe()
    assert {name: str(kind) for name, kind in frame.dtypes.items()} == {
        **dict.fromkeys(("target", "target_id", "train_id", "rank"), "int64"),
        **dict.fromkeys(("score", "noise", "z"), "float32"),
        **dict.fromkeys(("p", "q"), "float64"),
    }
    assert len(frame) == 36
    for name, values in (("score", result.scores), ("z", result.z), ("q", result.q)):
        wide = frame.pivot(index="target_id", columns="train_id", values=name)
        np.testing.assert_array_equal(wide.loc[TARGETS.tolist(), IDS.tolist()], values)
    best = frame[frame["rank"] == 1].set_index("target").train_id
    assert best.tolist() == result.train_ids[result.scores.argmax(axis=1)].tolist()
    strongest = pandas.DataFrame(result.top(2))
    assert strongest.columns[0] == "target" and len(strongest) == 12


def test_data_frames_of_other_results(influence: Influence) -> None:
    pytest.importorskip("pandas")
    extremes = influence.estimate([batch()], IDS, top=2)
    frame = extremes.to_dataframe()
    assert frame.train_id.tolist() == extremes.train_ids.reshape(-1).tolist()
    assert frame["rank"].tolist() == [1, 2, 3, 4] * 3
    ranking = influence.self_influence([batch()])
    assert list(ranking.to_dataframe()) == ["train_id", "rank", "score", "noise", "z", "p", "q"]
    plain = tiny.randomise(tiny.mlp()).eval()
    train = [turnover.Batch(tiny.features(12), tiny.labels(12), IDS)]
    gram = Influence(plain, method=Gram()).fit(train).estimate([batch()])
    frame = gram.to_dataframe()
    np.testing.assert_array_equal(frame.standard_error, gram.standard_error.reshape(-1))
    np.testing.assert_array_equal(frame.noise, frame.standard_error)


def test_what_is_too_large_for_a_table_says_so(
    influence: Influence, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    pytest.importorskip("zarr")
    stored = influence.estimate([batch()], IDS, out=tmp_path / "s.zarr")
    assert len(stored.to_dataframe()) == 36
    assert "s.zarr: dense, 3 target x 12 train, linear" in repr(stored)
    monkeypatch.setattr(strongest_module, "MOST_ROWS", 35)
    with pytest.raises(InputError, match=r"3 x 12 scores are 36 rows, .*estimate with top="):
        stored.load().to_dataframe()
    with pytest.raises(InputError, match=r"s.zarr are 36 rows, .*load\(targets\)"):
        stored.to_dataframe()
    with pytest.raises(InputError, match="give a smaller number"):
        stored.load().top(6)
    assert len(stored.load().top(5)) == 30


def test_a_plot_shows_both_ends_with_their_noise(result: turnover.Result) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    before = dict(matplotlib.rcParams)
    axes = Figure().subplots()
    assert result.plot(np.int64(1), count=2, ax=axes) is axes
    rows = [row for row in result.top(2) if row.target == 1]
    (bars,) = (one for one in axes.containers if hasattr(one, "patches"))
    assert [bar.get_width() for bar in bars] == pytest.approx([row.score for row in rows])
    assert [one.get_text() for one in axes.get_yticklabels()] == [str(r.train_id) for r in rows]
    segments = bars.errorbar.lines[2][0].get_segments()
    widths = [float(end[0] - start[0]) / 2 for start, end in segments]
    assert widths == pytest.approx([row.noise for row in rows])
    assert "target 1 (id 8)" in axes.get_title()
    assert dict(matplotlib.rcParams) == before


def test_rankings_are_plotted_and_other_targets_refused(
    result: turnover.Result, influence: Influence
) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    ranking = influence.aggregate([batch()], IDS)
    assert len(ranking.plot(ax=figure.Figure().subplots()).patches) == 12
    for target in (None, 3, -1, "7"):
        with pytest.raises(InputError, match="position of one of 3 targets, from 0 to 2"):
            result.plot(target)
    with pytest.raises(InputError, match="leave out target="):
        ranking.plot(0)


def test_a_new_plot_is_not_shown_and_keeps_the_backend() -> None:
    pytest.importorskip("matplotlib")
    code = (
        "import matplotlib; matplotlib.use('svg')\n"
        "import numpy as np, turnover, tiny\n"
        "from matplotlib import pyplot\n"
        "pyplot.figure()\n"
        "def show(*args, **options): raise SystemExit(9)\n"
        "pyplot.show = show\n"
        "net = turnover.attach(tiny.randomise(tiny.mlp()).eval(), 'mlp')\n"
        "found = turnover.Influence(net, ghosts=10).aggregate([(tiny.features(3), tiny.labels(3))], [1, 2])\n"
        "axes = found.plot()\n"
        "assert matplotlib.get_backend() == 'svg' and pyplot.gca() is axes\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="tests", timeout=120)


def test_missing_packages_are_named(
    result: turnover.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("pandas", "matplotlib"):
        monkeypatch.setitem(sys.modules, package, None)
    for made in (result.to_dataframe, lambda: result.plot(0)):
        with pytest.raises(InputError, match=r"pip install 'turnover\[notebook\]'"):
            made()


def test_a_notebook_without_widgets_gets_bars_of_text_and_no_warning() -> None:
    code = (
        "import sys, types, warnings\n"
        "sys.modules['ipykernel.zmqshell'] = types.ModuleType('zmqshell')\n"
        "shell = types.ModuleType('IPython')\n"
        "shell.get_ipython = lambda: None\n"
        "sys.modules['IPython'] = shell\n"
        "sys.modules['ipywidgets'] = None\n"
        "sys.modules['IPython.html'] = None\n"
        "warnings.simplefilter('error')\n"
        "from turnover.io.bars import tqdm\n"
        "list(tqdm([1], 'counting'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True
    )
    assert "counting: 100%" in done.stderr


def test_the_total_of_a_notebooks_bar_is_set_later() -> None:
    pytest.importorskip("ipywidgets")
    pytest.importorskip("IPython")
    from tqdm.notebook import tqdm

    from turnover.io.bars import set_total

    bar = tqdm(desc="counting", display=False)
    set_total(bar, 40)
    bar.update(10)
    bar.refresh()
    widget = bar.container.children[1]
    assert (bar.total, widget.max, widget.value, widget.bar_style) == (40, 40, 10, "")
