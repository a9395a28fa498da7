"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const root = document.documentElement;
  const articles = [...document.querySelectorAll("article.item")];
  const themes = [...document.querySelectorAll("input[name=theme]")];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const still = window.matchMedia("(prefers-reduced-motion: reduce)");
  const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [4, 2], [12, 4], [1, 3, 6, 3]];
  const COLOURS = DASHES.length;
  const MISSING = 255;

  // ---- what the page holds, decoded when it is first shown

  const cache = new Map();

  function bytes(text) {
    const raw = atob(text);
    const out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  }

  // images of (…, time, mel): one by its place in the leading axes
  function decoder(packed) {
    if (!packed) return null;
    const data = bytes(packed.data);
    const shape = packed.shape;
    const [width, height] = shape.slice(-2);
    return {
      names: packed.names, shape, width, height,
      at(...index) {
        const place = index.reduce((sum, i, axis) => sum * shape[axis] + i, 0);
        if (packed.low[place] === null) return null;
        const part = data.subarray(place * width * height, (place + 1) * width * height);
        const low = packed.low[place], step = (packed.high[place] - low) / 254;
        return { width, height, codes: part, low, step, high: packed.high[place] };
      },
    };
  }

  function item(number) {
    if (!cache.has(number)) {
      const data = JSON.parse($("data-" + number).textContent);
      data.mel = decoder(data.spectrogram).at();
      data.maps = decoder(data.variants);
      data.layers = decoder(data.sites);
      cache.set(number, data);
    }
    return cache.get(number);
  }

  const value = (image, t, m) => {
    const code = image.codes[t * image.height + m];
    return code === MISSING ? NaN : image.low + code * image.step;
  };

  // ---- what is shown

  const state = { item: 0, words: new Set([0]), opacity: 0.8, layer: 0, level: 0, variant: 0, target: "" };
  let data = null;

  function levels() {
    return data.sites ? data.sites.levels : data.levels;
  }

  // the averaged map of the run where the position stands for it, else one layer at one position
  function heat(word) {
    const own = data.maps ? data.levels.indexOf(levels()[state.level]) : -1;
    const place = own >= 0 ? own : state.level === 0 ? 0 : -1;
    if (state.layer === 0 && data.maps && place >= 0) return data.maps.at(state.variant, place, word);
    return data.layers ? data.layers.at(state.layer, state.level, word) : null;
  }

  function shown() {
    return data.words.map((_, w) => w).filter((w) => state.words.has(w));
  }

  // where the overlay is full: shared by all words at this layer and level, so that a flat map looks flat
  function full() {
    const tops = data.words.map((_, w) => heat(w)).filter(Boolean).map((image) => image.high);
    return Math.max(1.1, ...tops);
  }

  // ---- drawing

  const view = $("view"), over = $("cursor");

  function theme() {
    const style = getComputedStyle(root);
    const get = (name) => style.getPropertyValue(name).trim();
    return {
      ink: get("--ink"), soft: get("--soft"), line: get("--line"), panel: get("--panel"), cursor: get("--cursor"),
      quiet: rgb(get("--quiet")), loud: rgb(get("--loud")), words: Array.from({ length: COLOURS }, (_, w) => get("--word-" + w)),
    };
  }

  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

  function layout() {
    const width = Math.max(280, $("stage").clientWidth);
    const left = 40, gap = 12;
    const side = width >= 720 ? 170 : width >= 460 ? 96 : 62;
    const main = width - left - side - gap;
    const tall = Math.round(Math.min(360, Math.max(190, main * 0.42)));
    const below = width >= 460 ? 84 : 64;
    return { width, left, gap, side, main, tall, top: 18, below, height: 18 + tall + gap + below + 38 };
  }

  function prepare(canvas, box) {
    const scale = Math.min(3, window.devicePixelRatio || 1);
    canvas.width = Math.round(box.width * scale);
    canvas.height = Math.round(box.height * scale);
    canvas.style.height = box.height + "px";
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, box.width, box.height);
    context.font = "11px system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif";
    return context;
  }

  function picture(image, colour) {
    const canvas = document.createElement("canvas");
    canvas.width = image.width;
    canvas.height = image.height;
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(image.width, image.height);
    for (let t = 0; t < image.width; t++) {
      for (let m = 0; m < image.height; m++) {
        colour(value(image, t, m), pixels.data, 4 * ((image.height - 1 - m) * image.width + t));
      }
    }
    context.putImageData(pixels, 0, 0);
    return canvas;
  }

  function draw() {
    const box = layout(), colours = theme(), context = prepare(view, box);
    const [x, y] = [box.left, box.top];
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(picture(data.mel, (v, out, i) => {
      const share = Math.pow(Math.max(0, Math.min(1, 1 + v / 75)), 1.4);
      for (let c = 0; c < 3; c++) out[i + c] = colours.quiet[c] + share * (colours.loud[c] - colours.quiet[c]);
      out[i + 3] = 255;
    }), x, y, box.main, box.tall);
    const top = full();
    for (const word of shown()) {
      const image = heat(word);
      if (!image) continue;
      const tint = rgb(colours.words[word % COLOURS]);
      context.drawImage(picture(image, (v, out, i) => {
        const share = Math.max(0, Math.min(1, (v - 1) / (top - 1)));
        out[i] = tint[0]; out[i + 1] = tint[1]; out[i + 2] = tint[2];
        out[i + 3] = Number.isNaN(v) ? 0 : 255 * state.opacity * Math.pow(share, 0.7);
      }), x, y, box.main, box.tall);
    }
    outlines(context, box, colours);
    axes(context, box, colours);
    profiles(context, box, colours);
    cursor();
    legend(top);
  }

  function mask(word) {
    const of = data.targets[state.target];
    const packed = of && of[data.words[word]];
    if (!packed) return null;
    const raw = bytes(packed), width = data.energy.time.length, height = data.rows;
    return { width, height, on: (t, m) => (raw[(t * height + m) >> 3] >> (7 - ((t * height + m) & 7))) & 1 };
  }

  function outlines(context, box, colours) {
    for (const word of shown()) {
      const one = mask(word);
      if (!one) continue;
      const sx = box.main / one.width, sy = box.tall / one.height;
      const px = (t) => box.left + t * sx, py = (m) => box.top + box.tall - m * sy;
      context.beginPath();
      for (let t = 0; t < one.width; t++) {
        for (let m = 0; m < one.height; m++) {
          if (!one.on(t, m)) continue;
          if (t > 0 && !one.on(t - 1, m)) { context.moveTo(px(t), py(m)); context.lineTo(px(t), py(m + 1)); }
          if (t < one.width - 1 && !one.on(t + 1, m)) { context.moveTo(px(t + 1), py(m)); context.lineTo(px(t + 1), py(m + 1)); }
          if (m > 0 && !one.on(t, m - 1)) { context.moveTo(px(t), py(m)); context.lineTo(px(t + 1), py(m)); }
          if (m < one.height - 1 && !one.on(t, m + 1)) { context.moveTo(px(t), py(m + 1)); context.lineTo(px(t + 1), py(m + 1)); }
        }
      }
      context.lineWidth = 2.2;
      context.globalAlpha = 0.45;
      context.strokeStyle = colours.panel;
      context.stroke();
      context.globalAlpha = 1;
      context.lineWidth = 1;
      context.strokeStyle = colours.words[word % COLOURS];
      context.stroke();
    }
  }

  function axes(context, box, colours) {
    context.fillStyle = colours.soft;
    context.strokeStyle = colours.line;
    context.lineWidth = 1;
    context.textBaseline = "middle";
    context.textAlign = "right";
    let before = Infinity;
    for (const [row, text] of data.ticks) {
      const at = Math.min(box.top + box.tall - 5, Math.max(box.top + 5, box.top + box.tall * (1 - row / data.rows)));
      if (before - at < 13) continue;
      context.fillText(text, box.left - 6, at);
      before = at;
    }
    context.textAlign = "left";
    context.fillText("Hz", 2, 7);
    context.textAlign = "center";
    context.textBaseline = "top";
    const base = box.top + box.tall + box.gap + box.below;
    const wanted = box.main / 70;
    const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60].find((s) => data.duration / s <= wanted) || 120;
    for (let n = Math.ceil(data.start / step - 1e-6); n * step <= data.start + data.duration + 1e-6; n++) {
      const at = box.left + box.main * (n * step - data.start) / data.duration;
      const last = at > box.left + box.main - 10;
      context.textAlign = last ? "right" : at < box.left + 6 ? "left" : "center";
      context.fillText((n * step).toFixed(step < 1 ? 1 : 0), at, base + 6);
    }
    context.textAlign = "left";
    context.fillText("seconds", box.left, base + 22);
    context.strokeRect(box.left - 0.5, box.top - 0.5, box.main + 1, box.tall + 1);
  }

  // mean over the other axis, of cells that have a value
  function profile(image, frequency) {
    const count = frequency ? image.height : image.width, other = frequency ? image.width : image.height;
    return Array.from({ length: count }, (_, i) => {
      let sum = 0, n = 0;
      for (let j = 0; j < other; j++) {
        const v = frequency ? value(image, j, i) : value(image, i, j);
        if (!Number.isNaN(v)) { sum += v; n++; }
      }
      return n ? sum / n : NaN;
    });
  }

  function profiles(context, box, colours) {
    const words = shown().map((word) => ({ word, image: heat(word) })).filter((one) => one.image);
    const lines = words.map(({ word, image }) => ({ word, frequency: profile(image, true), time: profile(image, false) }));
    const side = { x: box.left + box.main + box.gap, y: box.top, w: box.side, h: box.tall };
    const below = { x: box.left, y: box.top + box.tall + box.gap, w: box.main, h: box.below };
    panel(context, colours, side, data.energy.frequency, lines.map((l) => ({ word: l.word, line: l.frequency })), true);
    panel(context, colours, below, data.energy.time, lines.map((l) => ({ word: l.word, line: l.time })), false);
    context.fillStyle = colours.soft;
    context.textAlign = "left";
    context.textBaseline = "middle";
    if (box.side > 120) context.fillText("attention ÷ its mean", side.x, 7);
    context.textBaseline = "top";
    if (box.side > 90) {
      context.fillText("grey: energy of the", side.x, below.y + 4);
      context.fillText("audio, of its maximum", side.x, below.y + 18);
    }
  }

  // one profile: energy as an area of its own scale, attention as lines around 1
  function panel(context, colours, box, energy, lines, upright) {
    const all = lines.flatMap((l) => l.line).filter((v) => !Number.isNaN(v));
    const low = Math.min(0.9, ...all), high = Math.max(1.1, ...all);
    const pad = 0.06 * (high - low);
    const share = (v) => (v - low + pad) / (high - low + 2 * pad);
    const length = upright ? box.h : box.w, depth = upright ? box.w : box.h;
    const point = (along, across) => upright
      ? [box.x + across * depth, box.y + box.h - along * length] : [box.x + along * length, box.y + box.h - across * depth];
    context.save();
    context.beginPath();
    context.moveTo(...point(0, 0));
    energy.forEach((v, i) => { context.lineTo(...point(i / energy.length, v * 0.94)); context.lineTo(...point((i + 1) / energy.length, v * 0.94)); });
    context.lineTo(...point(1, 0));
    context.fillStyle = colours.line;
    context.globalAlpha = 0.6;
    context.fill();
    context.globalAlpha = 1;
    context.strokeStyle = colours.soft;
    context.lineWidth = 0.75;
    context.beginPath();
    context.moveTo(...point(0, share(1)));
    context.lineTo(...point(1, share(1)));
    context.stroke();
    for (const { word, line } of lines) {
      context.beginPath();
      let pen = false;
      line.forEach((v, i) => {
        if (Number.isNaN(v)) { pen = false; return; }
        const at = point((i + 0.5) / line.length, share(v));
        if (pen) context.lineTo(...at); else context.moveTo(...at);
        pen = true;
      });
      context.setLineDash(DASHES[word % COLOURS]);
      context.lineWidth = 2;
      context.strokeStyle = colours.words[word % COLOURS];
      context.stroke();
    }
    context.restore();
    context.fillStyle = colours.soft;
    context.textBaseline = upright ? "top" : "middle";
    if (upright) {
      context.textAlign = "left";
      context.fillText(low.toFixed(2), box.x, box.y + box.h + 3);
      context.textAlign = "right";
      context.fillText(high.toFixed(2), box.x + box.w, box.y + box.h + 3);
    } else {
      context.textAlign = "right";
      context.fillText(high.toFixed(2), box.x - 6, box.y + 5);
      context.fillText(low.toFixed(2), box.x - 6, box.y + box.h - 5);
    }
    context.strokeStyle = colours.line;
    context.strokeRect(box.x - 0.5, box.y - 0.5, box.w + 1, box.h + 1);
  }

  // ---- time

  const audio = $("audio"), seek = $("seek"), play = $("play");

  function cursor() {
    const box = layout(), context = prepare(over, box);
    const share = Math.max(0, Math.min(1, now() / data.duration));
    const at = box.left + share * box.main;
    context.strokeStyle = theme().cursor;
    context.lineWidth = 1.5;
    context.beginPath();
    context.moveTo(at, box.top);
    context.lineTo(at, box.top + box.tall + box.gap + box.below);
    context.stroke();
    over.dataset.x = at.toFixed(2);
  }

  const now = () => (data.audio ? audio.currentTime : Number(seek.value));

  function tick() {
    seek.value = now();
    const text = `${(data.start + now()).toFixed(1)} of ${data.duration.toFixed(1)} s`;
    $("clock").textContent = text;
    seek.setAttribute("aria-valuetext", text);
    cursor();
  }

  function frame() {
    if (audio.paused) return;
    tick();
    if (!still.matches) requestAnimationFrame(frame);
  }

  function go(seconds) {
    const to = Math.max(0, Math.min(data.duration, seconds));
    if (data.audio) audio.currentTime = to;
    seek.value = to;
    tick();
  }

  function playing() {
    const on = !audio.paused;
    play.setAttribute("aria-pressed", String(on));
    $("play-text").textContent = on ? "Pause" : "Play";
    if (on && !still.matches) requestAnimationFrame(frame);
  }

  // ---- words, sliders, text

  function legend(top) {
    const named = shown().map((w) => data.words[w]);
    const what = named.length ? `Colour begins at evenly spread attention and is full at ${top.toFixed(2)} times that; all words share this scale.` : "No word is switched on.";
    $("legend").textContent = what;
    const layer = $("layer-text").textContent;
    view.setAttribute("aria-label", `Mel spectrogram, time to the right and frequency upward, with attention to ${named.join(", ") || "no word"}; ${layer}`);
  }

  function texts() {
    $("opacity-text").textContent = Math.round(100 * state.opacity) + " %";
    $("layer-text").textContent = data.sites ? data.sites.names[state.layer] + (data.sites.lattices[state.layer] ? ` (${data.sites.lattices[state.layer]})` : "") : "all layers, averaged";
    $("level-text").textContent = levels()[state.level] || "";
    $("layer").setAttribute("aria-valuetext", $("layer-text").textContent);
    $("level").setAttribute("aria-valuetext", $("level-text").textContent);
    const own = state.layer === 0 && (data.levels.includes(levels()[state.level]) || state.level === 0);
    $("variant").disabled = !own || !data.maps || data.maps.names.length < 2;
  }

  function options(select, pairs) {
    select.replaceChildren(...pairs.map(([name, text]) => {
      const option = document.createElement("option");
      option.value = name;
      option.textContent = text;
      return option;
    }));
  }

  function chips() {
    $("words").replaceChildren(...data.words.map((word, w) => {
      const label = document.createElement("label"), box = document.createElement("input");
      box.type = "checkbox";
      box.className = "swatch-" + (w % COLOURS);
      box.checked = state.words.has(w);
      box.dataset.word = String(w);
      box.addEventListener("change", () => {
        if (box.checked) state.words.add(w); else state.words.delete(w);
        draw();
      });
      const space = document.createElementNS($("play").querySelector("svg").namespaceURI, "svg");
      space.setAttribute("class", `dash dash-${w % COLOURS}`);
      space.setAttribute("aria-hidden", "true");
      const line = document.createElementNS(space.namespaceURI, "path");
      line.setAttribute("d", "M1 5H25");
      line.setAttribute("stroke-dasharray", DASHES[w % COLOURS].join(" ") || "none");
      space.append(line);
      label.append(box, space, document.createTextNode(word));
      return label;
    }));
  }

  function open(number) {
    audio.pause();
    state.item = number;
    data = item(number);
    articles.forEach((article, n) => { article.hidden = n !== number; });
    state.words = new Set(data.words.map((_, w) => w).slice(0, 2));
    state.layer = Math.min(state.layer, data.sites ? data.sites.names.length - 1 : 0);
    state.level = Math.min(state.level, Math.max(0, levels().length - 1));
    $("prompt").textContent = data.prompt;
    $("layer").max = data.sites ? data.sites.names.length - 1 : 0;
    $("layer").disabled = !data.sites;
    $("layer").value = state.layer;
    $("level").max = Math.max(0, levels().length - 1);
    $("level").disabled = levels().length < 2;
    $("level").value = state.level;
    const names = data.maps ? data.maps.names : ["default"];
    state.variant = Math.min(state.variant, names.length - 1);
    options($("variant"), names.map((name, v) => [String(v), name]));
    $("variant").value = String(state.variant);
    const targets = Object.keys(data.targets);
    if (!targets.includes(state.target)) state.target = "";
    options($("target"), [["", "none"], ...targets.map((name) => [name, name])]);
    $("target").value = state.target;
    $("target").disabled = !targets.length;
    if (data.audio) audio.src = "data:audio/flac;base64," + data.audio; else audio.removeAttribute("src");
    play.disabled = !data.audio;
    seek.max = data.duration;
    seek.step = 0.01;
    seek.value = 0;
    $("remark").textContent = [data.sites ? data.sites.note : "", ...Object.values(data.missing)].filter(Boolean).join(" ");
    chips();
    texts();
    draw();
    tick();
  }

  const bind = (id, event, then) => $(id).addEventListener(event, then);

  if (articles.length) {
    $("viewer").hidden = false;
    for (const input of document.querySelectorAll("input[name=item]")) {
      input.addEventListener("change", () => open(Number(input.value)));
      if (input.checked) state.item = Number(input.value);
    }
    bind("opacity", "input", (event) => { state.opacity = Number(event.target.value) / 100; texts(); draw(); });
    bind("layer", "input", (event) => { state.layer = Number(event.target.value); texts(); draw(); });
    bind("level", "input", (event) => { state.level = Number(event.target.value); texts(); draw(); });
    bind("variant", "change", (event) => { state.variant = Number(event.target.value); texts(); draw(); });
    bind("target", "change", (event) => { state.target = event.target.value; texts(); draw(); });
    seek.addEventListener("input", () => go(Number(seek.value)));
    play.addEventListener("click", () => { if (audio.paused) audio.play(); else audio.pause(); });
    for (const event of ["play", "pause", "ended"]) audio.addEventListener(event, playing);
    for (const event of ["timeupdate", "seeked"]) audio.addEventListener(event, tick);
    view.addEventListener("click", (event) => {
      const box = layout(), frame = view.getBoundingClientRect();
      const share = (event.clientX - frame.left - box.left) / box.main;
      if (share >= 0 && share <= 1) go(share * data.duration);
    });
    new ResizeObserver(() => { if (data) draw(); }).observe($("stage"));
    dark.addEventListener("change", () => draw());
    open(state.item);
  }

  function turn(name) {
    if (name === "auto") delete root.dataset.theme; else root.dataset.theme = name;
    if (data) draw();
  }

  for (const input of themes) input.addEventListener("change", () => turn(input.value));
  const chosen = () => (themes.find((input) => input.checked) || { value: "auto" }).value;
  turn(chosen());

  // on paper: light, and everything unfolded
  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const one of folded) one.open = true;
    turn("light");
  });
  window.addEventListener("afterprint", () => {
    for (const one of folded) one.open = false;
    turn(chosen());
  });
})();
