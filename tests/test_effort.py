"""What the benchmark of effort counts."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="pip install scikit-learn")

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.effort import child, run, table
from benchmarks.effort.data import TRAIN, digits, wrong

BASE = run.SCRIPTS / "base.py"


def test_lines_that_are_new_or_changed_count_and_indentation_does_not(tmp_path):
    base, script = tmp_path / "base.py", tmp_path / "script.py"
    base.write_text('"""One."""\n\na = 1\nb = 2\nc = 3\n')
    script.write_text('"""Two\nlines."""\nimport x\n\nwith x:\n    a = 1\n\n    b = 4\nc = 3\n')
    assert run.added(script, base) == 3
    assert run.added(base, base) == run.added(BASE, BASE) == 0


def test_functions_and_methods_that_the_user_writes_count(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("def f():\n    pass\n\n\nclass C:\n    def g(self):\n        pass\n")
    assert run.functions(script) == 2


def test_training_rows_count_through_copies_and_transforms_and_test_rows_do_not():
    train, test = digits()
    x = train.tensors[0]
    passes = child.Passes(x)
    handle = nn.modules.module.register_module_forward_pre_hook(passes)
    try:
        model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        model(x)
        assert passes.rows == TRAIN
        model(test.tensors[0])
        seen = passes.rows
        assert seen < TRAIN + 10  # few digits come twice
        parameters = dict(model.named_parameters())

        def cost(values, row):
            return torch.func.functional_call(model, values, (row,)).sum()

        torch.func.vmap(torch.func.grad(cost), (None, 0))(parameters, x)
        assert passes.rows == seen + TRAIN
    finally:
        handle.remove()


def test_a_tenth_of_the_labels_is_wrong():
    assert int(wrong().sum()) == TRAIN // 10
    assert [len(one) for one in digits()] == [500, 100]


@pytest.mark.slow
def test_the_script_of_gram_does_the_job(tmp_path):
    found, arrays = run.measured(next(one for one in run.TOOLS if one.script == "gram"), runs=1)
    assert arrays["scores"].shape == (100, TRAIN) and arrays["suspicion"].shape == (TRAIN,)
    assert found["passes"] == pytest.approx(31, abs=0.1)  # 30 epochs, and one pass of gram
    assert found["lines"] <= 5 and found["functions"] == 0 and found["stored_bytes"] == 0


def test_the_table_has_a_row_for_each_tool():
    rows = {
        tool.script: {
            "title": tool.title,
            "package": "p 1",
            "runs": 1,
            "lines": 7,
            "functions": 0,
            "passes": 33.0,
            "stored_bytes": 0,
            "peak_bytes": 5e8,
            "train_seconds": 1.0,
            "seconds": 0.5,
            "mislabel_auc": None,
            "lds": 0.5,
            "lds_class_removed": 0.4,
        }
        for tool in run.TOOLS
    }
    rows["base"]["passes"] = 30.0
    machine = {"threads": 1, "torch": "t", "date": "d", "commit": "c"}
    found = {"rows": rows, "machine": machine, "subsets": 3, "seeds": 1}
    text = table.effort(json.loads(json.dumps(found)))
    assert "| turnover: gram | 7 | 0 | 3 | 0 B | 500 MB | 1.0 + 0.50 |  | 0.50 / 0.40 |" in text
    assert text.count("\n| ") == 1 + len(run.TOOLS)
