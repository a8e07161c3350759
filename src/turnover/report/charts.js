"use strict";

// Charts of any page: colors of the page, sizes of the window, and no button that leaves the page.
const charts = (() => {
  const HEIGHT = 420;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");

  function token(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function translucent(hex, alpha) {
    const part = (at) => parseInt(hex.slice(at, at + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${alpha})`;
  }

  function size() {
    return narrow.matches ? 11 : 13;
  }

  function axis(title, standoff) {
    return {
      color: token("--muted"),
      gridcolor: token("--line"),
      zeroline: false,
      automargin: false,
      fixedrange: narrow.matches,
      title: { text: title, standoff },
    };
  }

  function react(id, traces, layout) {
    const shared = {
      height: HEIGHT,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: size(), color: token("--text") },
      hoverlabel: {
        bgcolor: token("--card"),
        bordercolor: token("--line"),
        font: { color: token("--text") },
      },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: token("--muted"), activecolor: token("--accent") },
      dragmode: narrow.matches ? false : "zoom",
    };
    const config = {
      responsive: true,
      displaylogo: false,
      displayModeBar: narrow.matches ? false : "hover",
      // Named one by one, so that no version of plotly adds a button that leaves this page.
      modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "resetScale2d"]],
    };
    Plotly.react(document.getElementById(id), traces, { ...shared, ...layout }, config);
  }

  function redrawn(draw) {
    draw();
    dark.addEventListener("change", draw);
    narrow.addEventListener("change", draw);
  }

  return { HEIGHT, narrow, token, translucent, size, axis, react, redrawn };
})();
