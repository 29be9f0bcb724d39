// The decoder's mean where the pointer is, and at the code of the picked image. Weights come in half precision.
"use strict";
(() => {
  // --- Numbers ---

  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

  const half = (bits) => {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 0x1f;
    const fraction = bits & 0x3ff;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  };

  const halves = (text) => {
    const view = new DataView(bytes(text).buffer);
    const values = new Float32Array(view.byteLength / 2);
    for (let k = 0; k < values.length; k++) values[k] = half(view.getUint16(2 * k, true));
    return values;
  };

  // --- The decoder ---

  const sigmoid = (h) => 1 / (1 + Math.exp(-h));

  const links = { identity: (h) => h, sigmoid };

  const activations = {
    none: (h) => h,
    relu: (h) => h.map((value) => Math.max(value, 0)),
    silu: (h) => h.map((value) => value * sigmoid(value)),
    tanh: (h) => h.map(Math.tanh),
    glu: (h) => {
      const width = h.length / 2;
      return h.slice(0, width).map((value, k) => value * sigmoid(h[width + k]));
    },
  };

  const affine = (weight, bias, x) => {
    const y = new Float32Array(bias.length);
    for (let row = 0, at = 0; row < y.length; row++) {
      let sum = bias[row];
      for (let column = 0; column < x.length; column++) sum += weight[at++] * x[column];
      y[row] = sum;
    }
    return y;
  };

  const decoderOf = (data) => {
    const weights = halves(data.weights);
    const layers = [];
    let at = 0;
    for (const [rows, columns, activation] of data.layers) {
      const weight = weights.subarray(at, (at += rows * columns));
      layers.push({ weight, bias: weights.subarray(at, (at += rows)), act: activations[activation] });
    }
    const link = links[data.link];
    return (z) => {
      let h = Float32Array.from(z);
      for (const { weight, bias, act } of layers) h = act(affine(weight, bias, h));
      return h.map((value) => Math.min(Math.max(data.scale * link(value), 0), 1));
    };
  };

  // Pixels, plane by plane, onto a canvas of as many.
  const draw = (canvas, pixels) => {
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    const size = canvas.width * canvas.height;
    const planes = pixels.length / size;
    for (let k = 0; k < size; k++) {
      for (let c = 0; c < 3; c++) image.data[4 * k + c] = Math.round(255 * pixels[(planes === 3 ? c : 0) * size + k]);
      image.data[4 * k + 3] = 255;
    }
    context.putImageData(image, 0, 0);
  };

  // --- The plane ---

  const explorerOf = (figure) => {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const mean = decoderOf(data.decoder);
    const pad = figure.querySelector("canvas.pad");
    const [moved, original, rebuilt] = figure.querySelectorAll(".view canvas");
    const name = figure.querySelector(".picked p");
    const outputs = figure.querySelectorAll("output");
    const codes = halves(data.codes);
    const points = halves(data.points);
    const labels = data.labels === null ? null : bytes(data.labels);
    const size = data.directions[0].length;
    const count = points.length / 2;
    const sheet = new Image();
    const behind = document.createElement("canvas");
    let picked = data.start;
    let chosen = [];
    let pixels = [];
    let waiting = false;

    const pointOf = (n) => [points[2 * n], points[2 * n + 1]];
    const codeOf = (n) => codes.slice(n * size, (n + 1) * size);

    const across = (value) => ((value / data.extent + 1) / 2) * pad.width;
    const down = (value) => pad.height - across(value);

    const colorOf = (name) => {
      const probe = figure.appendChild(document.createElement("span"));
      probe.className = name;
      const color = getComputedStyle(probe).color;
      probe.remove();
      return color;
    };

    // Grid, axes and points change only with the colors and the size.
    const paintBehind = () => {
      behind.width = pad.width;
      behind.height = pad.height;
      const context = behind.getContext("2d");
      const unit = pad.width / 640;
      context.strokeStyle = context.fillStyle = getComputedStyle(pad).color;
      context.font = `${20 * unit}px system-ui, sans-serif`;
      const step = data.extent > 12 ? 5 : data.extent > 5 ? 2 : 1;
      for (let tick = -Math.floor(data.extent / step) * step; tick <= data.extent; tick += step) {
        context.globalAlpha = tick === 0 ? 0.45 : 0.1;
        context.lineWidth = 1.5 * unit;
        context.beginPath();
        context.moveTo(across(tick), 0);
        context.lineTo(across(tick), pad.height);
        context.moveTo(0, down(tick));
        context.lineTo(pad.width, down(tick));
        context.stroke();
      }
      const colors = Array.from({ length: 10 }, (_, k) => colorOf(`label-${k}`));
      context.globalAlpha = Math.min(0.8, Math.max(0.3, 400 / (count + 1)));
      for (let k = 0; k < count; k++) {
        if (labels !== null) context.fillStyle = colors[labels[k] % 10];
        context.beginPath();
        context.arc(across(points[2 * k]), down(points[2 * k + 1]), 3.2 * unit, 0, 2 * Math.PI);
        context.fill();
      }
      context.globalAlpha = 0.75;
      context.fillStyle = getComputedStyle(pad).color;
      for (let tick = -Math.floor(data.extent / step) * step; tick < data.extent; tick += step) {
        if (tick === 0 || Math.abs(tick) > 0.88 * data.extent) continue; // a number would be cut, or meet another
        const word = String(tick).replace("-", "−");
        context.textAlign = "center";
        context.fillText(word, across(tick), pad.height - 8 * unit);
        context.textAlign = "left";
        context.fillText(word, 8 * unit, down(tick) + 7 * unit);
      }
    };

    const paintPad = () => {
      const context = pad.getContext("2d");
      const unit = pad.width / 640;
      const place = ([right, up]) => [across(right), down(up)];
      let [x, y] = place(chosen);
      const style = getComputedStyle(pad);
      context.clearRect(0, 0, pad.width, pad.height);
      context.drawImage(behind, 0, 0);
      const ring = (radius, width, color) => {
        context.beginPath();
        context.arc(x, y, radius * unit, 0, 2 * Math.PI);
        context.strokeStyle = color;
        context.lineWidth = width * unit;
        context.stroke();
      };
      ring(13, 8, style.backgroundColor);
      ring(13, 3.5, style.color);
      [x, y] = place(pointOf(picked));
      ring(5, 4, style.backgroundColor);
      ring(5, 2.5, style.color);
    };

    // The code of the picked image, moved in the plane.
    const show = () => {
      const z = codeOf(picked);
      pointOf(picked).forEach((from, k) => {
        for (let l = 0; l < size; l++) z[l] += (chosen[k] - from) * data.directions[k][l];
        outputs[k].value = chosen[k].toFixed(2).replace("-", "−");
      });
      pixels = mean(z);
      draw(moved, pixels);
      paintPad();
    };

    const showPicked = () => {
      const [w, h, context] = [original.width, original.height, original.getContext("2d")];
      const [left, top] = [(picked % data.columns) * w, Math.floor(picked / data.columns) * h];
      context.drawImage(sheet, left, top, w, h, 0, 0, w, h);
      draw(rebuilt, mean(codeOf(picked)));
      name.textContent = data.names[picked];
    };

    const pick = (n) => {
      picked = n;
      chosen = pointOf(n);
      showPicked();
      show();
    };

    const nearest = (place) => {
      let [best, least] = [0, Infinity];
      for (let n = 0; n < count; n++) {
        const distance = Math.hypot(points[2 * n] - place[0], points[2 * n + 1] - place[1]);
        if (distance < least) [best, least] = [n, distance];
      }
      return best;
    };

    const showSoon = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        show();
      });
    };

    const inside = (value) => Math.min(Math.max(value, -data.extent), data.extent);
    const move = (first, second) => {
      chosen = [inside(first), inside(second)];
      showSoon();
    };

    const placeOf = (event) => {
      const box = pad.getBoundingClientRect();
      const right = (event.clientX - box.left) / box.width;
      const up = 1 - (event.clientY - box.top) / box.height;
      return [(2 * right - 1) * data.extent, (2 * up - 1) * data.extent];
    };
    pad.addEventListener("pointermove", (event) => move(...placeOf(event)));
    pad.addEventListener("pointerdown", (event) => pad.setPointerCapture(event.pointerId));
    pad.addEventListener("click", (event) => pick(nearest(placeOf(event))));

    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    pad.addEventListener("keydown", (event) => {
      const arrow = arrows[event.key];
      if (!["Home", "Enter"].includes(event.key) && !arrow) return;
      event.preventDefault();
      const step = (data.extent / 40) * (event.shiftKey ? 5 : 1);
      if (arrow) move(chosen[0] + step * arrow[0], chosen[1] + step * arrow[1]);
      else pick(event.key === "Enter" ? nearest(chosen) : data.start);
    });

    const repaint = () => {
      const side = Math.max(1, Math.round(pad.clientWidth * devicePixelRatio));
      if (pad.width !== side) pad.width = pad.height = side;
      paintBehind();
      paintPad();
    };
    new ResizeObserver(repaint).observe(pad);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
    chosen = pointOf(picked);
    repaint();
    sheet.onload = showPicked;
    sheet.src = `data:image/png;base64,${data.images}`;
    pick(picked);

    return {
      pixels: () => Array.from(pixels),
      set: (first, second) => {
        chosen = [first, second];
        show();
      },
    };
  };

  const explorers = [...document.querySelectorAll("figure.explorer")].map(explorerOf);
  window.pplExplorer = {
    explorerPixels: (k) => explorers[k].pixels(),
    explorerSet: (k, first, second) => explorers[k].set(first, second),
  };
})();
