"""What in Python source could run code that came as data, found in its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator

RUNNING = frozenset(
    {
        *("_pickle", "cPickle", "cloudpickle", "dill", "jsonpickle", "joblib", "marshal", "pickle"),
        *("shelve", "yaml", "code", "codeop", "pty", "runpy", "subprocess", "multiprocessing"),
    }
)
"""Modules whose business it is."""
_CALLS = frozenset(
    {
        *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__"),
        *("os.system", "os.popen", "os.fork", "os.startfile", "shutil.unpack_archive"),
        *("torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "torch.export.load"),
        *("tempfile.mktemp", "pandas.read_pickle", "pandas.eval", "numpy.fromregex"),
    }
)
_METHODS = frozenset({"extractall", "from_string", "read_pickle", "to_pickle", "load_module"})
_BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
_MUST_BE = {"allow_pickle": False, "trust_remote_code": False, "weights_only": True, "shell": False}
"""Keywords, and the one value that they may have."""
_NEEDED = {
    "from_pretrained": "trust_remote_code",
    "from_config": "trust_remote_code",
    "read_array": "allow_pickle",
    "write_array": "allow_pickle",
}
"""Methods that must be given one of them; of numpy's ``load`` that is told by its whole name."""


def found_in(source: str) -> Iterator[str]:
    """Line and name of each."""
    tree = ast.parse(source)
    names = {name: f"builtins.{name}" for name in _BUILTINS} | dict(_imported(tree))
    for node in ast.walk(tree):
        for what in _wrong(node, names):
            yield f"line {getattr(node, 'lineno', '?')}: {what}"


def opens_files(source: str) -> bool:
    """Whether it opens any itself."""
    names = {one.id for one in ast.walk(ast.parse(source)) if isinstance(one, ast.Name)}
    methods = {one.attr for one in ast.walk(ast.parse(source)) if isinstance(one, ast.Attribute)}
    return "open" in names | methods or bool(methods & {"read_bytes", "read_text", "load_file"})


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Names in a module, and what of other modules they stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                whole = one.name if one.asname else one.name.split(".")[0]
                yield one.asname or whole, whole
        elif isinstance(node, ast.ImportFrom):
            for one in node.names:
                yield one.asname or one.name, f"{node.module}.{one.name}"


def _wrong(node: ast.AST, names: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        modules = [one.name for one in node.names]
    elif isinstance(node, ast.ImportFrom):
        modules = [f"{node.module}.{one.name}" for one in node.names]
    else:
        modules = []
    yield from (module for module in modules if RUNNING & set(module.split(".")))
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
        whole = _whole(node, names)
        if whole in _CALLS or whole.startswith(("os.exec", "os.spawn", "os.posix_spawn")):
            yield whole  # called, or handed on to be
    if isinstance(node, ast.Call):
        yield from _wrong_call(node, _whole(node.func, names))


def _wrong_call(node: ast.Call, whole: str) -> Iterator[str]:
    method = whole.rpartition(".")[2]
    if method in _METHODS or (method == "eval" and (node.args or node.keywords)):
        yield method
    given = {one.arg: one.value for one in node.keywords}
    for name in _MUST_BE.keys() & given.keys():
        value = given[name]
        if not isinstance(value, ast.Constant) or value.value is not _MUST_BE[name]:
            yield f"{name} is {ast.unparse(value)}"
    needed = "allow_pickle" if whole == "numpy.load" else _NEEDED.get(method)
    if needed is not None and needed not in given and not whole.startswith("turnover."):
        yield f"{method} without {needed}"
    if whole == "importlib.import_module" and not isinstance(node.args[0], ast.Constant):
        yield "a module whose name is computed"


def _whole(node: ast.expr, names: dict[str, str]) -> str:
    """The name of what is called, aliases followed; what stands before is unknown where it is computed."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_whole(node.value, names)}.{node.attr}"
    return "?"
