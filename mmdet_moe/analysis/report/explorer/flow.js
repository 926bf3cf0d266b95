/* The choices from layer to layer, as a Sankey diagram of Plotly's, which starts when it can. */
(() => {
  const colours = JSON.parse(document.getElementById('colours').textContent);
  const divs = [...document.querySelectorAll('[data-flow]')];

  function draw(div) {
    const { layers, steps } = JSON.parse(document.getElementById(div.dataset.flow).textContent);
    const sizes = steps.map((step) => step.counts.length);
    sizes.push(steps[steps.length - 1].counts[0].length);
    const firsts = sizes.map((_, i) => sizes.slice(0, i).reduce((a, b) => a + b, 0));
    const name = (layer) => layer.replaceAll('<', '&lt;');
    const node = { label: [], color: [], customdata: [], pad: 10, thickness: 16 };
    sizes.forEach((size, i) => {
      for (let e = 0; e < size; e += 1) {
        node.label.push(String(e));
        node.customdata.push(`${name(layers[i])}, expert ${e}`);
        node.color.push(colours[e % colours.length]);
      }
    });
    const link = { source: [], target: [], value: [], color: [], customdata: [] };
    steps.forEach((step, i) => {
      step.counts.forEach((row, a) => row.forEach((value, b) => {
        if (!value) return;
        link.source.push(firsts[i] + a);
        link.target.push(firsts[i + 1] + b);
        link.value.push(value / step.num_units); // all columns are equally high
        link.color.push(`${colours[a % colours.length]}66`);
        link.customdata.push(`${value.toLocaleString('en')} ${step.unit}s`);
      }));
    });
    node.hovertemplate = '%{customdata}: %{value:.1%}<extra></extra>';
    link.hovertemplate = '%{source.customdata}<br>→ %{target.customdata}<br>%{value:.1%}, %{customdata}<extra></extra>';
    const ink = getComputedStyle(document.documentElement).getPropertyValue('--ink').trim();
    const last = layers.length - 1;
    div.setAttribute('role', 'img');
    div.setAttribute('aria-label', `Flow of the main experts through ${layers.join(', ')}`);
    const height = Math.max(260, 40 + 26 * Math.max(...sizes));
    div.style.height = `${height}px`;
    div.style.minWidth = `${Math.max(320, 180 * layers.length)}px`;
    Plotly.newPlot(div, [{ type: 'sankey', arrangement: 'fixed', node, link, valueformat: '.1%' }], {
      height, margin: { l: 12, r: 12, t: 34, b: 10 }, paper_bgcolor: 'rgba(0,0,0,0)',
      font: { color: ink, size: 12.5 },
      annotations: layers.map((layer, i) => ({
        text: name(layer), x: i / last, y: 1, yanchor: 'bottom', showarrow: false,
        xanchor: i === 0 ? 'left' : i === last ? 'right' : 'center', xref: 'paper', yref: 'paper',
      })),
    }, { displayModeBar: false, responsive: true });
  }

  const wait = () => (typeof Plotly === 'undefined' ? setTimeout(wait, 100) : divs.forEach(draw));
  if (divs.length) wait();
})();
