/* The Expert Explorer. Reads the payloads (see payload.py) and draws; asks no network for anything.
 *
 * A run's outcomes are columns: typed arrays of n rows. Weights, uint8 (n, E) by layer, are inflated
 * when their layer is first chosen. Class names come from users: they go into the page as text, and
 * into charts, which know a little HTML, through `chartText`.
 */
'use strict';

(() => {
  const NO_WEIGHT = 255;
  const WEIGHT_STEPS = 254;
  const FINE = 257; // small weights travel in finer steps, see packing.py
  const KINDS = ['correct', 'wrong', 'missed'];
  const SYMBOLS = ['✓', '✗', '○'];
  const SIZE_LIMITS = [32, 96];
  const WALL_PAGE = { narrow: 24, wide: 48 };
  const CLASSES_IN_CHART = 12;
  const CLASSES_IN_HEAT_MAP = 24;
  const CROWDED = 12;
  /* Of the experts, as in all pictures. A number always stands beside a colour. */
  const COLOURS = JSON.parse(document.querySelector('#colours').textContent);
  const ARRAYS = {
    uint8: Uint8Array, uint16: Uint16Array, int32: Int32Array, float32: Float32Array,
  };

  // Small helpers --------------------------------------------------------------------------------

  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const range = (n) => Array.from({ length: n }, (_, i) => i);
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const whole = (n) => n.toLocaleString('en-US');
  const fixed = (x, digits = 3) => (x === null || x === undefined ? '–' : x.toFixed(digits));
  const percent = (x) => `${(100 * x).toFixed(x > 0 && x < 0.01 ? 1 : 0)} %`;
  const weightText = (steps) => { const w = steps / WEIGHT_STEPS; return w > 0 && w < 0.1 ? w.toPrecision(2) : w.toFixed(2); };
  const plural = (n, noun) => `${whole(n)} ${noun}${n === 1 ? '' : 's'}`;

  function element(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name === 'class') node.className = value;
      else if (name in node && !name.startsWith('aria')) node[name] = value;
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  /* Plotly reads <b> and its like in texts. */
  const chartText = (text) => String(text).replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');
  const shortened = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

  async function unpack({ dtype, data }) {
    const binary = atob(data);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
    return new ARRAYS[dtype](await new Response(stream).arrayBuffer());
  }

  async function unpackTable(packed) {
    const values = await unpack(packed);
    const width = packed.shape[1];
    return range(packed.shape[0]).map((i) => Array.from(values.subarray(i * width, (i + 1) * width)));
  }

  const expertColour = (expert) => COLOURS[expert % COLOURS.length];

  /* Black or white, whichever stands out more (WCAG's relative luminance). */
  function textOn(colour) {
    const [r, g, b] = [1, 3, 5].map((i) => {
      const c = parseInt(colour.slice(i, i + 2), 16) / 255;
      return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? '#000000' : '#ffffff';
  }

  function badge(expert) {
    const colour = expert < 0 ? '#7A7A7A' : expertColour(expert);
    const node = element('span', { class: 'badge' }, expert < 0 ? '–' : String(expert));
    node.style.background = colour;
    node.style.color = textOn(colour);
    return node;
  }

  // Charts ---------------------------------------------------------------------------------------

  const theme = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  /* Charts are drawn when they come near the screen: a page of two runs has thirty. */
  const MARGIN = 200;
  const pending = new Map();
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) drawPending(entry.target);
  }, { rootMargin: `${MARGIN}px` });

  function drawPending(div) {
    const draw = pending.get(div);
    pending.delete(div);
    observer.unobserve(div);
    if (draw) draw();
  }

  function drawSoon(div, draw) {
    pending.set(div, draw);
    if (typeof Plotly !== 'undefined') watch(div);
  }

  function watch(div) {
    const { top, bottom, height } = div.getBoundingClientRect();
    if (height && bottom > -MARGIN && top < innerHeight + MARGIN) drawPending(div);
    else observer.observe(div);
  }

  /* Plotly takes longer to start than everything else together, so the images come first. */
  function startPlotly() {
    const text = $('#plotly');
    document.head.append(element('script', { textContent: text.textContent }));
    text.remove();
    [...pending.keys()].forEach(watch);
  }

  function plot(div, traces, layout, description) {
    const axis = {
      gridcolor: theme('rule'), linecolor: theme('rule'), zerolinecolor: theme('rule'),
      automargin: true, fixedrange: true, ticks: '',
    };
    const { xaxis, yaxis, margin, ...rest } = layout;
    const title = (a) => (a.title ? { title: { text: a.title, standoff: 8, font: { size: 12.5 } } } : {});
    div.setAttribute('role', 'img');
    div.setAttribute('aria-label', description);
    div.style.height = `${layout.height}px`;
    Plotly.react(div, traces, {
      paper_bgcolor: 'rgba(0,0,0,0)',
      plot_bgcolor: 'rgba(0,0,0,0)',
      font: { family: theme('font'), size: 12.5, color: theme('ink') },
      margin: { l: 8, r: 8, t: 8, b: 8, ...margin },
      dragmode: false,
      showlegend: false,
      hoverlabel: { align: 'left' },
      ...rest,
      xaxis: { ...axis, ...xaxis, ...title(xaxis) },
      yaxis: { ...axis, ...yaxis, ...title(yaxis) },
    }, { displayModeBar: false, responsive: true });
  }

  const shareAxis = (title) => ({ title, tickformat: '.2~%', rangemode: 'tozero', nticks: 6 });
  /* As many numbers of experts as fit into a length in px. */
  function expertTicks(count, length) {
    const step = [1, 2, 4, 5, 8, 10, 16, 20].find((s) => count / s <= length / 30) || 32;
    return { dtick: step, tick0: 0, tickangle: 0 };
  }

  /* Numbers of the experts; as text they are categories, of which some numbers are missing. */
  const expertAxis = (numbers, div) => ({
    title: 'expert', showgrid: false, zeroline: false, type: typeof numbers[0] === 'string' ? 'category' : 'linear',
    range: [-0.5, numbers.length - 0.5], ...expertTicks(numbers.length, div.clientWidth - 110),
  });

  function heatMap(div, table, names, numbers, { rowTitle, hover, description, square }) {
    const experts = numbers.length;
    const rowHeight = square ? Math.max(8, Math.min(40, 300 / experts)) : Math.max(18, Math.min(30, 200 / names.length));
    const narrow = div.clientWidth < 420;
    const digits = Math.max(...table.flat()) < 0.1 ? 3 : 2;
    const colours = ['heat-low', 'heat-mid', 'heat-high'].map(theme);
    plot(div, [{
      type: 'heatmap',
      z: table,
      x: numbers,
      y: square ? numbers : range(names.length),
      zmin: 0,
      colorscale: [[0, colours[0]], [0.5, colours[1]], [1, colours[2]]],
      xgap: experts > 24 ? 0 : 1,
      ygap: names.length > 40 ? 0 : 1,
      customdata: table.map((row, i) => row.map(() => chartText(names[i]))),
      hovertemplate: `${hover}<extra></extra>`,
      texttemplate: experts <= (narrow ? 5 : 10) ? `%{z:.${digits}f}` : '',
      textfont: { size: 12 },
      colorbar: { thickness: 10, outlinewidth: 0, len: 1, tickformat: '.2~f', nticks: 5, xpad: 6 },
      showscale: experts > (narrow ? 5 : 10),
    }], {
      height: Math.round(names.length * rowHeight + 62),
      xaxis: expertAxis(numbers, div),
      yaxis: {
        title: rowTitle, autorange: 'reversed', showgrid: false, zeroline: false,
        ...(square
          ? { type: expertAxis(numbers, div).type, ...expertTicks(experts, experts * rowHeight * 1.4) }
          : { tickvals: range(names.length), ticktext: names.map((n) => chartText(shortened(n, narrow ? 14 : 22))) }),
      },
    }, description);
  }

  /* The place of the next of `count` things that an arrow key goes to; null for other keys. */
  function stepped(event, index, count, perLine) {
    if (event.ctrlKey || event.metaKey || event.altKey || index < 0) return null;
    const targets = {
      ArrowRight: index + 1, ArrowLeft: index - 1, ArrowDown: index + perLine, ArrowUp: index - perLine, Home: 0, End: count - 1,
    };
    const target = targets[event.key];
    if (target === undefined) return null;
    return target < 0 || target >= count ? index : target;
  }

  // One run --------------------------------------------------------------------------------------

  const COLUMNS = ['image', 'box', 'label', 'true_label', 'score', 'kind', 'size', 'level'];
  const ATTRIBUTES = {
    class: 'class', superclass: 'superclass', cluster: 'hidden cluster', dataset: 'data set', level: 'pyramid level', size: 'object size', size_coco: 'COCO size', position: 'position in the image', image: 'image',
  };
  const SOURCES = ['objects', 'detections', 'decisions'];

  class Run {
    constructor(payload, root) {
      this.payload = payload;
      this.root = root;
      this.classes = payload.run.classes;
      this.superclasses = payload.run.superclasses || {};
      this.detection = payload.run.task === 'detection';
      this.inflated = {};
      this.turn = 0;
    }

    $(selector) { return $(selector, this.root); }

    $$(selector) { return $$(selector, this.root); }

    chart(name) { return this.$(`[data-chart="${name}"] .chart`); }

    async load() {
      const { columns, pool } = this.payload;
      const arrays = await Promise.all(COLUMNS.map((name) => unpack(columns[name])));
      this.columns = Object.fromEntries(COLUMNS.map((name, i) => [name, arrays[i]]));
      const [rows, regions] = await Promise.all([unpack(pool.rows), unpack(pool.regions)]);
      this.regions = regions;
      this.cropOf = new Map(Array.from(rows, (row, i) => [row, i]));
      const { size, level } = this.columns;
      this.count = size.length;
      this.sizeBin = Int8Array.from(size, (s) => (Number.isNaN(s) ? -1 : s < SIZE_LIMITS[0] ? 0 : s < SIZE_LIMITS[1] ? 1 : 2));
      this.hasSizes = this.sizeBin.some((bin) => bin >= 0);
      this.levels = level.reduce((a, b) => Math.max(a, b), -1) + 1;
      if (this.levels) this.levels = Math.max(this.levels, this.payload.run.num_levels || 0);
    }

    /* Begin with the first layer that has images to show. */
    async start() {
      this.listen();
      const names = Object.keys(this.payload.layers);
      const first = names.find((name) => this.payload.columns.weights[name]) || names[0];
      if (first === undefined) return;
      this.$('.layer').value = first;
      await this.chooseLayer(first);
    }

    listen() {
      this.$('.layer').addEventListener('change', (event) => this.chooseLayer(event.target.value));
      const experts = this.$('.experts');
      experts.addEventListener('click', (event) => {
        const button = event.target.closest('.expert');
        if (button) this.chooseExpert(Number(button.dataset.expert));
      });
      experts.addEventListener('keydown', (event) => {
        const target = stepped(event, this.expert, this.width, 1);
        if (target === null) return;
        event.preventDefault();
        this.chooseExpert(target);
        $(`[data-expert="${target}"]`, experts).focus();
      });
      const wall = this.$('.wall');
      wall.addEventListener('click', (event) => {
        const tile = event.target.closest('.tile');
        if (tile) viewer.open(this, this.tiles().indexOf(tile));
      });
      wall.addEventListener('keydown', (event) => {
        const tiles = this.tiles();
        const perLine = tiles.filter((tile) => tile.offsetTop === tiles[0].offsetTop).length;
        const target = stepped(event, tiles.indexOf(document.activeElement), tiles.length, perLine);
        if (target === null) return;
        event.preventDefault();
        this.focusTile(target);
      });
      this.$('.more').addEventListener('click', () => {
        const before = this.shown;
        this.shown += this.page();
        this.drawWall();
        this.focusTile(before);
      });
      this.$('.empty-reset').addEventListener('click', () => {
        form.reset();
        $('input, select', form).focus();
      });
      this.$('.source').addEventListener('change', () => this.drawHeatMaps());
      this.$('.direction').addEventListener('change', () => this.drawHeatMaps());
      for (const button of this.$$('.all-classes')) {
        button.addEventListener('click', () => {
          button.setAttribute('aria-expanded', String(button.getAttribute('aria-expanded') !== 'true'));
          this.drawHeatMaps();
        });
      }
    }

    /* Experts that are shown: of very many not all. What is about them goes by their places. */
    get width() { return this.layer.load.length; }

    /* The number of the expert at a place. */
    number(expert = this.expert) { return expert < 0 || !this.layer.experts ? expert : this.layer.experts[expert]; }

    numbers() { return this.layer.experts ? this.layer.experts.map(String) : range(this.width); }

    // Choices ------------------------------------------------------------------------------------

    async chooseLayer(name) {
      const turn = ++this.turn;
      const layer = this.payload.layers[name];
      const packed = this.payload.columns.weights[name];
      if (packed && !this.inflated[name]) {
        const steps = await unpack(packed);
        this.inflated[name] = packed.dtype === 'uint8' ? steps : Float32Array.from(steps, (x) => x / FINE);
      }
      if (!layer.tables) {
        const history = layer.history ? await unpackTable(layer.history.load) : null;
        layer.tables = { coactivation: await unpackTable(layer.coactivation), history };
        for (const attributes of Object.values(layer.associations)) {
          for (const association of Object.values(attributes)) {
            if (association.counts) association.table = await unpackTable(association.counts);
          }
        }
      }
      if (turn !== this.turn) return; // another choice came in between
      this.layerName = name;
      this.layer = layer;
      this.weights = packed ? this.inflated[name] : null;
      this.drawExperts();
      this.drawLayerFacts();
      this.drawOverview();
      this.chooseExpert(layer.load.indexOf(Math.max(...layer.load)));
    }

    chooseExpert(expert) {
      this.expert = expert;
      for (const button of this.$$('.expert')) {
        const checked = Number(button.dataset.expert) === expert;
        button.setAttribute('aria-checked', String(checked));
        button.tabIndex = checked ? 0 : -1;
      }
      this.root.style.setProperty('--key', expertColour(this.number()));
      this.refresh();
      if (this.layer.history) drawSoon(this.chart('history'), () => this.drawHistory());
    }

    drawExperts() {
      const { load, dead_experts: dead } = this.layer;
      const box = this.$('.experts');
      box.classList.toggle('crowded', load.length > CROWDED);
      box.replaceChildren(...load.map((share, expert) => {
        const note = dead.includes(expert) ? ', never chosen' : '';
        return element('button', {
          type: 'button', class: note ? 'expert dead' : 'expert', role: 'radio', 'data-expert': expert,
          'aria-label': `Expert ${this.number(expert)}, load ${percent(share)}${note}`, title: `Load ${percent(share)}${note}`,
        }, badge(this.number(expert)), element('span', { class: 'load', 'aria-hidden': 'true' }, percent(share)));
      }));
    }

    drawLayerFacts() {
      const { layer } = this;
      const per = layer.granularity === 'image' && this.levels ? 'image and pyramid level' : layer.granularity;
      const many = layer.dead_experts.length;
      const dead = many ? ` Never chosen: ${many > 8 ? `${many} experts, shown pale` : `expert ${layer.dead_experts.map((e) => this.number(e)).join(', ')}`}.` : '';
      const dense = layer.kind === 'factorised';
      const facts = this.$('.layer-facts');
      facts.replaceChildren(
        `${layer.num_experts} experts, ${dense ? 'each with a coefficient' : `${layer.top_k} chosen`} per decision. One decision per ${per}, `
        + `${whole(layer.num_decisions)} in all. Percentages: ${dense ? 'share of the coefficients above 0' : 'load'}.${dead}`
        + `${layer.left_out ? ` Shown are ${layer.left_out}.` : ''}`,
      );
      if (layer.collapsed) {
        facts.append(element('span', { class: 'collapsed' }, 'Collapsed: the choice of the experts hardly depends on the input.'));
      }
    }

    // What the filters let through ---------------------------------------------------------------

    classTest(filter) {
      if (!filter) return null;
      const name = filter.slice(2);
      const labels = filter[0] === 's' ? this.superclasses[name] || [] : [this.classes.indexOf(name)];
      const test = new Uint8Array(this.classes.length);
      for (const label of labels) if (label >= 0) test[label] = 1;
      return test;
    }

    refresh() {
      if (!this.layer) return;
      const { sizes, kinds, klass } = readFilters();
      const { kind, label } = this.columns;
      const test = this.classTest(klass);
      const bySize = this.hasSizes && sizes.size < 3;
      const experts = this.width;
      this.matching = []; // rows of any expert
      this.rows = []; // rows that the chosen expert took part in
      for (let row = 0; this.weights && row < this.count; row++) {
        if (!kinds.has(kind[row]) || (test && !test[label[row]])) continue;
        if (bySize && !sizes.has(this.sizeBin[row])) continue;
        const weight = this.weights[row * experts + this.expert];
        if (weight === NO_WEIGHT) continue;
        this.matching.push(row);
        if (weight > 0) this.rows.push(row);
      }
      this.wallRows = this.ranked(this.rows.filter((row) => this.cropOf.has(row)));
      this.shown = this.page();
      this.drawWall();
      this.drawHistograms();
    }

    steps(row, expert = this.expert) { return this.weights[row * this.width + expert]; }

    /* Highest weight first; of equal ones one row of every image, then a second one; then by score. */
    ranked(rows) {
      const { image, score } = this.columns;
      const points = (row) => (score[row] === NO_WEIGHT ? -1 : score[row]);
      const byScore = (a, b) => points(b) - points(a) || a - b;
      const byWeight = (a, b) => this.steps(b) - this.steps(a);
      const sorted = [...rows].sort((a, b) => byWeight(a, b) || image[a] - image[b] || byScore(a, b));
      const repeat = new Map();
      sorted.forEach((row, i) => {
        const last = sorted[i - 1];
        const again = i > 0 && image[last] === image[row] && this.steps(last) === this.steps(row);
        repeat.set(row, again ? repeat.get(last) + 1 : 0);
      });
      return sorted.sort((a, b) => byWeight(a, b) || repeat.get(a) - repeat.get(b) || byScore(a, b));
    }

    mainExpert(row) {
      let best = -1;
      for (let e = 0, most = 0; this.weights && e < this.width; e++) {
        const weight = this.steps(row, e);
        if (weight !== NO_WEIGHT && weight > most) [best, most] = [e, weight];
      }
      return best;
    }

    className(label) { return String(this.classes[label] ?? `class ${label}`); }

    /* "cat, wrong (a dog), score 0.91" */
    describe(row) {
      const { label, true_label: truth, kind, score } = this.columns;
      const other = kind[row] === 1 && truth[row] >= 0 && truth[row] !== label[row] ? ` (true: ${this.className(truth[row])})` : '';
      const points = score[row] === NO_WEIGHT ? '' : `, score ${(score[row] / WEIGHT_STEPS).toFixed(2)}`;
      return `${this.className(label[row])}, ${KINDS[kind[row]]}${other}${points}`;
    }

    // The wall -----------------------------------------------------------------------------------

    page() { return this.$('.explore').clientWidth < 900 ? WALL_PAGE.narrow : WALL_PAGE.wide; }

    tiles() { return this.$$('.tile'); }

    focusTile(index) {
      const tiles = this.tiles();
      tiles.forEach((tile, i) => { tile.tabIndex = i === index ? 0 : -1; });
      if (tiles[index]) tiles[index].focus();
    }

    drawWall() {
      const shown = this.wallRows.slice(0, this.shown);
      const noun = this.detection ? 'object' : 'image';
      this.$('.wall-title').textContent = `What expert ${this.number()} works on`;
      this.$('.wall').replaceChildren(...shown.map((row, i) => this.tile(row, i)));
      this.$('.wall').hidden = !shown.length;
      this.$('.wall-hint').hidden = !shown.length;
      this.$('.more').hidden = this.wallRows.length <= this.shown;
      const count = this.$('.count');
      count.hidden = !this.weights;
      count.replaceChildren(element('b', {}, `${whole(shown.length)} of ${whole(this.rows.length)} shown`));
      if (this.wallRows.length < this.rows.length) {
        count.append(` · pictures are stored for ${whole(this.wallRows.length)}`);
      }
      const { kept, all } = this.payload.rows;
      if (kept < all) count.append(` · from a sample of ${whole(kept)} of all ${whole(all)} ${noun}s`);

      count.append(this.hangsOn());
      this.$('.empty').hidden = shown.length > 0;
      this.$('.empty-reset').hidden = !this.weights || !filtersActive();
      const dead = this.layer.dead_experts.includes(this.expert);
      this.$('.empty-text').textContent = !this.weights
        ? `Decisions of this layer do not belong to single ${noun}s. Its statistics are below.`
        : this.rows.length
          ? `${plural(this.rows.length, noun)} ${this.rows.length === 1 ? 'matches' : 'match'}, but none of their pictures is stored.`
          : dead ? `Expert ${this.number()} is never chosen.`
            : filtersActive() ? `No ${noun} of expert ${this.number()} matches these filters.` : `Expert ${this.number()} took part in no ${noun}.`;
    }

    /* What zeroing the chosen expert does, where that was measured. */
    hangsOn() {
      const found = this.layer.polysemanticity;
      const i = found ? found.experts.indexOf(this.number()) : -1;
      if (i < 0) return '';
      if (found.classes[i] === null) return ' · zeroed, no class gets worse';
      return ` · zeroed, class ${found.classes[i]} loses ${(100 * found.drops[i]).toFixed(1)} points; polysemanticity ${found.values[i].toFixed(2)}`;
    }

    tile(row, index) {
      const { label, kind, image, size } = this.columns;
      const weight = weightText(this.steps(row));
      const pixels = this.sizeBin[row] < 0 ? '' : `, ${Math.round(size[row])} px`;
      const picture = element('span', { class: 'picture' },
        element('img', { src: jpeg(this.payload.pool.crops[this.cropOf.get(row)]), alt: '', decoding: 'async', draggable: false }),
        ...this.outline(row),
        element('span', { class: 'kind', 'aria-hidden': 'true' }, SYMBOLS[kind[row]]));
      return element('li', {}, element('button', {
        type: 'button', class: 'tile', tabIndex: index ? -1 : 0, 'data-row': row,
        'aria-label': `${this.describe(row)}, weight ${weight}${pixels}, image ${image[row]}`,
        title: `${this.describe(row)}${pixels}`,
      }, picture, element('span', { class: 'name' }, this.className(label[row])), element('span', { class: 'numbers' }, `weight ${weight}`)));
    }

    /* The object's box, in a crop that is shown whole in a square tile. */
    outline(row) {
      if (this.sizeBin[row] < 0) return [];
      const [left, top, right, bottom] = this.regions.subarray(4 * this.cropOf.get(row), 4 * this.cropOf.get(row) + 4);
      const side = Math.max(right - left, bottom - top);
      const [x0, y0] = [(left + right - side) / 2, (top + bottom - side) / 2];
      const [x1, y1, x2, y2] = this.columns.box.subarray(4 * row, 4 * row + 4);
      const node = element('span', { class: 'outline' });
      place(node, [x1 - x0, y1 - y0, x2 - x0, y2 - y0], side, side);
      return [node];
    }

    // Histograms ---------------------------------------------------------------------------------

    /* Shares of n bins: of the chosen expert's weight, and of all matching rows. */
    shares(n, binOf) {
      const own = new Array(n).fill(0);
      const all = new Array(n).fill(0);
      for (const row of this.matching) {
        const bin = binOf(row);
        if (!(bin >= 0 && bin < n)) continue;
        own[bin] += this.steps(row);
        all[bin] += 1;
      }
      const [ownTotal, allTotal] = [sum(own), sum(all)];
      return { own: own.map((x) => x / (ownTotal || 1)), all: all.map((x) => x / (allTotal || 1)) };
    }

    drawHistograms() {
      const { size, level, label } = this.columns;
      const show = (name, present, draw) => {
        const card = this.$(`[data-chart="${name}"]`);
        card.hidden = !present;
        if (!present) return;
        const div = $('.chart', card);
        if (this.rows.length) {
          drawSoon(div, () => {
            if (div.classList.contains('no-data')) div.replaceChildren();
            div.classList.remove('no-data');
            draw(div);
          });
          return;
        }
        pending.delete(div);
        if (div.data) Plotly.purge(div);
        div.removeAttribute('role');
        div.removeAttribute('aria-label');
        div.style.height = '';
        div.classList.add('no-data');
        div.textContent = 'Nothing to count.';
      };
      const some = Boolean(this.weights);
      show('size', some && this.hasSizes, (div) => this.drawSizes(div, this.shares(sizes.count, (row) => sizes.binOf(size[row]))));
      show('level', some && this.levels > 1, (div) => this.drawLevels(div, this.shares(this.levels, (row) => level[row])));
      show('class', some, (div) => this.drawClasses(div, this.shares(this.classes.length, (row) => label[row])));
      this.$('.histograms').hidden = !some;
    }

    bars() { return { color: expertColour(this.number()), line: { color: theme('soft'), width: 0.5 } }; }

    /* Steps over the whole width of every bin. */
    reference(centres, shares, width) {
      return {
        type: 'scatter', mode: 'lines', x: [...centres.map((c) => c - width / 2), centres.at(-1) + width / 2], y: [...shares, shares.at(-1)],
        line: { shape: 'hv', color: theme('reference'), width: 1.5 }, hoverinfo: 'skip',
      };
    }

    drawSizes(div, { own, all }) {
      const centres = range(sizes.count).map((i) => sizes.low + (i + 0.5) * sizes.width);
      const limits = SIZE_LIMITS.map(Math.log2);
      const high = sizes.low + sizes.count * sizes.width;
      const edges = [sizes.low, ...limits, high];
      const spans = centres.map((c) => `${Math.round(2 ** (c - sizes.width / 2))} to ${Math.round(2 ** (c + sizes.width / 2))} px`);
      const top = spans[own.indexOf(Math.max(...own))];
      plot(div, [
        { type: 'bar', x: centres, y: own, width: sizes.width * 0.92, marker: this.bars(), customdata: spans, hovertemplate: '%{customdata}: %{y:.1%} of the weight, %{text} of all<extra></extra>', text: all.map((x) => percent(x)), textposition: 'none' },
        this.reference(centres, all, sizes.width),
      ], {
        height: 230,
        margin: { t: 22 },
        xaxis: {
          title: 'object size in px', range: [sizes.low, high], showgrid: false, zeroline: false,
          tickvals: range(12).map((i) => i + 1), ticktext: range(12).map((i) => String(2 ** (i + 1))),
        },
        yaxis: shareAxis('share'),
        shapes: limits.filter((x) => x > sizes.low && x < high).map((x) => ({
          type: 'line', x0: x, x1: x, y0: 0, y1: 1, yref: 'paper', line: { color: theme('soft'), width: 1, dash: 'dot' },
        })),
        annotations: ['small', 'medium', 'large'].map((text, i) => {
          const from = Math.max(edges[i], sizes.low);
          const to = Math.min(edges[i + 1], high);
          return { text, from, to, x: (from + to) / 2, y: 1, yref: 'paper', yanchor: 'bottom', showarrow: false, font: { size: 12, color: theme('soft') } };
        }).filter(({ from, to }) => to - from > 0.14 * (high - sizes.low)).map(({ from, to, ...annotation }) => annotation),
      }, `Object sizes of expert ${this.number()}: most weight at ${top}.`);
    }

    levelNames() {
      for (const attributes of Object.values(this.layer.associations)) {
        const bins = attributes.level?.bins;
        if (bins?.length === this.levels) return bins.map(String);
      }
      return range(this.levels).map((i) => `level ${i}`);
    }

    drawLevels(div, { own, all }) {
      const names = this.levelNames();
      plot(div, [
        { type: 'bar', x: range(this.levels), y: own, width: 0.7, marker: this.bars(), customdata: names.map(chartText), hovertemplate: '%{customdata}: %{y:.1%} of the weight, %{text} of all<extra></extra>', text: all.map((x) => percent(x)), textposition: 'none' },
        this.reference(range(this.levels), all, 1),
      ], {
        height: 200,
        xaxis: { title: 'pyramid level', tickvals: range(this.levels), ticktext: names.map(chartText), showgrid: false, zeroline: false, range: [-0.6, this.levels - 0.4] },
        yaxis: shareAxis('share'),
      }, `Levels of expert ${this.number()}: most weight on ${names[own.indexOf(Math.max(...own))]}.`);
    }

    drawClasses(div, { own, all }) {
      let order = range(own.length);
      if (order.length > CLASSES_IN_CHART) {
        order = order.sort((a, b) => own[b] - own[a] || a - b).slice(0, CLASSES_IN_CHART);
      }
      const rest = own.length - order.length;
      const names = order.map((label) => this.className(label));
      const values = order.map((label) => own[label]);
      const texts = names.map((name) => shortened(name, 20));
      const reference = order.map((label) => all[label]);
      const left = (shown) => percent(Math.max(1 - sum(shown), 0));
      $('.note', div.parentElement).textContent = rest
        ? `${plural(rest, 'other class').replace('classs', 'classes')}: ${left(values)} of the weight, ${left(reference)} of all.` : '';
      plot(div, [
        { type: 'bar', orientation: 'h', y: range(names.length), x: values, width: 0.74, marker: this.bars(), customdata: names.map(chartText), hovertemplate: '%{customdata}: %{x:.1%} of the weight<extra></extra>' },
        { type: 'scatter', mode: 'markers', y: range(names.length), x: reference, marker: { symbol: 'line-ns-open', size: 15, line: { width: 2 }, color: theme('reference') }, customdata: names.map(chartText), hovertemplate: '%{customdata}: %{x:.1%} of all<extra></extra>' },
      ], {
        height: 20 * names.length + 62,
        xaxis: shareAxis('share'),
        yaxis: { tickvals: range(names.length), ticktext: texts.map(chartText), range: [names.length - 0.4, -0.6], showgrid: false, zeroline: false },
      }, `Classes of expert ${this.number()}: most weight on ${names[values.indexOf(Math.max(...values))]}.`);
    }

    // The whole layer ----------------------------------------------------------------------------

    drawOverview() {
      this.$('.layer-name').textContent = this.layerName;
      const dense = this.layer.kind === 'factorised';
      this.$('.load-hint').textContent = dense ? 'Load: share of the coefficients above 0. Importance: mean coefficient.' : 'Load: share of the choices that fall on an expert. Importance: share of the weight.';
      this.$('.coactivation-hint').textContent = dense ? 'Share of the decisions in which both coefficients are above 0; the diagonal: above 0 at all.' : 'Share of the decisions in which both experts are chosen; the diagonal: chosen at all.';
      drawSoon(this.chart('load'), () => this.drawLoad());
      drawSoon(this.chart('coactivation'), () => this.drawCoactivation());
      this.$('[data-chart="history"]').hidden = !this.layer.history;
      const sources = SOURCES.filter((source) => Object.values(this.layer.associations[source] || {}).some((a) => a.table));
      const select = this.$('.source');
      const before = select.value;
      select.replaceChildren(...sources.map((source) => element('option', { value: source }, this.counted(source))));
      if (sources.includes(before)) select.value = before;
      this.$('.association-settings').hidden = !sources.length;
      this.drawHeatMaps();
      this.drawAssociations();
      this.drawInterventions();
    }

    counted(source) {
      return { objects: this.detection ? 'every object' : 'every image', detections: 'every matched detection', decisions: 'every decision' }[source];
    }

    drawLoad() {
      const { load, importance, num_experts: experts } = this.layer;
      const numbers = this.numbers();
      const bar = (name, y, color) => ({ type: 'bar', name, x: numbers, y, marker: { color }, hovertemplate: `expert %{x}: ${name} %{y:.1%}<extra></extra>` });
      plot(this.chart('load'), [bar('load', load, theme('bar')), bar('importance', importance, '#E69F00')], {
        height: 270,
        margin: { t: 34 },
        showlegend: true,
        legend: { orientation: 'h', x: 0, y: 1.02, yanchor: 'bottom' },
        bargap: 0.3,
        xaxis: expertAxis(numbers, this.chart('load')),
        yaxis: shareAxis('share'),
        shapes: [{ type: 'line', xref: 'paper', x0: 0, x1: 1, y0: 1 / experts, y1: 1 / experts, line: { color: theme('soft'), width: 1.5, dash: 'dot' } }],
      }, `Load of the experts: ${load.map((x, e) => `${numbers[e]}: ${percent(x)}`).join(', ')}.`);
    }

    drawCoactivation() {
      const numbers = this.numbers();
      heatMap(this.chart('coactivation'), this.layer.tables.coactivation, numbers, numbers, {
        rowTitle: 'expert', square: true,
        hover: 'experts %{y} and %{x}: %{z:.1%} of the decisions',
        description: 'Share of the decisions in which two experts are chosen together.',
      });
    }

    drawHistory() {
      const { step } = this.layer.history;
      const experts = this.width;
      // Of many lines only that of the chosen expert can be followed; it is drawn last.
      const few = experts <= 8;
      const order = range(experts).sort((a, b) => (few ? 0 : (a === this.expert) - (b === this.expert)));
      this.$('.history-hint').textContent = few ? '' : ` Coloured: expert ${this.number()}.`;
      plot(this.chart('history'), order.map((expert) => ({
        type: 'scatter', mode: 'lines', name: `expert ${this.number(expert)}`, x: step, y: this.layer.tables.history.map((row) => row[expert]),
        line: few || expert === this.expert ? { color: expertColour(this.number(expert)), width: 2 } : { color: theme('rule'), width: 1 },
        hovertemplate: `expert ${this.number(expert)}, step %{x}: %{y:.1%}<extra></extra>`,
      })), {
        height: 270,
        margin: { t: few ? 34 : 8 },
        showlegend: few,
        legend: { orientation: 'h', x: 0, y: 1.02, yanchor: 'bottom' },
        xaxis: { title: 'training step', showgrid: false, zeroline: false, nticks: 7 },
        yaxis: shareAxis('load'),
      }, 'Load of the experts over the training.');
    }

    drawHeatMaps() {
      const attributes = this.layer.associations[this.$('.source').value] || {};
      const byExpert = this.$('.direction').value === 'expert';
      const present = Object.keys(ATTRIBUTES).filter((attribute) => attributes[attribute]?.table);
      this.$('.heat-maps').classList.toggle('single', present.length === 1);
      for (const card of this.$$('[data-chart="heat"]')) {
        const attribute = card.dataset.attribute;
        const association = attributes[attribute];
        card.hidden = !association?.table;
        if (card.hidden) continue;
        const noun = ATTRIBUTES[attribute];
        const button = $('.all-classes', card);
        const many = association.bins.length > CLASSES_IN_HEAT_MAP;
        const open = button.getAttribute('aria-expanded') === 'true';
        button.hidden = !many;
        button.textContent = open ? `Show the ${CLASSES_IN_HEAT_MAP} most telling` : `Show all ${association.bins.length}`;
        const rows = many && !open ? mostTelling(association.table).slice(0, CLASSES_IN_HEAT_MAP) : range(association.bins.length);
        const unit = association.unit ? `, in ${association.unit}` : '';
        $('.hint', card).textContent = `${byExpert ? `Share of each expert’s weight by ${noun}${unit}; columns sum to 1.` : `Share of each ${noun}${unit} by expert; rows sum to 1.`} `
          + `${many && !open ? 'Those that tell most about the experts. ' : ''}${inWords(association)}`;
        drawSoon($('.chart', card), () => {
          const shares = byExpert ? columnShares(association.table) : association.table.map(normalised);
          heatMap($('.chart', card), rows.map((i) => shares[i]), rows.map((i) => String(association.bins[i])), this.numbers(), {
            hover: byExpert ? 'expert %{x}: %{z:.1%} of its weight on %{customdata}' : '%{customdata}: %{z:.1%} by expert %{x}',
            description: `Experts and ${noun}. ${inWords(association)}`,
          });
        });
      }
    }

    drawAssociations() {
      const rows = [];
      for (const source of SOURCES) {
        for (const [attribute, a] of Object.entries(this.layer.associations[source] || {})) {
          const clear = a.p_value !== null && a.p_value <= 0.05;
          rows.push([clear ? '' : 'muted',
            [ATTRIBUTES[attribute] || attribute, this.counted(source), fixed(a.mi), a.mi_max ? percent(a.mi / a.mi_max) : '–', fixed(a.chance), pValue(a),
              whole(a.num_units), clear ? 'more than chance' : 'within chance']]);
        }
      }
      this.$('.associations').hidden = !rows.length;
      this.$('.associations .table-scroll').replaceChildren(table(
        ['Attribute', 'Counted', 'Information (nats)', 'of the maximum', 'by chance (nats)', 'p', 'decisions', 'reads as'], rows, [1, 7],
      ));
    }

    drawInterventions() {
      const base = this.payload.metrics;
      const names = Object.keys(base);
      const mine = this.payload.interventions.filter((i) => i.layer === this.layerName || i.layer === 'all');
      const title = { only: (e) => `only expert ${e}`, without: (e) => `without expert ${e}`, zeroed: (e) => `expert ${e} zeroed`, equal: () => 'all experts, equal weights', random: () => 'random experts' };
      const rows = mine.map((i) => ['', [
        (title[i.kind] ? title[i.kind](i.expert) : i.kind) + (i.layer === 'all' ? ' (all layers)' : ''),
        ...names.map((name) => difference(i.metrics?.[name], base[name])),
      ]]);
      const all = this.layer.polysemanticity?.num_zeroed || 0;
      const zeroed = mine.filter((i) => i.kind === 'zeroed').length;
      this.$('.zeroed-hint').textContent = zeroed < all ? ` Of the ${whole(all)} experts that were zeroed, the ${zeroed} that cost most.` : '';
      this.$('.interventions').hidden = !rows.length;
      rows.unshift(['base', ['unchanged', ...names.map((name) => fixed(base[name]))]]);
      this.$('.interventions .table-scroll').replaceChildren(table(['Routing', ...names], rows, []));
    }
  }

  // Tables ---------------------------------------------------------------------------------------

  const normalised = (row) => { const total = sum(row); return row.map((x) => (total ? x / total : 0)); };

  function columnShares(rows) {
    const totals = rows[0].map((_, e) => sum(rows.map((row) => row[e])));
    return rows.map((row) => row.map((x, e) => (totals[e] ? x / totals[e] : 0)));
  }

  /* Bins by what they contribute to the mutual information, most first. */
  function mostTelling(rows) {
    const experts = normalised(rows[0].map((_, e) => sum(rows.map((row) => row[e]))));
    const gain = rows.map((row) => sum(normalised(row).map((p, e) => (p ? p * Math.log(p / experts[e]) : 0))) * sum(row));
    return range(rows.length).sort((a, b) => gain[b] - gain[a] || a - b);
  }

  function pValue({ p_value: p, permutations }) {
    if (p === null || p === undefined) return '–';
    return permutations && p <= 1.0001 / (permutations + 1) ? `≤ ${fixed(p)}` : fixed(p);
  }

  const inWords = (a) => `Mutual information ${fixed(a.mi)} nats, p\u00a0${pValue(a).replace(/^(?!≤)/, '= ').replace(' ', '\u00a0')}.`;

  function difference(value, base) {
    if ([value, base].some((x) => x === null || x === undefined)) return '–';
    const text = Math.abs(value - base).toFixed(3);
    return text === '0.000' ? text : `${value > base ? '+' : '−'}${text}`;
  }

  function table(titles, rows, textColumns) {
    const kind = (i) => (textColumns.includes(i) ? 'text' : '');
    return element('table', {},
      element('thead', {}, element('tr', {}, ...titles.map((title, i) => element('th', { scope: 'col', class: kind(i) }, title)))),
      element('tbody', {}, ...rows.map(([style, cells]) => element('tr', { class: style }, ...cells.map((cell, i) => (
        i ? element('td', { class: kind(i) }, cell) : element('th', { scope: 'row' }, cell)))))));
  }

  // The whole image ------------------------------------------------------------------------------

  const jpeg = (data) => `data:image/jpeg;base64,${data}`;

  function place(node, [x1, y1, x2, y2], width, height) {
    node.style.left = `${(100 * x1) / width}%`;
    node.style.top = `${(100 * y1) / height}%`;
    node.style.width = `${(100 * (x2 - x1)) / width}%`;
    node.style.height = `${(100 * (y2 - y1)) / height}%`;
  }

  const viewer = {
    dialog: $('#viewer'),

    listen() {
      const { dialog } = this;
      $('#viewer-close').addEventListener('click', () => dialog.close());
      $('#viewer-previous').addEventListener('click', () => this.show(this.index - 1));
      $('#viewer-next').addEventListener('click', () => this.show(this.index + 1));
      dialog.addEventListener('click', (event) => { if (event.target === dialog) dialog.close(); });
      dialog.addEventListener('keydown', (event) => {
        if (event.ctrlKey || event.metaKey || event.altKey) return;
        if (event.key === 'ArrowLeft' || event.key === 'ArrowRight') {
          event.preventDefault();
          this.show(this.index + (event.key === 'ArrowLeft' ? -1 : 1));
          return;
        }
        const entries = $$('.entry', dialog);
        const index = entries.indexOf(document.activeElement);
        const target = stepped(event, index, entries.length, 1);
        if (target === null) return;
        event.preventDefault();
        entries[index].tabIndex = -1;
        entries[target].tabIndex = 0;
        entries[target].focus();
      });
      dialog.addEventListener('close', () => {
        // Back to the tile of the image that was looked at last.
        if (this.index >= this.run.shown) {
          this.run.shown = this.index + 1;
          this.run.drawWall();
        }
        this.run.focusTile(this.index);
      });
      for (const type of ['mouseover', 'mouseout', 'focusin', 'focusout']) {
        $('.viewer-body').addEventListener(type, (event) => this.point(event.type.endsWith('out') ? null : event.target.closest('[data-row]')));
      }
      $('.stage').addEventListener('click', (event) => {
        const box = event.target.closest('.box');
        if (box) $(`.entry[data-row="${box.dataset.row}"]`, dialog).focus();
      });
    },

    open(run, index) {
      this.run = run;
      this.dialog.showModal();
      this.show(index);
      $('#viewer-close').focus();
      this.dialog.scrollTop = 0;
    },

    show(index) {
      const { run } = this;
      if (index < 0 || index >= run.wallRows.length) return;
      this.index = index;
      const row = run.wallRows[index];
      const image = run.columns.image[row];
      const [width, height, data] = run.payload.pool.images[image];
      const rows = range(run.count).filter((i) => run.columns.image[i] === image);
      // The clicked one on top of the list, then by score; missed objects last.
      const points = (i) => (run.columns.score[i] === NO_WEIGHT ? -1 : run.columns.score[i]);
      rows.sort((a, b) => (b === row) - (a === row) || points(b) - points(a) || a - b);

      const missed = rows.filter((i) => run.columns.kind[i] === 2).length;
      $('#viewer-title').textContent = `Image ${image}`;
      $('#viewer-hint').textContent = `${width} × ${height} px. Colour and number: main expert in ${run.layerName}.${missed ? ' Dashed: missed.' : ''}`;
      $('#viewer-list-title').textContent = run.detection
        ? plural(rows.length - missed, 'detection') + (missed ? `, ${plural(missed, 'missed object')}` : '')
        : 'Prediction';
      $('#viewer-previous').disabled = index === 0;
      $('#viewer-next').disabled = index === run.wallRows.length - 1;

      const stage = $('.stage');
      const picture = $('img', stage);
      picture.src = jpeg(data);
      picture.alt = `Image ${image}; what was found in it is listed beside it.`;
      stage.style.aspectRatio = `${width} / ${height}`;
      stage.style.width = `min(100%, 960px, (100vh - 150px) * ${width / height})`;
      stage.classList.remove('pointing');
      $$('.box', stage).forEach((box) => box.remove());
      // Large boxes first, so that small ones lie above them and can be pointed at.
      const boxes = rows.filter((i) => run.sizeBin[i] >= 0).sort((a, b) => run.columns.size[b] - run.columns.size[a]);
      stage.append(...boxes.map((i) => this.box(i, i === row, width, height)));
      $('.viewer-list ul').replaceChildren(...rows.map((i, place) => this.entry(i, i === row, place)));
      $('.viewer-list ul').scrollTop = 0;
    },

    box(row, chosen, width, height) {
      const { run } = this;
      const expert = run.mainExpert(row);
      const colour = expert < 0 ? '#7A7A7A' : expertColour(run.number(expert));
      const [x1, y1, x2, y2] = run.columns.box.subarray(4 * row, 4 * row + 4);
      const style = [chosen && 'chosen', run.columns.kind[row] === 2 && 'missed', y1 < 0.06 * height && 'at-top', x1 > 0.93 * width && 'at-right'];
      const node = element('div', { class: ['box', ...style.filter(Boolean)].join(' '), 'data-row': row, 'aria-hidden': 'true' },
        element('span', { class: 'tag' }, expert < 0 ? '–' : String(run.number(expert))));
      node.style.setProperty('--colour', colour);
      node.style.setProperty('--on-colour', textOn(colour));
      place(node, [x1, y1, Math.min(x2, width), Math.min(y2, height)], width, height);
      return node;
    },

    entry(row, chosen, place) {
      const { run } = this;
      const experts = range(run.width)
        .map((e) => [e, run.steps(row, e)])
        .filter(([, weight]) => weight !== NO_WEIGHT && weight > 0)
        .sort((a, b) => b[1] - a[1] || a[0] - b[0]);
      const named = experts.slice(0, 6).map(([e, weight]) => `expert ${run.number(e)}: ${weightText(weight)}`);
      if (experts.length > 6) named.push(`${experts.length - 6} more`);
      const pixels = run.sizeBin[row] < 0 ? '' : ` · ${Math.round(run.columns.size[row])} px`;
      return element('li', { class: chosen ? 'entry chosen' : 'entry', 'data-row': row, tabIndex: place ? -1 : 0 },
        badge(run.number(run.mainExpert(row))),
        element('span', { class: 'what' }, `${SYMBOLS[run.columns.kind[row]]} ${run.describe(row)}`),
        element('span', { class: 'weights' }, (named.join(' · ') || 'no expert known') + pixels));
    },

    point(node) {
      $('.stage').classList.toggle('pointing', Boolean(node) && $(`.box[data-row="${node.dataset.row}"]`, this.dialog) !== null);
      for (const other of $$('[data-row]', this.dialog)) {
        other.classList.toggle('pointed', Boolean(node) && other.dataset.row === node.dataset.row);
      }
    },
  };

  // Filters and the start ------------------------------------------------------------------------

  const form = $('#filters');
  const ticked = (name) => new Set($$(`input[name="${name}"]:checked`, form).map((input) => Number(input.value)));
  const readFilters = () => ({ sizes: ticked('size'), kinds: ticked('kind'), klass: form.elements.class.value });
  const filtersActive = () => form.elements.class.value !== '' || $$('input', form).some((input) => !input.checked);

  /* Bins of half an octave, the same ones for all runs. */
  const sizes = {
    width: 0.5,
    fit(runs) {
      let [low, high] = [Infinity, -Infinity];
      for (const run of runs) {
        for (const size of run.columns.size) {
          if (size >= 1) [low, high] = [Math.min(low, size), Math.max(high, size)];
        }
      }
      this.low = Number.isFinite(low) ? Math.floor(2 * Math.log2(low)) / 2 : 2;
      const end = Number.isFinite(high) ? Math.ceil(2 * Math.log2(high)) / 2 : 9;
      this.count = Math.max(Math.round((end - this.low) / this.width), 4);
    },
    binOf(size) {
      if (Number.isNaN(size)) return -1;
      const bin = Math.floor((Math.log2(Math.max(size, 1)) - this.low) / this.width);
      return Math.min(Math.max(bin, 0), this.count - 1);
    },
  };

  const nextFrame = () => new Promise((resolve) => { requestAnimationFrame(() => resolve()); });

  async function start() {
    if (typeof DecompressionStream === 'undefined') {
      throw new Error('This browser is too old for the report; Chrome 113, Firefox 121 or Safari 17 will do.');
    }
    const runs = $$('.run').map((root) => {
      const script = $(`#payload-${root.dataset.run}`);
      const payload = JSON.parse(script.textContent);
      script.remove(); // a second copy of megabytes
      return new Run(payload, root);
    });
    await Promise.all(runs.map((run) => run.load()));
    sizes.fit(runs);
    const refresh = () => runs.forEach((run) => run.refresh());
    form.addEventListener('change', refresh);
    form.addEventListener('reset', () => setTimeout(refresh));
    form.addEventListener('submit', (event) => event.preventDefault());
    viewer.listen();
    for (const run of runs) await run.start();
    await Promise.all($$('.tile img').map((image) => image.decode().catch(() => {})));
    await nextFrame();
    await nextFrame();
    startPlotly();
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => runs.forEach((run) => {
      if (!run.layer) return;
      run.drawHistograms();
      run.drawOverview();
    }));
    addEventListener('beforeprint', () => [...pending.keys()].forEach(drawPending));
    await nextFrame();
    document.documentElement.dataset.ready = String(Math.round(performance.now()));
  }

  start().catch((error) => {
    $('#failure').textContent = `The report could not be shown: ${error.message}`;
    $('#failure').hidden = false;
    throw error;
  });
})();
