"use strict";

(() => {
  const LABEL_GAP = 16;
  const { HEIGHT, narrow, token, translucent, axis, react, redrawn } = charts;
  const { curves } = JSON.parse(document.getElementById("data").textContent);

  // Colour tells the sub-network, dash tells train from test: either can be read without the other.
  function look(name) {
    const kind = ["exposed", "hidden", "mean"].find((word) => name.includes(word)) || "mean";
    return { colour: `--curve-${kind}`, dash: name.startsWith("test") ? "dash" : "solid" };
  }

  // Set rather than automatic, which would make room for the labels inside the axes.
  function xRange() {
    const last = Math.max(...curves.map((curve) => curve.steps[curve.steps.length - 1]));
    return [Math.min(...curves.map((curve) => curve.steps[0]), last - 1), last];
  }

  function lossRange() {
    const low = Math.min(...curves.map((c) => Math.min(...c.mean.map((m, i) => m - c.half_width[i]))));
    const high = Math.max(...curves.map((c) => Math.max(...c.mean.map((m, i) => m + c.half_width[i]))));
    const pad = (high - low || 1) * 0.06;
    return [low - pad, high + pad];
  }

  // Names stand at the ends of their curves, pushed apart where curves end close together.
  function labels([low, high], plotHeight, size) {
    const placed = curves.map((curve) => {
      const end = curve.mean[curve.mean.length - 1];
      const at = ((end - low) / (high - low)) * plotHeight;
      return { curve, end, at, wanted: at };
    });
    placed.sort((a, b) => a.at - b.at);
    for (let i = 1; i < placed.length; i += 1) {
      placed[i].at = Math.max(placed[i].at, placed[i - 1].at + LABEL_GAP);
    }
    let ceiling = plotHeight - LABEL_GAP / 2;
    for (let i = placed.length - 1; i >= 0; i -= 1) {
      placed[i].at = Math.min(placed[i].at, ceiling);
      ceiling = placed[i].at - LABEL_GAP;
    }
    return placed.map(({ curve, end, at, wanted }) => ({
      text: curve.name,
      x: curve.steps[curve.steps.length - 1],
      y: end,
      xanchor: "left",
      xshift: 8,
      yshift: at - wanted,
      showarrow: false,
      font: { color: token(look(curve.name).colour), size },
    }));
  }

  function draw() {
    const size = charts.size();
    const margin = { l: narrow.matches ? 44 : 60, r: narrow.matches ? 92 : 116, t: 12, b: 52 };
    const yRange = lossRange();
    const bands = curves.map((curve) => ({
      x: [...curve.steps, ...[...curve.steps].reverse()],
      y: [
        ...curve.mean.map((mean, i) => mean + curve.half_width[i]),
        ...curve.mean.map((mean, i) => mean - curve.half_width[i]).reverse(),
      ],
      fill: "toself",
      fillcolor: translucent(token(look(curve.name).colour), 0.18),
      line: { width: 0 },
      mode: "lines",
      hoverinfo: "skip",
    }));
    const lines = curves.map((curve) => ({
      name: curve.name,
      x: curve.steps,
      y: curve.mean,
      customdata: curve.half_width,
      mode: "lines",
      line: { color: token(look(curve.name).colour), dash: look(curve.name).dash, width: 2.5 },
      hovertemplate: "%{y:.3f} ± %{customdata:.3f}",
    }));
    react("plot", [...bands, ...lines], {
      margin,
      showlegend: false,
      hovermode: "x unified",
      xaxis: { ...axis("Optimizer steps", 10), range: xRange() },
      yaxis: { ...axis("Loss (nats)", 8), range: yRange },
      annotations: labels(yRange, HEIGHT - margin.t - margin.b, size),
    });
  }

  redrawn(draw);
})();
