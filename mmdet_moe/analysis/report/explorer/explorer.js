/* The Expert Explorer. Reads the payloads (see payload.py) and draws; asks no network for anything.
 *
 * A run's outcomes are columns: typed arrays of n rows, objects and detections (see outcomes.py), of
 * which the page counts one population at a time. Weights, uint8 (n, E) by layer, are inflated
 * when their layer is first chosen. Class names come from users: they go into the page as text, and
 * into charts, which know a little HTML, through `chartText`.
 */
'use strict';

(() => {
  const NO_WEIGHT = 255;
  const WEIGHT_STEPS = 254;
  const FINE = 257; // small weights travel in finer steps, see packing.py
  const KINDS = JSON.parse(document.querySelector('#kinds').textContent);
  const [CORRECT, CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, MISSED] = KINDS.keys();
  const TAGS = ['✓', 'cls', 'loc', 'both', 'dup', 'bkg', 'miss'];
  const KINDS_OF = {
    images: [CORRECT, CLASSIFICATION],
    objects: [CORRECT, CLASSIFICATION, LOCALISATION, MISSED],
    detections: [CORRECT, CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND],
  };
  const SIZE_LIMITS = [32, 96];
  const WALL_PAGE = { narrow: 24, wide: 48 };
  const CLASSES_IN_CHART = 12;
  const CLASSES_IN_HEAT_MAP = 24;
  const CROWDED = 12;
  const ROWS = 4096; // of an image in a random order, see pool.py
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
    const bytes = Uint8Array.fromBase64?.(data) ?? Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
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

  /* A row's place in a random order: the same as random_keys in pool.py. */
  function hashed(x) {
    x = Math.imul(x ^ (x >>> 16), 0x7feb352d);
    x = Math.imul(x ^ (x >>> 15), 0x846ca68b);
    return (x ^ (x >>> 16)) >>> 0;
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

  /* `scale`: {low, high, colours}, the same for all maps of a kind. */
  function heatMap(div, table, names, numbers, { texts, scale, rowTitle, hover, description, square }) {
    const experts = numbers.length;
    const rowHeight = square ? Math.max(8, Math.min(40, 300 / experts)) : Math.max(18, Math.min(30, 200 / names.length));
    const narrow = div.clientWidth < 420;
    plot(div, [{
      type: 'heatmap',
      z: table,
      x: numbers,
      y: square ? numbers : range(names.length),
      zmin: scale.low,
      zmax: scale.high,
      colorscale: scale.colours.map((name, i) => [i / (scale.colours.length - 1), theme(name)]),
      xgap: experts > 24 ? 0 : 1,
      ygap: names.length > 40 ? 0 : 1,
      text: texts,
      customdata: table.map((row, i) => row.map(() => chartText(names[i]))),
      hovertemplate: `${hover}<extra></extra>`,
      texttemplate: experts <= (narrow ? 5 : 10) ? '%{text}' : '',
      textfont: { size: 12 },
      showscale: false,
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

  const COLUMNS = ['image', 'is_detection', 'box', 'label', 'true_label', 'score', 'kind', 'partner', 'iou', 'loss', 'size', 'level'];
  const ATTRIBUTES = {
    class: 'class', superclass: 'superclass', cluster: 'hidden cluster', dataset: 'data set', level: 'pyramid level', size: 'object size', size_coco: 'COCO size', position: 'position in the image', image: 'image',
  };
  const SHARES = { low: 0, high: 1, colours: ['heat-low', 'heat-mid', 'heat-high'] };
  /* log2 of how many times as much as if the two were independent */
  const LIFTS = { low: -2, high: 2, colours: ['less', 'even', 'more'] };
  const SIGNIFICANT = 0.05;
  const MIN_SHARE = 0.02; // of the possible information; less is nothing, as in verdict.py
  const DEFAULT_SORTING = { by: 'weight', descending: true, seed: 0, least: 0 };

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
      const { image, size, level, is_detection: isDetection, label, true_label: truth } = this.columns;
      this.count = size.length;
      this.place = new Int32Array(this.count); // of a row in its image
      for (let row = 1; row < this.count; row++) if (image[row] === image[row - 1]) this.place[row] = this.place[row - 1] + 1;
      // The class that a row counts as.
      this.counted = truth.map((t, row) => (isDetection[row] ? label[row] : t));
      this.sorting = { ...DEFAULT_SORTING };
      this.sizeBin = Int8Array.from(size, (s) => (Number.isNaN(s) ? -1 : s < SIZE_LIMITS[0] ? 0 : s < SIZE_LIMITS[1] ? 1 : 2));
      this.hasSizes = this.sizeBin.some((bin) => bin >= 0);
      this.levels = level.reduce((a, b) => Math.max(a, b), -1) + 1;
      if (this.levels) this.levels = Math.max(this.levels, this.payload.run.num_levels || 0);
    }

    /* Begin with the layer of the address, or the first one that has images to show. */
    async start(wanted) {
      const names = Object.keys(this.payload.layers);
      const layer = names.includes(wanted.layer) ? wanted.layer
        : names.find((name) => this.payload.columns.weights[name]) || names[0];
      if (layer === undefined) return;
      this.setSorting({ ...DEFAULT_SORTING, ...wanted.sorting });
      this.$('.layer').value = layer;
      await this.chooseLayer(layer, wanted.expert);
    }

    setSorting(changes) {
      Object.assign(this.sorting, changes);
      const { by, descending, seed, least } = this.sorting;
      this.$('.sort').value = by;
      this.$('.least').value = least;
      this.$('.seed').value = seed;
      this.$('.seed-field').hidden = by !== 'random';
      const turn = this.$('.turn');
      turn.textContent = by === 'random' ? 'Another sample' : descending ? '↓ highest first' : '↑ lowest first';
    }

    sortBy(changes) {
      this.setSorting(changes);
      this.refresh();
      view.write();
    }

    listen() {
      this.$('.layer').addEventListener('change', (event) => this.chooseLayer(event.target.value).then(view.write));
      this.$('.sort').addEventListener('change', (event) => this.sortBy({ by: event.target.value, descending: true }));
      this.$('.seed').addEventListener('change', (event) => this.sortBy({ seed: Math.abs(Math.trunc(event.target.value)) || 0 }));
      this.$('.least').addEventListener('change', (event) => this.sortBy({ least: Math.min(Math.max(Number(event.target.value) || 0, 0), 1) }));
      this.$('.turn').addEventListener('click', () => this.sortBy(
        this.sorting.by === 'random' ? { seed: this.sorting.seed + 1 } : { descending: !this.sorting.descending },
      ));
      this.$('.csv').addEventListener('click', () => this.download());
      const experts = this.$('.experts');
      experts.addEventListener('click', (event) => {
        const button = event.target.closest('.expert');
        if (!button) return;
        this.chooseExpert(Number(button.dataset.expert));
        view.write();
      });
      experts.addEventListener('keydown', (event) => {
        const target = stepped(event, this.expert, this.width, 1);
        if (target === null) return;
        event.preventDefault();
        this.chooseExpert(target);
        view.write();
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
        this.setSorting({ least: 0 });
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

    async chooseLayer(name, expert = null) {
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
            if (association.marked) association.marks = await unpackTable(association.marked);
          }
        }
      }
      if (turn !== this.turn) return; // another choice came in between
      this.layerName = name;
      this.layer = layer;
      this.weights = packed ? this.inflated[name] : null;
      this.drawExperts();
      this.drawLayerFacts();
      this.drawVerdict();
      this.drawOverview();
      const known = expert !== null && expert >= 0 && expert < this.width;
      this.chooseExpert(known ? expert : layer.load.indexOf(Math.max(...layer.load)));
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
        const note = dead.includes(expert) ? `, ${share ? 'hardly ever' : 'never'} chosen` : '';
        return element('button', {
          type: 'button', class: note ? 'expert dead' : 'expert', role: 'radio', 'data-expert': expert,
          'aria-label': `Expert ${this.number(expert)}, load ${percent(share)}${note}`, title: `Load ${percent(share)}${note}`,
        }, badge(this.number(expert)), element('span', { class: 'load', 'aria-hidden': 'true' }, percent(share)));
      }));
    }

    drawLayerFacts() {
      const { layer } = this;
      const images = this.payload.run.num_images;
      // Of an RoI head, the RoIs are the images of its layers.
      const all = { [images * this.levels]: 'image and pyramid level', [images]: 'image' }[layer.num_decisions] ?? 'item';
      const per = layer.granularity === 'image' ? all : layer.granularity;
      const many = layer.num_dead ?? layer.dead_experts.length;
      const dead = many ? ` Never or hardly ever chosen: ${many > 8 || layer.num_dead ? `${many} experts, shown pale` : `expert ${layer.dead_experts.map((e) => this.number(e)).join(', ')}`}.` : '';
      const dense = layer.kind === 'factorised';
      this.$('.layer-path').textContent = layer.title === this.layerName ? '' : this.layerName;
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

    /* Three lines on the layer; what else is known of it, and of all layers, is folded. */
    drawVerdict() {
      const { verdict } = this.payload;
      const mine = verdict.find(({ layer }) => layer === this.layerName);
      const others = verdict.filter((entry) => entry !== mine);
      const list = (sentences) => sentences.map((sentence) => element('li', {}, sentence));
      const box = this.$('.verdict');
      box.hidden = !verdict.length;
      this.$('.verdict-title').textContent = `Verdict: ${mine ? mine.name : 'no word on this layer'}`;
      this.$('.verdict-lines').replaceChildren(...list(mine ? mine.lines : []));
      const more = [
        ...(mine && mine.details.length ? [['More on this layer', mine.details]] : []),
        ...others.map(({ name, lines, details }) => [name, [...lines, ...details]]),
      ];
      $('details', box).hidden = !more.length;
      $('summary', box).textContent = `More (${plural(sum(more.map(([, said]) => said.length)), 'sentence')})`;
      this.$('.verdict-more').replaceChildren(...more.flatMap(([name, said]) => [element('h4', {}, name), element('ul', {}, ...list(said))]));
    }

    // What the filters let through ---------------------------------------------------------------

    /* 'objects', 'detections' or, of a classifier, 'images' */
    get population() { return this.detection ? form.elements.population.value : 'images'; }

    get noun() { return this.population.slice(0, -1); }

    fileName(image) { return this.payload.files.names[image] ?? ''; }

    /* In the data set, of which --max-images draws a part. */
    imageNumber(image) { return this.payload.run.images?.[image] ?? image; }

    /* Of rows: whether the search finds their class or file. */
    searchTest(text) {
      if (!text) return null;
      const found = new Map();
      const inClass = this.classes.map((name) => String(name).toLowerCase().includes(text));
      const inFile = (image) => {
        if (!found.has(image)) found.set(image, `${this.fileName(image)} ${this.imageNumber(image)}`.toLowerCase().includes(text));
        return found.get(image);
      };
      return (row) => inClass[this.counted[row]] || inFile(this.columns.image[row]);
    }

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
      const { sizes, kinds, klass, search } = readFilters();
      const { kind, is_detection: isDetection } = this.columns;
      const test = this.classTest(klass);
      const found = this.searchTest(search);
      const bySize = this.hasSizes && sizes.size < 3;
      const wanted = Number(this.population === 'detections');
      const experts = this.width;
      this.lowest = Math.max(this.sorting.least * WEIGHT_STEPS, Number.MIN_VALUE);
      this.matching = []; // rows of any expert
      this.rows = []; // rows that the chosen expert took part in
      for (let row = 0; this.weights && row < this.count; row++) {
        if (isDetection[row] !== wanted || !kinds.has(kind[row]) || (test && !test[this.counted[row]])) continue;
        if ((bySize && !sizes.has(this.sizeBin[row])) || (found && !found(row))) continue;
        const weight = this.weights[row * experts + this.expert];
        if (weight === NO_WEIGHT) continue;
        this.matching.push(row);
        if (weight >= this.lowest) this.rows.push(row);
      }
      const { noun } = this;
      for (const node of this.$$('.noun')) node.textContent = `${noun}s`;
      this.$('.class-title').textContent = `Classes (${noun === 'detection' ? 'predicted' : 'true'})`;
      this.refreshWall();
      this.drawHistograms();
    }

    refreshWall() {
      if (!this.layer) return;
      const { image } = this.columns;
      const seen = new Set();
      const first = (row) => !seen.has(image[row]) && seen.add(image[row]);
      const stored = (row) => this.picture(row) !== undefined;
      this.sorted = this.ranked(this.rows);
      if (this.sorting.by === 'random') {
        // One of all rows, so that what has no picture is left out and counted.
        const sample = this.sorted.filter(first);
        this.wallRows = sample.filter(stored);
        const gap = sample.findIndex((row) => !stored(row));
        this.uniform = gap < 0 ? sample.length : gap;
      } else {
        this.wallRows = this.sorted.filter(stored).filter(first);
        this.uniform = 0;
      }
      this.shown = this.page();
      this.drawWall();
    }

    /* The place in the pool of a row's crop; a correct detection has that of its object. */
    picture(row) {
      const { is_detection: isDetection, kind, partner } = this.columns;
      return this.cropOf.get(isDetection[row] && kind[row] === CORRECT ? row + partner[row] : row);
    }

    steps(row, expert = this.expert) { return this.weights[row * this.width + expert]; }

    keys(seed) {
      if (this.keysOf?.seed !== seed) {
        const { image } = this.columns;
        const mask = hashed(seed);
        const keys = Float64Array.from(image, (i, row) => {
          const ofImage = hashed(i ^ mask);
          return ofImage * ROWS + (hashed(ofImage ^ this.place[row]) % ROWS);
        });
        this.keysOf = { seed, keys };
      }
      return this.keysOf.keys;
    }

    /* By what was chosen; equal ones, and a random sample, in random order. */
    ranked(rows) {
      const { by, descending, seed } = this.sorting;
      const { score, size, loss } = this.columns;
      const keys = this.keys(by === 'random' ? seed : 0);
      const value = {
        weight: (row) => this.steps(row), score: (row) => (score[row] === NO_WEIGHT ? null : score[row]), size: (row) => size[row], loss: (row) => loss[row],
      }[by];
      if (!value) return [...rows].sort((a, b) => keys[a] - keys[b]);
      const sign = descending ? -1 : 1;
      const known = rows.filter((row) => value(row) !== null);
      const unknown = rows.filter((row) => value(row) === null); // last either way
      return [...known.sort((a, b) => sign * (value(a) - value(b)) || keys[a] - keys[b]), ...unknown];
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

    scoreText(row) { return (this.columns.score[row] / WEIGHT_STEPS).toFixed(2); }

    iouText(row) { return `IoU ${(this.columns.iou[row] / WEIGHT_STEPS).toFixed(2)}`; }

    /* What became of an object, or of a detection, in words. */
    result(row) {
      const { label, true_label: truth, kind, is_detection: isDetection } = this.columns;
      const k = kind[row];
      if (!this.detection) return k === CORRECT ? `correct, ${this.scoreText(row)}` : `taken for ${this.className(label[row])}, ${this.scoreText(row)}`;
      if (isDetection[row]) {
        const object = truth[row] >= 0 ? this.className(truth[row]) : '';
        return {
          [CORRECT]: () => `correct (true: ${object}), ${this.iouText(row)}`,
          [CLASSIFICATION]: () => `classification: true ${object}, ${this.iouText(row)}`,
          [LOCALISATION]: () => `localisation: ${this.iouText(row)} with ${object}`,
          [BOTH]: () => `class and place: ${this.iouText(row)} with ${object}`,
          [DUPLICATE]: () => `duplicate of a better one on ${object}, ${this.iouText(row)}`,
          [BACKGROUND]: () => 'background: no object there',
        }[k]();
      }
      return {
        [CORRECT]: () => `found, score ${this.scoreText(row)}, ${this.iouText(row)}`,
        [CLASSIFICATION]: () => `taken for ${this.className(label[row])}, score ${this.scoreText(row)}, ${this.iouText(row)}`,
        [LOCALISATION]: () => `badly placed, score ${this.scoreText(row)}, ${this.iouText(row)}`,
        [MISSED]: () => 'missed',
      }[k]();
    }

    /* "cat: taken for dog, score 0.91, IoU 0.80" */
    describe(row) {
      const score = this.columns.is_detection[row] ? ` ${this.scoreText(row)}` : '';
      return `${this.className(this.counted[row])}${score}: ${this.result(row)}`;
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
      const { noun } = this;
      const { by } = this.sorting;
      this.$('.wall-title').textContent = `What expert ${this.number()} works on`;
      this.$('.wall').replaceChildren(...shown.map((row, i) => this.tile(row, i)));
      this.$('.wall').hidden = !shown.length;
      this.$('.wall-hint').hidden = !shown.length;
      this.$('.wall-settings').hidden = !this.weights;
      const csv = this.$('.csv');
      csv.title = `Every matching ${noun} of this expert as a table`;
      csv.textContent = `CSV of ${whole(this.rows.length)}`;
      this.$('.more').hidden = this.wallRows.length <= this.shown;
      const count = this.$('.count');
      count.hidden = !this.weights;
      count.replaceChildren(element('b', {}, `${whole(shown.length)} of ${plural(this.rows.length, noun)} shown`));
      const images = (rows) => new Set(rows.map((row) => this.columns.image[row])).size;
      const stored = images(this.rows.filter((row) => this.picture(row) !== undefined));
      count.append(`${this.detection ? ', one an image' : ''} · pictures of ${whole(stored)} of ${plural(images(this.rows), 'image')}`);
      const { kept, all } = this.payload.rows;
      if (kept < all) count.append(` · from a sample of ${whole(kept)} of all ${whole(all)} rows`);
      const lost = this.payload.pool.unreadable.length;
      if (lost) count.append(` · ${plural(lost, 'image')} could not be read`);
      count.append(this.hangsOn());
      const hints = {
        weight: 'Equal weights in random order.',
        random: this.uniform >= shown.length
          ? `A random sample of the images, one random ${noun} of each.`
          : `The first ${whole(this.uniform)} are a random sample of the images, one random ${noun} of each; of the next ones some have no picture and are left out.`,
        score: noun === 'object' ? 'Score of the detection that finds the object; without one last.' : '',
        size: 'Square root of the box area.',
        loss: {
          object: 'Loss: 1 − score × IoU of the detection that finds it; 1 where none does.',
          detection: 'Loss: 1 − score × IoU if it is correct, its score if it is wrong.',
          image: 'Loss: cross-entropy, −log of the probability of the true class.',
        }[noun],
      };
      this.$('.wall-hint').textContent = `${hints[by]} Arrow keys move, Enter opens the whole image.`;
      this.$('.empty').hidden = shown.length > 0;
      const filtered = filtersActive() || this.sorting.least > 0;
      this.$('.empty-reset').hidden = !this.weights || !filtered;
      const dead = this.layer.load[this.expert] === 0;
      this.$('.empty-text').textContent = !this.weights
        ? `Decisions of this layer do not belong to single ${noun}s. Its statistics are below.`
        : this.rows.length
          ? `${plural(this.rows.length, noun)} ${this.rows.length === 1 ? 'matches' : 'match'}, but none of their pictures is stored.`
          : dead ? `Expert ${this.number()} is never chosen.`
            : filtered ? `No ${noun} of expert ${this.number()} matches these filters.` : `Expert ${this.number()} took part in no ${noun}.`;
    }

    /* The matching rows of the chosen expert as a file, in the order of the wall. */
    download() {
      const { image, box, label, true_label: truth, score, kind, iou, loss, size, level } = this.columns;
      const share = (steps) => (steps === NO_WEIGHT ? '' : (steps / WEIGHT_STEPS).toFixed(3));
      const name = (i) => (i < 0 ? '' : this.className(i));
      const levels = this.levels > 1 ? this.levelNames() : [];
      const columns = {
        image: (row) => this.imageNumber(image[row]),
        file: (row) => this.fileName(image[row]),
        counted: () => this.noun,
        true_class: (row) => name(truth[row]),
        predicted_class: (row) => name(label[row]),
        result: (row) => KINDS[kind[row]],
        score: (row) => share(score[row]),
        loss: (row) => loss[row].toFixed(3),
        expert: () => this.number(),
        weight: (row) => (this.steps(row) / WEIGHT_STEPS).toPrecision(3),
        main_expert: (row) => this.number(this.mainExpert(row)),
        ...(this.detection && {
          iou: (row) => share(iou[row]),
          size_px: (row) => size[row].toFixed(1),
          level: (row) => levels[level[row]] ?? '',
          ...Object.fromEntries(['x1', 'y1', 'x2', 'y2'].map((side, i) => [side, (row) => box[4 * row + i]])),
        }),
      };
      // A spreadsheet computes what begins as a formula; a negative number is none.
      const plain = (value) => (/^[=+\-@\t\r]/.test(value) && Number.isNaN(Number(value)) ? `'${value}` : value);
      const cell = (value) => (/[",\n\r]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value);
      const lines = [Object.keys(columns), ...this.sorted.map((row) => Object.values(columns).map((of) => cell(plain(of(row)))))];
      const url = URL.createObjectURL(new Blob([`${lines.map((line) => line.join(',')).join('\r\n')}\r\n`], { type: 'text/csv' }));
      element('a', { href: url, download: `${this.payload.run.config}_${this.layerName}_expert${this.number()}_${this.noun}s.csv` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 10000);
    }

    /* What zeroing the chosen expert does, where that was measured. */
    hangsOn() {
      const found = this.layer.polysemanticity;
      const i = found ? found.experts.indexOf(this.number()) : -1;
      if (i < 0) return '';
      if (found.classes[i] === null) return ' · zeroed, no class gets worse';
      // Without it, too few images are behind every class to name one.
      const named = found.largest ? `zeroed, class ${found.classes[i]} loses ${(100 * found.drops[i]).toFixed(1)} points; ` : '';
      return ` · ${named}polysemanticity ${found.values[i].toFixed(2)}`;
    }

    tile(row, index) {
      const { label, kind, image, size, loss, score } = this.columns;
      const weight = weightText(this.steps(row));
      const pixels = this.sizeBin[row] < 0 ? '' : `, ${Math.round(size[row])} px`;
      const { by } = this.sorting;
      const sorted = {
        score: score[row] === NO_WEIGHT ? 'no score' : `score ${this.scoreText(row)}`, size: `${Math.round(size[row])} px`, loss: `loss ${loss[row].toFixed(2)}`,
      }[by] ?? `weight ${weight}`;
      const name = this.className(this.counted[row]);
      const taken = kind[row] === CLASSIFICATION && !this.columns.is_detection[row] ? ` → ${this.className(label[row])}` : '';
      const picture = element('span', { class: 'picture' },
        element('img', { src: jpeg(this.payload.pool.crops[this.picture(row)]), alt: '', decoding: 'async', draggable: false }),
        ...this.outline(row),
        element('span', { class: kind[row] === CORRECT ? 'kind' : 'kind wrong', 'aria-hidden': 'true' }, this.detection || kind[row] === CORRECT ? TAGS[kind[row]] : '✗'));
      return element('li', {}, element('button', {
        type: 'button', class: 'tile', tabIndex: index ? -1 : 0, 'data-row': row,
        title: `${this.describe(row)}${pixels}, ${this.fileName(image[row]) || `image ${this.imageNumber(image[row])}`}`,
      }, picture, element('span', { class: 'name' }, `${name}${taken}`), element('span', { class: 'numbers' }, sorted),
      element('span', { class: 'unseen' }, `, ${this.result(row)}, weight ${weight}${pixels}, image ${this.imageNumber(image[row])}`)));
    }

    /* The row's box, in a crop that is shown whole in a square tile. */
    outline(row) {
      if (this.sizeBin[row] < 0) return [];
      const crop = this.picture(row);
      const [left, top, right, bottom] = this.regions.subarray(4 * crop, 4 * crop + 4);
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
        if (this.steps(row) >= this.lowest) own[bin] += this.steps(row);
        all[bin] += 1;
      }
      const [ownTotal, allTotal] = [sum(own), sum(all)];
      return { own: own.map((x) => x / (ownTotal || 1)), all: all.map((x) => x / (allTotal || 1)) };
    }

    drawHistograms() {
      const { size, level } = this.columns;
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
        const note = $('.note', card);
        if (note) note.textContent = '';
      };
      const some = Boolean(this.weights);
      show('size', some && this.hasSizes, (div) => this.drawSizes(div, this.shares(sizes.count, (row) => sizes.binOf(size[row]))));
      show('level', some && this.levels > 1, (div) => this.drawLevels(div, this.shares(this.levels, (row) => level[row])));
      show('class', some, (div) => this.drawClasses(div, this.shares(this.classes.length, (row) => this.counted[row])));
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
      this.$('.layer-name').textContent = this.layer.title;
      const dense = this.layer.kind === 'factorised';
      this.$('.load-hint').textContent = dense ? 'Load: share of the coefficients above 0. Importance: mean coefficient.' : 'Load: share of the choices that fall on an expert. Importance: share of the weight.';
      this.$('.coactivation-hint').textContent = dense ? 'Share of the decisions in which both coefficients are above 0; the diagonal: above 0 at all.' : 'Share of the decisions in which both experts are chosen; the diagonal: chosen at all.';
      drawSoon(this.chart('load'), () => this.drawLoad());
      drawSoon(this.chart('coactivation'), () => this.drawCoactivation());
      const isCompared = Boolean(this.layer.similarity?.weights);
      this.drawIf(this.layer.history, 'history', () => this.drawHistory());
      this.drawIf(isCompared, 'similarity', () => this.drawSimilarity());
      this.drawIf(isCompared, 'tree', () => this.drawTree());
      this.drawAssociated();
      this.drawInterventions();
    }

    /* A chart of what not every layer has. */
    drawIf(known, name, draw) {
      this.$(`[data-chart="${name}"]`).hidden = !known;
      if (known) drawSoon(this.chart(name), draw);
      else pending.delete(this.chart(name)); // of the layer before
    }

    /* What is counted by the population of the page. */
    drawAssociated() {
      const { population } = this;
      this.$('.population').textContent = this.countedAs(population);
      const sources = [population === 'images' ? 'objects' : population, 'decisions']
        .filter((source) => Object.values(this.layer.associations[source] || {}).some((a) => a.table));
      this.$('.source').replaceChildren(...sources.map((source) => element('option', { value: source }, this.countedAs(source).split(',')[0])));
      this.$('.association-settings').hidden = !sources.length;
      this.$('.heat-legend').hidden = !sources.length;
      this.drawHeatMaps();
      this.drawAssociations();
    }

    countedAs(source) {
      return {
        images: 'every image, as its true class',
        objects: this.detection ? 'every object (ground truth), as its true class' : 'every image, as its true class',
        detections: 'every detection, as the predicted class',
        decisions: 'every decision',
      }[source];
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
        texts: this.layer.tables.coactivation.map((row) => row.map(percent)), scale: SHARES,
        rowTitle: 'expert', square: true,
        hover: 'experts %{y} and %{x}: %{z:.1%} of the decisions',
        description: 'Share of the decisions in which two experts are chosen together.',
      });
    }

    drawSimilarity() {
      const { weights, outputs } = this.layer.similarity;
      const between = (matrix) => {
        const values = matrix.flatMap((row, a) => row.filter((value, b) => a !== b && value !== null));
        return values.length ? fixed(values.reduce((sum, value) => sum + value, 0) / values.length) : 'unknown';
      };
      const means = [`cosine of the weights ${between(weights.cosine)}`];
      if (outputs) means.push(`of the outputs ${between(outputs.cosine)}`, `linear CKA ${between(outputs.cka)}`);
      const shown = outputs ? 'Linear CKA of the outputs on the same inputs' : 'Cosine of the weights';
      this.$('.similarity-hint').textContent = `${shown}; 1: the same. Mean of two experts: ${means.join(', ')}.`;
      const table = outputs ? outputs.cka : weights.cosine;
      const numbers = this.numbers();
      heatMap(this.chart('similarity'), table, numbers, numbers, {
        texts: table.map((row) => row.map((value) => (value === null ? '' : value.toFixed(2)))), scale: SHARES,
        rowTitle: 'expert', square: true,
        hover: 'experts %{y} and %{x}: %{z:.3f}',
        description: `${shown} of every two experts.`,
      });
    }

    /* A dendrogram: SciPy's linkage, whose rows join two clusters at a distance. */
    drawTree() {
      const { linkage, linkage_of: of } = this.layer.similarity;
      const count = linkage.length + 1;
      const leaves = [];
      const collect = (cluster) => (cluster < count ? leaves.push(cluster) : linkage[cluster - count].slice(0, 2).forEach(collect));
      collect(2 * count - 2);
      const at = leaves.reduce((found, leaf, i) => ({ ...found, [leaf]: [i, 0] }), {});
      const [x, y] = [[], []];
      linkage.forEach(([one, other, distance], i) => {
        const [[left, low], [right, high]] = [at[one], at[other]];
        x.push(left, left, right, right, null);
        y.push(low, distance, distance, high, null);
        at[count + i] = [(left + right) / 2, distance];
      });
      plot(this.chart('tree'), [{
        type: 'scatter', mode: 'lines', x, y, line: { color: theme('ink'), width: 1.5 }, hovertemplate: '%{y:.3f}<extra></extra>',
      }], {
        height: 270,
        xaxis: { title: 'expert', showgrid: false, zeroline: false, range: [-0.5, count - 0.5], tickvals: range(count), ticktext: leaves.map((leaf) => String(this.number(leaf))) },
        yaxis: { title: of === 'outputs' ? '1 − linear CKA' : '1 − cosine of the weights', rangemode: 'tozero', nticks: 6 },
      }, `Tree of the experts by their ${of}.`);
    }

    drawHistory() {
      const { step } = this.layer.history;
      const experts = this.width;
      // Of many lines only that of the chosen expert can be followed; it is drawn last.
      const few = experts <= 8;
      const order = range(experts).sort((a, b) => (few ? 0 : (a === this.expert) - (b === this.expert)));
      this.$('.history-hint').textContent = few ? '' : ` Coloured: expert ${this.number()}.`;
      plot(this.chart('history'), order.map((expert) => ({
        type: 'scatter', mode: step.length > 1 ? 'lines' : 'markers', name: `expert ${this.number(expert)}`, x: step, y: this.layer.tables.history.map((row) => row[expert]),
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
        if (card.hidden) pending.delete($('.chart', card));
        if (card.hidden) continue;
        const noun = ATTRIBUTES[attribute];
        const button = $('.all-classes', card);
        const many = association.bins.length > CLASSES_IN_HEAT_MAP;
        const open = button.getAttribute('aria-expanded') === 'true';
        button.hidden = !many;
        button.textContent = open ? `Show the ${CLASSES_IN_HEAT_MAP} most telling` : `Show all ${association.bins.length}`;
        const rows = many && !open ? mostTelling(association).slice(0, CLASSES_IN_HEAT_MAP) : range(association.bins.length).filter((i) => sum(association.table[i]) > 0);
        const unit = association.unit ? `, in ${association.unit}` : '';
        $('.hint', card).textContent = `${byExpert ? `Numbers: share of each expert’s weight by ${noun}${unit}; columns sum to 1.` : `Numbers: share of each ${noun}${unit} by expert; rows sum to 1.`} `
          + `${many && !open ? 'Those that tell most about the experts. ' : ''}${inWords(association)}`;
        drawSoon($('.chart', card), () => {
          const { table } = association;
          const totals = totalsOf(association);
          const shares = byExpert ? columnShares(table) : table.map((row, b) => row.map((x) => (totals[b] ? x / totals[b] : 0)));
          const lifts = liftsOf(association);
          heatMap($('.chart', card), rows.map((i) => lifts[i]), rows.map((i) => String(association.bins[i])), this.numbers(), {
            texts: rows.map((i) => shares[i].map(percent)),
            scale: LIFTS,
            hover: byExpert ? 'expert %{x}: %{text} of its weight on %{customdata}' : '%{customdata}: %{text} by expert %{x}',
            description: `Experts and ${noun}. ${inWords(association)}`,
          });
        });
      }
    }

    drawAssociations() {
      const { population } = this;
      const found = [population === 'images' ? 'objects' : population, 'decisions'].flatMap((source) => (
        Object.entries(this.layer.associations[source] || {}).map(([attribute, a]) => [source, attribute, a])));
      const has = (test) => found.some(([, , a]) => test(a));
      const columns = [
        ['Attribute', ([, attribute]) => ATTRIBUTES[attribute] || attribute],
        ['Counted', ([source]) => this.countedAs(source).split(/[,(]/)[0]],
        ['Information (nats)', ([, , a]) => `${fixed(a.mi)}${ends(a.interval)}`],
        ['of the maximum', ([, , a]) => (a.mi_max ? percent(a.mi / a.mi_max) : '–')],
        ['by chance', ([, , a]) => fixed(a.chance)],
        has((a) => a.controls?.random) && ['random router', ([, , a]) => fixed(a.controls?.random?.mi)],
        ['p, corrected', ([, , a]) => pValue(a)],
        has((a) => a.given?.level) && ['beyond the level (nats)', ([, , { given }]) => (
          given?.level && given.level.left_out !== 1 ? `${fixed(given.level.mi)}${ends(given.level.interval)}, p ${pValue(given.level)}` : '–')],
        ['decisions', ([, , a]) => whole(a.num_units)],
        ['reads as', ([, , a]) => reading(a)],
      ].filter(Boolean);
      const rows = found.map((entry) => {
        return [entry[2].p_adjusted <= SIGNIFICANT ? '' : 'muted', columns.map(([, of]) => of(entry))];
      });
      this.$('.associations').hidden = !rows.length;
      this.$('.association-hint').textContent = 'What the choice of the experts tells about an attribute. By chance: the mean of the same with whole images flipped at random.'
        + `${has((a) => a.interval) ? ' In brackets: 95 % interval, by a bootstrap over the images.' : ''}`
        + ' p is corrected for all tests of the layer.'
        + `${has((a) => a.given?.level) ? ' Beyond the level: within the pyramid levels alone; through the level: clear, and nothing beyond it; beyond the level not told: what there may be is too much for nothing, and too little to be sure.' : ''}`;
      this.$('.associations .table-scroll').replaceChildren(table(columns.map(([title]) => title), rows, [1, columns.length - 1]));
    }

    drawInterventions() {
      const base = this.payload.metrics;
      const names = Object.keys(base);
      const mine = this.payload.interventions.filter((i) => i.layer === this.layerName || i.layer === 'all');
      const title = { only: (e) => `only expert ${e}`, without: (e) => `without expert ${e}`, zeroed: (e) => `expert ${e} zeroed`, equal: () => 'all experts, equal weights', random: () => 'random experts' };
      const rows = mine.map((i) => ['', [
        (title[i.kind] ? title[i.kind](i.expert) : i.kind) + (i.layer === 'all' ? ' (all layers)' : ''),
        ...names.map((name) => difference(i.metrics?.[name], base[name]) + ends(i.difference?.[name]?.interval)),
      ]]);
      const all = this.layer.polysemanticity?.num_zeroed || 0;
      const zeroed = mine.filter((i) => i.kind === 'zeroed').length;
      this.$('.zeroed-hint').textContent = zeroed < all ? ` Of the ${whole(all)} experts that were zeroed, the ${zeroed} that cost most.` : '';
      this.$('.interval-hint').textContent = mine.some((i) => i.difference) ? ' In brackets: 95 % interval, by a bootstrap over the same images.' : '';
      this.$('.interventions').hidden = !rows.length;
      rows.unshift(['base', ['unchanged', ...names.map((name) => fixed(base[name]))]]);
      this.$('.interventions .table-scroll').replaceChildren(table(['Routing', ...names], rows, []));
    }
  }

  // Tables ---------------------------------------------------------------------------------------

  function columnShares(rows) {
    const totals = rows[0].map((_, e) => sum(rows.map((row) => row[e])));
    return rows.map((row) => row.map((x, e) => (totals[e] ? x / totals[e] : 0)));
  }

  /* Of each bin, of all experts: those that are not shown as well. */
  const totalsOf = ({ table, totals }) => totals ?? table.map(sum);

  /* log2 of each cell against what independence would give, in the limits of the scale; 0 (white) where it is not told apart from it. */
  function liftsOf(association) {
    const { table: rows, marks, p_adjusted: p } = association;
    const bins = totalsOf(association);
    const total = sum(bins) || 1;
    const experts = rows[0].map((_, e) => sum(rows.map((row) => row[e])));
    return rows.map((row, b) => row.map((x, e) => {
      const expected = (bins[b] * experts[e]) / total;
      if (!expected || (marks ? !marks[b][e] : p > SIGNIFICANT)) return 0;
      return Math.min(Math.max(Math.log2(x / expected), LIFTS.low), LIFTS.high);
    }));
  }

  /* Bins by what they contribute to the mutual information, most first. */
  function mostTelling(association) {
    const { table: rows } = association;
    const bins = totalsOf(association);
    const total = sum(bins);
    const experts = rows[0].map((_, e) => sum(rows.map((row) => row[e])) / total);
    const gain = rows.map((row, b) => sum(row.map((x, e) => (x ? x * Math.log(x / bins[b] / experts[e]) : 0))));
    return range(rows.length).sort((a, b) => gain[b] - gain[a] || a - b);
  }

  /* What an association says, in few words; as the verdict has it. */
  function reading({ p_adjusted: p, given }) {
    if (p > SIGNIFICANT) return 'within chance';
    const level = given?.level;
    if (!level || level.p_adjusted <= SIGNIFICANT) return 'more than chance';
    const open = level.left_out === 1 || !level.interval || level.interval[1] > MIN_SHARE * level.mi_max;
    return open ? 'beyond the level not told' : 'through the level';
  }

  function pValue({ p_adjusted: p, permutations }) {
    if (p === null || p === undefined) return '–';
    return permutations && p <= 1.0001 / (permutations + 1) ? `≤ ${fixed(p)}` : fixed(p);
  }

  const ends = (interval) => (interval ? ` [${interval.map((x) => fixed(x)).join(', ').replaceAll('-', '−')}]` : '');

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
      for (const input of $$('.viewer-buttons input', dialog)) input.addEventListener('change', () => this.toggle());
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
        view.write();
      });
      for (const type of ['mouseover', 'mouseout', 'focusin', 'focusout']) {
        $('.viewer-body').addEventListener(type, (event) => this.point(event.type.endsWith('out') ? null : event.target.closest('[data-row]')));
      }
      $('.stage').addEventListener('click', (event) => {
        const box = event.target.closest('.box');
        if (box) $(`.entry[data-row="${box.dataset.row}"]`, dialog).focus();
      });
      new ResizeObserver(() => this.placeTags()).observe($('.stage'));
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
      const { image: images, score, is_detection: isDetection, partner } = run.columns;
      const image = images[row];
      const [width, height, data] = run.payload.pool.images[image];
      const first = row - run.place[row];
      const rows = [];
      for (let i = first; i < run.count && images[i] === image; i++) rows.push(i);
      // The clicked one on top of its list, then by score.
      const points = (i) => (score[i] === NO_WEIGHT ? -1 : score[i]);
      rows.sort((a, b) => (b === row) - (a === row) || points(b) - points(a) || a - b);

      const name = run.fileName(image);
      const { folder } = run.payload.files;
      $('#viewer-title').textContent = name || `Image ${run.imageNumber(image)}`;
      $('#viewer-hint').textContent = `Image ${run.imageNumber(image)}, ${width} × ${height} px. Colour and number: main expert in ${run.layer.title}.${run.detection ? ' Dashed: ground truth.' : ''}`;
      const link = $('#viewer-link');
      link.hidden = !name;
      // Names are others' data: an address is followed, but no script, and no path that looks like one.
      const isAddress = /^(?!javascript:|vbscript:|data:)[a-z][a-z\d+.-]*:\/\//i.test(name);
      link.href = isAddress ? name : (folder + name).split('/').map(encodeURIComponent).join('/').replace(/^([A-Za-z])%3A\//, 'file:///$1:/');
      $('#viewer-previous').disabled = index === 0;
      $('#viewer-next').disabled = index === run.wallRows.length - 1;

      const stage = $('.stage');
      const picture = $('img', stage);
      picture.src = jpeg(data);
      picture.alt = `Image ${run.imageNumber(image)}; what is in it is listed beside it.`;
      stage.style.aspectRatio = `${width} / ${height}`;
      stage.style.width = `min(100%, 960px, (100vh - 150px) * ${width / height})`;
      stage.classList.remove('pointing');
      $$('.box, .tag', stage).forEach((node) => node.remove());
      // Large boxes first, so that small ones lie above them and can be pointed at.
      const boxes = rows.filter((i) => run.sizeBin[i] >= 0).sort((a, b) => run.columns.size[b] - run.columns.size[a]);
      const other = partner[row] ? row + partner[row] : -1;
      stage.append(...boxes.map((i) => this.box(i, i === row || i === other, width, height)), ...boxes.map((i) => this.tag(i)));
      const parts = run.detection
        ? [['Object', rows.filter((i) => !isDetection[i])], ['Detection', rows.filter((i) => isDetection[i])]]
        : [['Image', rows]];
      if (isDetection[row]) parts.reverse();
      const list = $('.viewer-list');
      list.replaceChildren(...parts.filter(([, mine]) => mine.length).flatMap(([noun, mine]) => {
        const title = run.detection ? `${plural(mine.length, noun.toLowerCase())}${noun === 'Object' ? ' (ground truth)' : ''}` : 'Prediction';
        return [element('h3', {}, title), element('ul', {}, ...mine.map((i) => this.entry(i, i === row || i === other, i === row)))];
      }));
      list.scrollTop = 0;
      this.toggle();
      view.write();
    },

    /* Ground truth, detections, or both. */
    toggle() {
      for (const [name, input] of [['hide-objects', '#show-objects'], ['hide-detections', '#show-detections']]) {
        $('.stage').classList.toggle(name, $(input)?.checked === false);
      }
      this.placeTags();
    },

    colours(row) {
      const expert = this.run.mainExpert(row);
      const colour = expert < 0 ? '#7A7A7A' : expertColour(this.run.number(expert));
      return { '--colour': colour, '--on-colour': textOn(colour) };
    },

    classOf(row) { return this.run.columns.is_detection[row] ? 'detection' : 'object'; },

    box(row, chosen, width, height) {
      const [x1, y1, x2, y2] = this.run.columns.box.subarray(4 * row, 4 * row + 4);
      const node = element('div', { class: `box ${this.classOf(row)}${chosen ? ' chosen' : ''}`, 'data-row': row, 'aria-hidden': 'true' });
      for (const [name, value] of Object.entries(this.colours(row))) node.style.setProperty(name, value);
      place(node, [x1, y1, Math.min(x2, width), Math.min(y2, height)], width, height);
      return node;
    },

    /* The number of the main expert; an object that was found leaves it to its detection. */
    tag(row) {
      const { run } = this;
      const expert = run.mainExpert(row);
      const found = !run.columns.is_detection[row] && run.columns.kind[row] === CORRECT;
      const node = element('span', { class: `tag ${this.classOf(row)}${found ? ' found' : ''}`, 'data-row': row, 'aria-hidden': 'true' }, expert < 0 ? '–' : String(run.number(expert)));
      for (const [name, value] of Object.entries(this.colours(row))) node.style.setProperty(name, value);
      return node;
    },

    /* Beside the boxes' corners, so that no two tags touch each other. */
    placeTags() {
      const stage = $('.stage');
      const [right, bottom] = [stage.clientWidth, stage.clientHeight];
      const taken = [];
      for (const tag of $$('.tag', stage)) {
        const box = $(`.box[data-row="${tag.dataset.row}"]`, stage);
        const [w, h] = [tag.offsetWidth, tag.offsetHeight];
        if (!w || !box) continue;
        const [x1, y1, x2, y2] = [box.offsetLeft, box.offsetTop, box.offsetLeft + box.offsetWidth, box.offsetTop + box.offsetHeight];
        const places = [[x1, y1 - h], [x2 - w, y1 - h], [x1, y2], [x2 - w, y2], [x1, y1], [x2 - w, y1], [x1, y2 - h], [x2 - w, y2 - h]];
        for (let step = 1; step < 12; step++) places.push([x1 + step * (w + 2), y1 - h], [x1, y1 + step * (h + 2)]);
        const inside = places.map(([x, y]) => [Math.min(Math.max(x, 0), right - w), Math.min(Math.max(y, 0), bottom - h)]);
        const free = ([x, y]) => taken.every(([a, b, c, d]) => x >= c + 1 || y >= d + 1 || x + w + 1 <= a || y + h + 1 <= b);
        const [x, y] = inside.find(free) || inside[0];
        taken.push([x, y, x + w, y + h]);
        tag.style.left = `${x}px`;
        tag.style.top = `${y}px`;
      }
    },

    entry(row, chosen, reachable) {
      const { run } = this;
      const experts = range(run.width)
        .map((e) => [e, run.steps(row, e)])
        .filter(([, weight]) => weight !== NO_WEIGHT && weight > 0)
        .sort((a, b) => b[1] - a[1] || a[0] - b[0]);
      const named = experts.slice(0, 6).map(([e, weight]) => `expert ${run.number(e)}: ${weightText(weight)}`);
      if (experts.length > 6) named.push(`${experts.length - 6} more`);
      const pixels = run.sizeBin[row] < 0 ? '' : ` · ${Math.round(run.columns.size[row])} px`;
      return element('li', { class: chosen ? 'entry chosen' : 'entry', 'data-row': row, tabIndex: reachable ? 0 : -1 },
        badge(run.number(run.mainExpert(row))),
        element('span', { class: 'what' }, run.describe(row)),
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
  const readFilters = () => ({
    sizes: ticked('size'), kinds: ticked('kind'), klass: form.elements.class.value,
    search: form.elements.search.value.trim().toLowerCase(),
  });
  const filtersActive = () => form.elements.class.value !== '' || form.elements.search.value.trim() !== ''
    || $$('input[type="checkbox"]', form).some((input) => !input.checked && !input.closest('[hidden]'));

  /* What can happen to the rows of the chosen population. */
  function showKinds() {
    const population = form.elements.population?.value ?? 'images';
    for (const chip of $$('[data-kind]', form)) chip.hidden = !KINDS_OF[population].includes(Number(chip.dataset.kind));
    $('.class-meaning').textContent = population === 'detections' ? 'Predicted class' : 'True class';
  }

  /* The address holds what was chosen, so that a link shows the same view. */
  const view = {
    runs: [],

    write() {
      const { runs } = view;
      if (!view.ready) return;
      const said = new URLSearchParams();
      const { sizes, kinds, klass, search } = readFilters();
      if (form.elements.population?.value === 'detections') said.set('count', 'detections');
      if (form.elements.size && sizes.size < 3) said.set('size', [...sizes].join('.'));
      if (kinds.size < $$('input[name="kind"]', form).length) said.set('result', [...kinds].join('.'));
      for (const [name, value] of Object.entries({ class: klass, search })) if (value) said.set(name, value);
      runs.forEach((run, i) => {
        if (!run.layer) return;
        const { by, descending, seed, least } = run.sorting;
        said.set(`run${i}`, [run.layerName, run.expert, by, descending ? 'down' : 'up', seed, least].join('~'));
      });
      if (viewer.dialog.open) said.set('open', `${runs.indexOf(viewer.run)}~${viewer.run.wallRows[viewer.index]}`);
      const hash = `#${said}`;
      if (hash !== location.hash) history.replaceState(null, '', hash);
    },

    async read() {
      const said = new URLSearchParams(location.hash.slice(1));
      view.ready = false;
      form.reset();
      if (form.elements.population && said.get('count') === 'detections') form.elements.population.value = 'detections';
      for (const [name, field] of [['size', 'size'], ['result', 'kind']]) {
        if (!said.has(name)) continue;
        const kept = said.get(name).split('.');
        for (const input of $$(`input[name="${field}"]`, form)) input.checked = kept.includes(input.value);
      }
      for (const name of ['class', 'search']) if (said.has(name)) form.elements[name].value = said.get(name);
      if (form.elements.class.selectedIndex < 0) form.elements.class.value = '';
      showKinds();
      for (const [i, run] of view.runs.entries()) {
        const [layer, expert, by, direction, seed, least] = (said.get(`run${i}`) || '').split('~');
        const known = [...run.$('.sort').options].some((option) => option.value === by);
        await run.start({
          layer, expert: expert === undefined ? null : Number(expert), sorting: known ? { by, descending: direction !== 'up', seed: Number(seed) || 0, least: Number(least) || 0 } : {},
        });
      }
      view.ready = true;
      const [i, row] = (said.get('open') || '').split('~').map(Number);
      const index = view.runs[i]?.wallRows?.indexOf(row) ?? -1;
      if (viewer.dialog.open) viewer.dialog.close();
      if (index >= 0) viewer.open(view.runs[i], index);
    },
  };

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
    const refresh = () => {
      showKinds();
      runs.forEach((run) => run.refresh());
      view.write();
    };
    form.addEventListener('input', (event) => {
      refresh();
      if (event.target.name === 'population') runs.forEach((run) => { if (run.layer) run.drawAssociated(); });
    });
    form.addEventListener('reset', () => setTimeout(() => {
      if (!view.ready) return; // the address is being read
      refresh();
      runs.forEach((run) => { if (run.layer) run.drawAssociated(); });
    }));
    form.addEventListener('submit', (event) => event.preventDefault());
    const toggle = $('#filters-toggle');
    toggle.addEventListener('click', () => toggle.setAttribute('aria-expanded', String(toggle.getAttribute('aria-expanded') !== 'true')));
    viewer.listen();
    view.runs = runs;
    runs.forEach((run) => run.listen());
    await view.read();
    addEventListener('hashchange', () => { if (location.hash.includes('=') || location.hash === '') view.read(); });
    await Promise.all($$('.tile img').map((image) => image.decode().catch(() => {})));
    await nextFrame();
    await nextFrame();
    document.documentElement.dataset.pictures = String(Math.round(performance.now()));
    startPlotly();
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => runs.forEach((run) => {
      if (!run.layer) return;
      run.drawHistograms();
      run.drawOverview(); // its history is drawn anew, too
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
