"use strict";

(() => {
  const { narrow, token, translucent, axis, react, redrawn } = charts;
  const { labels, digits, whole, returns, effects } = JSON.parse(
    document.getElementById("data").textContent,
  );
  const places = labels.map((_, place) => place);
  const number = `,.${digits}f`;

  // Plotly reads some markup in texts, links among it: a label must stay a text.
  function plain(label, longest) {
    const letters = Array.from(label);
    const shown = letters.length > longest ? `${letters.slice(0, longest - 1).join("")}…` : label;
    return shown.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }

  const names = labels.map((label) => plain(label, 40));

  function groupAxis() {
    const longest = narrow.matches ? 8 : 14;
    const each = Math.ceil(labels.length / (narrow.matches ? 5 : 10));
    const marked = places.filter((place) => place % each === 0);
    return {
      ...axis("Groups, in the order in which they came", 10),
      range: [-0.6, labels.length - 0.4],
      tickvals: marked,
      ticktext: marked.map((place) => plain(labels[place], longest)),
      tickangle: 0,
      showgrid: false,
    };
  }

  function draw(id, title, traces) {
    react(id, traces, {
      margin: { l: narrow.matches ? 52 : 72, r: 16, t: 44, b: 56 },
      showlegend: true,
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
      hovermode: "closest",
      bargap: 0,
      xaxis: groupAxis(),
      yaxis: { ...axis(title, 8), automargin: "width" },
    });
  }

  function side(name, color, symbol) {
    return {
      name,
      x: places,
      y: returns[name],
      customdata: names.map((label, place) => [label, returns.z[place]?.toFixed(1) ?? "–"]),
      mode: "lines+markers",
      line: { color: token(color), width: 1.5 },
      marker: { color: token(color), symbol, size: labels.length > 100 ? 4 : 7 },
      hovertemplate: `%{customdata[0]}<br>${name}: %{y:${number}}<br>z %{customdata[1]}<extra></extra>`,
    };
  }

  function drawReturns() {
    const judged = places.filter((place) => returns.low[place] !== null);
    const chance = {
      type: "bar",
      name: "“without” by chance",
      x: judged,
      base: judged.map((place) => returns.low[place]),
      y: judged.map((place) => returns.high[place] - returns.low[place]),
      width: labels.length > 100 ? 1 : 0.8,
      marker: { color: translucent(token("--muted"), 0.22), line: { width: 0 } },
      hoverinfo: "skip",
    };
    const agent = {
      name: "whole agent",
      x: [-0.6, labels.length - 0.4],
      y: [whole, whole],
      mode: "lines",
      line: { color: token("--curve-mean"), width: 2, dash: "dash" },
      hovertemplate: `whole agent: %{y:${number}}<extra></extra>`,
    };
    draw("returns-plot", "Return", [
      chance,
      agent,
      side("with", "--curve-exposed", "circle"),
      side("without", "--curve-hidden", "diamond"),
    ]);
  }

  function drawEffects() {
    const kinds = [
      ["noise", "may be chance", "--muted", "circle"],
      ["harmful", "lowered the return", "--harmful", "diamond"],
      ["helpful", "raised the return", "--helpful", "square"],
    ];
    const traces = kinds.map(([kind, name, color, symbol]) => {
      const own = places.filter((place) => effects.kind[place] === kind);
      return {
        name,
        x: own,
        y: own.map((place) => effects.effect[place]),
        customdata: own.map((place) => [names[place], effects.half_width[place]]),
        error_y: {
          array: own.map((place) => effects.half_width[place]),
          color: token(color),
          thickness: labels.length > 100 ? 0.75 : 1.5,
          width: labels.length > 60 ? 0 : 3,
        },
        mode: "markers",
        marker: { color: token(color), symbol, size: labels.length > 100 ? 5 : 8 },
        hovertemplate: `%{customdata[0]}<br>%{y:+${number}} ± %{customdata[1]:${number}}<extra></extra>`,
      };
    });
    const zero = {
      x: [-0.6, labels.length - 0.4],
      y: [0, 0],
      mode: "lines",
      line: { color: token("--text"), width: 1 },
      hoverinfo: "skip",
      showlegend: false,
    };
    draw("effects-plot", "Effect on return", [zero, ...traces.filter((one) => one.x.length)]);
  }

  redrawn(drawReturns);
  redrawn(drawEffects);
})();
