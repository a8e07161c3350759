"""Turn a `ReportContent` into one HTML file that needs nothing else and requests nothing."""

from __future__ import annotations

import importlib
import json
import math
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

from turnover.errors import InputError, needing
from turnover.io.files import replacing
from turnover.report.content import Curve, HarmfulOverall, ReportContent
from turnover.tasks.explain import (
    GRAM_MEANS,
    SIGNIFICANT_Q,
    TURNOVER_MEANS,
    GramInfluential,
    Influential,
)

_MINUS = "\N{MINUS SIGN}"
_UNKNOWN = "\N{EN DASH}"


def render(content: ReportContent) -> str:
    """The complete HTML page, with all styles, scripts and data inside."""
    jinja2 = _need("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        nats=_nats, signed=_signed, q=_q, z=_z, percent=_percent, number=_number, count=_count
    )
    environment.tests["noise"] = _is_noise
    curves = [drawn for curve in content.curves if (drawn := _curve_data(curve))["steps"]]
    page = environment.get_template("template.html.j2").render(
        content=content,
        curves=curves,
        with_significant=sum(error.n_significant > 0 for error in content.errors),
        significant_share=_share(content.noise.significant_pairs, content.noise.pairs),
        texts_left_out=_texts_left_out(content),
        threshold=SIGNIFICANT_Q,
        turnover_means=TURNOVER_MEANS,
        gram_means=GRAM_MEANS if any(error.gram for error in content.errors) else None,
        sort_keys=_sort_keys,
        data=_json({**_error_data(content), "curves": curves}),
        css=_asset("colours.css") + _asset("style.css"),
        page_js=_asset("page.js"),
        curves_js=_asset("curves.js"),
        plotly_js=_need("plotly.offline").get_plotlyjs() if curves else None,
    )
    return str(page)


def write(content: ReportContent, path: str | Path, *, texts: bool = True) -> None:
    """Write the page to `path`, which either gets the whole page or stays as it was.

    With `texts=False` no text or image of a target or training instance goes into the file.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"cannot write the report: there is no folder {path.parent}")
    # A lone surrogate in some text must not cost the user the whole report.
    page = render(content if texts else content.without_texts()).encode("utf-8", "replace")
    with replacing(path) as draft:
        draft.write_bytes(page)


def _need(module: str) -> ModuleType:
    with needing("the report", "turnover[report]"):
        return importlib.import_module(module)


def _asset(name: str) -> str:
    return resources.files("turnover.report").joinpath(name).read_text(encoding="utf-8")


def _json(value: object) -> str:
    """JSON that can stand inside a script element: no `<` is left to end or reopen it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _error_data(content: ReportContent) -> dict[str, Any]:
    # A training instance can be listed under hundreds of targets: its text or image travels once.
    instances: dict[tuple[str, str, str | None, str | None], int] = {}

    def number(item: Influential | GramInfluential) -> int:
        shown = (item.key, item.label, item.text, content.train_images.get(item.key))
        return instances.setdefault(shown, len(instances))

    def by_gram(items: tuple[GramInfluential, ...], scale: float) -> list[dict[str, Any]]:
        return [
            {
                "instance": number(i),
                "score": _signed(i.score),
                "error": _nats(i.standard_error),
                "bar": _bar(i.score, scale),
                "error_at": _bar(i.standard_error, scale),
            }
            for i in items
        ]

    def listed(items: tuple[Influential, ...], scale: float) -> list[dict[str, Any]]:
        return [
            {
                "instance": number(i),
                "score": _signed(i.score),
                "z": _z(i.z),
                "q": _q(i.q),
                "noise": _is_noise(i.q),
                "bar": _bar(i.score, scale),
            }
            for i in items
        ]

    rows = []
    for error in content.errors:
        everyone = error.helpful + error.harmful
        scale = max((abs(i.score) for i in everyone if math.isfinite(i.score)), default=0.0)
        largest_z = max((abs(i.z) for i in everyone if math.isfinite(i.z)), default=0.0)
        gram = None
        if error.gram is not None:
            sides = error.gram.helpful + error.gram.harmful
            largest = max((abs(i.score) for i in sides if math.isfinite(i.score)), default=0.0)
            gram = {
                "helpful": by_gram(error.gram.helpful, largest),
                "harmful": by_gram(error.gram.harmful, largest),
            }
        rows.append(
            {
                "id": error.key,
                "true": error.true_label,
                "predicted": error.predicted_label,
                "text": error.text,
                "image": content.test_images.get(error.key),
                "confidence": _percent(error.confidence),
                "largest_z": f"{largest_z:.1f}",
                "significant": _count(error.n_significant),
                "noise_floor": _nats(error.noise_floor),
                "floor_at": _bar(error.noise_floor, scale),
                "sort": {
                    "confidence": _finite(error.confidence),
                    "z": largest_z,
                    "significant": error.n_significant,
                    "noise": _finite(error.noise_floor),
                },
                "helpful": listed(error.helpful, scale),
                "harmful": listed(error.harmful, scale),
                "gram": gram,
            }
        )
    return {"errors": rows, "instances": list(instances)}


def _curve_data(curve: Curve) -> dict[str, Any]:
    points = [
        (step, mean, half if math.isfinite(half) else 0.0)
        for step, mean, half in zip(curve.steps, curve.mean, curve.half_width, strict=True)
        if math.isfinite(mean)
    ]
    return {
        "name": curve.name,
        "steps": [step for step, _, _ in points],
        "mean": [mean for _, mean, _ in points],
        "half_width": [half for _, _, half in points],
    }


def _sort_keys(item: HarmfulOverall) -> dict[str, float | None]:
    keys = {"score": item.score, "z": item.z, "q": item.q, "self": item.self_influence}
    return {name: None if value is None else _finite(value) for name, value in keys.items()}


def _texts_left_out(content: ReportContent) -> bool:
    texts = [item.text for item in content.harmful_overall]
    for error in content.errors:
        texts.append(error.text)
        texts.extend(item.text for item in error.helpful + error.harmful)
        if error.gram is not None:
            texts.extend(item.text for item in error.gram.helpful + error.gram.harmful)
    return any(text is None for text in texts)


def _is_noise(q: float) -> bool:
    # Written so that an undefined q counts as noise.
    return not q <= SIGNIFICANT_Q


def _bar(value: float, scale: float) -> float:
    """The length in percent that stands for `value` where `scale` fills the bar."""
    share = abs(value) / scale if scale > 0 and math.isfinite(value) else 0.0
    return round(100 * min(share, 1.0), 1)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _nats(value: float) -> str:
    """A number of nats to three digits, in powers of ten where it is tiny or huge."""
    if not math.isfinite(value):
        return _UNKNOWN
    if value == 0:
        return "0"
    size = abs(value)
    if size < 0.001 or size >= 10_000:
        text = f"{size:.1e}"
        digits, power = text.split("e")
        text = f"{digits}e{int(power)}"
    else:
        text = f"{size:.{3 if size < 100 else 1}f}"
    return ((_MINUS if value < 0 else "") + text).replace("-", _MINUS)


def _signed(value: float) -> str:
    return ("+" if value > 0 and math.isfinite(value) else "") + _nats(value)


def _z(value: float) -> str:
    return f"{value:+.1f}".replace("-", _MINUS) if math.isfinite(value) else _UNKNOWN


def _q(value: float) -> str:
    if not math.isfinite(value):
        return _UNKNOWN
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return _UNKNOWN
    if 0 < share < 0.0001:
        return "< 0.01%"
    return f"{100 * share:.{2 if share < 0.01 else 1}f}%"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", _MINUS) if math.isfinite(value) else _UNKNOWN


def _count(value: int) -> str:
    return f"{value:,}"
