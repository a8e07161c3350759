"""Render a report as one HTML file that needs no other file and makes no request."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

from turnover.errors import InputError, needing
from turnover.io.files import replacing
from turnover.io.parsing import finite_or_none
from turnover.report.content import Curve, HarmfulOverall, ReportContent
from turnover.tasks.explain import (
    GRAM_MEANS,
    SIGNIFICANT_Q,
    TURNOVER_MEANS,
    Explanation,
    GramExplanation,
    GramInfluential,
    Influential,
    Instance,
)

_MINUS = "\N{MINUS SIGN}"
_UNKNOWN = "\N{EN DASH}"
_FLOORS = ("noise floor", "typical standard error")
"""What scores are compared with: by turn-over, and by gram alone."""


def render(content: ReportContent) -> str:
    """Render the complete HTML page, with all styles, scripts and data inside."""
    curves = [drawn for curve in content.curves if (drawn := _curve_data(curve))["steps"]]
    noise = content.noise
    listed: list[Instance | Explanation] = [
        *content.harmful_overall,
        *(() if content.labels is None else content.labels.rows),
        *content.errors,
        *(one for error in content.errors for one in error.instances),
    ]
    scripts = [asset("page.js")]
    if curves:
        scripts += [plotly_js(), asset("charts.js") + asset("curves.js")]
    return page(
        "template.html.j2",
        content.title,
        {**_error_data(content), "curves": curves, "floor": _FLOORS[content.by_gram]},
        scripts,
        content=content,
        curves=curves,
        with_significant=sum(error.n_significant > 0 for error in content.errors),
        significant_share=noise.significant_pairs / noise.pairs if noise.pairs else 0.0,
        texts_left_out=any(one.text is None for one in listed),
        threshold=SIGNIFICANT_Q,
        turnover_means=TURNOVER_MEANS,
        gram_means=GRAM_MEANS
        if content.by_gram or any(error.gram for error in content.errors)
        else None,
        sort_keys=_sort_keys,
    )


def page(template: str, title: str, data: object, scripts: Iterable[str], **values: Any) -> str:
    """Render a template of this package that extends the base, which loads nothing from elsewhere.

    Args:
        template: its file name.
        title: of the browser's window.
        data: JSON values for the scripts, without NaN and infinities.
        scripts: sources of scripts, in their order.
        values: what the template names; texts are escaped.
    """
    jinja2 = _need("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        nats=_nats, signed=_signed, q=_q, z=_z, percent=_percent, number=_number, count=_count
    )
    environment.tests["noise"] = _is_noise
    rendered = environment.get_template(template).render(
        title=title,
        data=_json(data),
        css=asset("colours.css") + asset("style.css"),
        scripts=scripts,
        **values,
    )
    return str(rendered)


def write(content: ReportContent, path: str | Path, *, texts: bool = True) -> None:
    """Write the page to `path`, atomically.

    Args:
        content: what the page shows.
        path: HTML file.
        texts: whether to write the texts and images of targets and training instances.
    """
    save(render(content if texts else content.without_texts()), path)


def save(html: str, path: str | Path) -> None:
    """Write a page to a file, atomically; its folder must exist."""
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"cannot write the report: there is no folder {path.parent}")
    with replacing(path) as draft:
        # A lone surrogate in a text does not stop the report.
        draft.write_bytes(html.encode("utf-8", "replace"))


def asset(name: str) -> str:
    """Read a file of this package."""
    return resources.files("turnover.report").joinpath(name).read_text(encoding="utf-8")


def plotly_js() -> str:
    """Return plotly's source, for a page with charts."""
    return str(_need("plotly.offline").get_plotlyjs())


def _need(module: str) -> ModuleType:
    with needing("the report", "turnover[report]"):
        return importlib.import_module(module)


def _json(value: object) -> str:
    """JSON for a script element: without a `<` that could end or reopen it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _error_data(content: ReportContent) -> dict[str, Any]:
    # Many targets may list a training instance: its text or image is written once.
    instances: dict[tuple[str, str, str | None, str | None], int] = {}

    def shown(item: Influential | GramInfluential, scale: float) -> dict[str, Any]:
        key = (item.key, item.label, item.text, content.train_images.get(item.key))
        number = instances.setdefault(key, len(instances))
        found = {"instance": number, "score": _signed(item.score), "bar": _bar(item.score, scale)}
        if isinstance(item, Influential):
            found |= {"z": _z(item.z), "q": _q(item.q), "noise": _is_noise(item.q)}
        if item.standard_error is not None:
            error = item.standard_error
            found |= {"error": _nats(error), "error_at": _bar(error, scale)}
        return found

    def sides(listed: Explanation | GramExplanation) -> dict[str, Any]:
        scale = _largest(item.score for item in (*listed.helpful, *listed.harmful))
        return {
            "helpful": [shown(item, scale) for item in listed.helpful],
            "harmful": [shown(item, scale) for item in listed.harmful],
        }

    rows = []
    for error in content.errors:
        both = error.helpful + error.harmful
        largest_z = _largest(item.z for item in both)
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
                "floor_at": _bar(error.noise_floor, _largest(item.score for item in both)),
                "sort": {
                    "confidence": finite_or_none(error.confidence),
                    "z": largest_z,
                    "significant": error.n_significant,
                    "noise": finite_or_none(error.noise_floor),
                },
                **sides(error),
                "gram": None if error.gram is None else sides(error.gram),
            }
        )
    return {"errors": rows, "instances": list(instances)}


def _curve_data(curve: Curve) -> dict[str, Any]:
    points = [
        (step, mean, half if math.isfinite(half) else 0.0)
        for step, mean, half in zip(curve.steps, curve.mean, curve.half_width, strict=True)
        if math.isfinite(mean)
    ]
    steps, mean, half_width = map(list, zip(*points, strict=True)) if points else ([], [], [])
    return {"name": curve.name, "steps": steps, "mean": mean, "half_width": half_width}


def _sort_keys(item: HarmfulOverall) -> dict[str, float | None]:
    own = math.nan if item.self_influence is None else item.self_influence
    keys = {"score": item.score, "z": item.z, "q": item.q, "self": own}
    return {name: finite_or_none(value) for name, value in keys.items()}


def _is_noise(q: float) -> bool:
    # Written so that an undefined q counts as noise.
    return not q <= SIGNIFICANT_Q


def _largest(values: Iterable[float]) -> float:
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def _bar(value: float, scale: float) -> float:
    """Length of a bar in percent, where `scale` fills it."""
    share = abs(value) / scale if scale > 0 and math.isfinite(value) else 0.0
    return round(100 * min(share, 1.0), 1)


def _or_unknown(write: Callable[[float], str]) -> Callable[[float], str]:
    """Write a number with typographic minus signs; an en dash where it is not finite."""
    return lambda value: write(value).replace("-", _MINUS) if math.isfinite(value) else _UNKNOWN


@_or_unknown
def _nats(value: float) -> str:
    """Three digits, in powers of ten where the number is tiny or huge."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 0.001 or size >= 10_000:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits}e{int(power)}"
    return f"{value:.{3 if size < 100 else 1}f}"


def _signed(value: float) -> str:
    return ("+" if 0 < value < math.inf else "") + _nats(value)


@_or_unknown
def _z(value: float) -> str:
    return f"{value:+.1f}"


@_or_unknown
def _q(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


@_or_unknown
def _percent(share: float) -> str:
    if 0 < share < 0.0001:
        return "< 0.01%"
    return f"{100 * share:.{2 if share < 0.01 else 1}f}%"


@_or_unknown
def _number(value: float) -> str:
    return f"{value:.2f}"


def _count(value: int) -> str:
    return f"{value:,}"
