/* The choices from layer to layer, as a Sankey diagram of Plotly's, which starts when it can. */
(() => {
  const colours = JSON.parse(document.getElementById('colours').textContent);
  const divs = [...document.querySelectorAll('[data-flow]')];

  function draw(div) {
    const [run, number] = div.dataset.flow.split(' ');
    const { unit, titles, steps } = JSON.parse(document.getElementById(`flows-${run}`).textContent)[number];
    const layers = titles.map((title) => title.replaceAll('<', '&lt;'));
    const last = layers.length - 1;
    const add = (sums, row) => row.map((value, i) => value + (sums[i] || 0));
    /* Of each layer: how much of everything each expert has. */
    const totals = [
      steps[0].counts.map((row) => row.reduce((a, b) => a + b, 0)),
      ...steps.map((step) => step.counts.reduce(add, [])),
    ];
    const most = Math.max(...totals.map((sums) => sums.filter(Boolean).length));
    const inner = Math.max(180, 34 * most);
    const [pad, top, bottom] = [10, 34, 10];
    const gap = pad / inner;
    const filled = 1 - gap * (most - 1); // as Plotly scales the nodes
    const node = { label: [], color: [], customdata: [], x: [], y: [], pad, thickness: 16 };
    const place = totals.map((sums, i) => {
      const all = sums.reduce((a, b) => a + b, 0);
      const used = sums.filter(Boolean).length;
      let start = (1 - filled - gap * (used - 1)) / 2;
      return sums.map((sum, e) => {
        if (!sum) return -1; // a node without bands would be put anywhere
        const part = filled * (sum / all);
        node.label.push(String(e));
        node.customdata.push(`${layers[i]}, expert ${e}`);
        node.color.push(colours[e % colours.length]);
        node.x.push(Math.min(Math.max(i / last, 0.001), 0.999)); // 0 and 1 mean "anywhere"
        node.y.push(start + part / 2);
        start += part + gap;
        return node.label.length - 1;
      });
    });
    const link = { source: [], target: [], value: [], color: [], customdata: [] };
    steps.forEach((step, i) => {
      step.counts.forEach((row, a) => row.forEach((value, b) => {
        if (!value) return;
        link.source.push(place[i][a]);
        link.target.push(place[i + 1][b]);
        link.value.push(value / step.num_units);
        link.color.push(`${colours[a % colours.length]}66`);
        link.customdata.push(`${value.toLocaleString('en')} ${unit}s`);
      }));
    });
    node.hovertemplate = '%{customdata}: %{value:.1%}<extra></extra>';
    link.hovertemplate = '%{source.customdata}<br>→ %{target.customdata}<br>%{value:.1%}, %{customdata}<extra></extra>';
    const ink = getComputedStyle(document.documentElement).getPropertyValue('--ink').trim();
    div.setAttribute('role', 'img');
    div.setAttribute('aria-label', `Flow of the main experts through ${titles.join(', ')}`);
    const height = top + inner + bottom;
    div.style.height = `${height}px`;
    div.style.minWidth = `${Math.max(320, 170 * layers.length)}px`;
    Plotly.newPlot(div, [{ type: 'sankey', arrangement: 'fixed', node, link, valueformat: '.1%' }], {
      height, margin: { l: 12, r: 12, t: top, b: bottom }, paper_bgcolor: 'rgba(0,0,0,0)',
      font: { color: ink, size: 12.5 },
      annotations: layers.map((layer, i) => ({
        text: layer, x: i / last, y: 1, yanchor: 'bottom', showarrow: false,
        xanchor: i === 0 ? 'left' : i === last ? 'right' : 'center', xref: 'paper', yref: 'paper',
      })),
    }, { displayModeBar: false, responsive: true });
  }

  const wait = () => (typeof Plotly === 'undefined' ? setTimeout(wait, 100) : divs.forEach(draw));
  if (divs.length) {
    wait();
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', wait);
  }
})();
