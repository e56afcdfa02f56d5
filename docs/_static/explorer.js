// The ranks explorer: looks up figures/06_joint.csv, which the build bundles as JOINT (columns).
// A row's number is that of its ranks, counted as the table's rows are: the last layer fastest.
"use strict";
(() => {
  const LAYERS = [
    { column: "0", name: "first layer, 15 × 784" },
    { column: "2", name: "second layer, 15 × 15" },
    { column: "4", name: "last layer, 10 × 15" },
  ];
  const MEASURES = {
    loss: { label: "test loss (cross-entropy)", values: JOINT.loss, ticks: [0.3, 0.5, 1, 2, 3] },
    error: {
      label: "test error (%)",
      values: JOINT.accuracy.map((accuracy) => 100 - accuracy),
      ticks: [10, 20, 30, 50, 90],
    },
  };
  const { parameters } = JOINT;
  const full = LAYERS.map(({ column }) => Math.max(...JOINT[column]));
  const row = (ranks) => ranks.reduce((sum, rank, i) => sum * (full[i] + 1) + rank, 0);
  const whole = row(full);

  // By measure: the rows that no other with as few parameters or fewer beats, cheapest first.
  const order = [...parameters.keys()];
  for (const measure of Object.values(MEASURES)) {
    const { values } = measure;
    measure.front = [];
    order.sort((a, b) => parameters[a] - parameters[b] || values[a] - values[b]);
    for (const i of order) {
      const last = measure.front.at(-1);
      if (last === undefined || values[i] < values[last]) measure.front.push(i);
    }
  }
  const best = (front, budget) => front.findLast((i) => parameters[i] <= budget);

  const at = (id) => document.getElementById(id);
  const count = (n) => n.toLocaleString("en");
  const ranksOf = (i) => LAYERS.map(({ column }) => JOINT[column][i]).join(", ");

  // The controls: sliders begin at the paper's rank 10.
  const sliders = LAYERS.map(({ name }, i) => {
    at("ranks").insertAdjacentHTML(
      "beforeend",
      `<div class="slider"><label for="rank${i}">${name}</label>
       <input type="range" id="rank${i}" min="0" max="${full[i]}" step="1" value="10">
       <output for="rank${i}"></output></div>`,
    );
    return at(`rank${i}`);
  });

  const SHAPES = {
    yours: '<path class="yours" d="M0 -9 9 0 0 9 -9 0Z"/>',
    best: '<circle class="best" r="10"/>',
  };
  const swatch = (kind) =>
    `<svg class="swatch" viewBox="-12 -12 24 24" aria-hidden="true">${SHAPES[kind]}</svg>`;

  function table(rows) {
    const body = rows.map(
      ([kind, name, i]) => `<tr id="${kind}"><th scope="row">${SHAPES[kind] ? swatch(kind) : ""}${name}</th>
        <td data-is="ranks">${ranksOf(i)}</td>
        <td data-is="parameters">${count(parameters[i])}</td>
        <td data-is="loss">${MEASURES.loss.values[i].toFixed(4)}</td>
        <td data-is="error">${MEASURES.error.values[i].toFixed(2)}</td></tr>`,
    );
    return `<table><thead><tr><th scope="col"></th><th scope="col">ranks</th>
      <th scope="col">parameters</th><th scope="col">test loss</th>
      <th scope="col">test error (%)</th></tr></thead><tbody>${body.join("")}</tbody></table>`;
  }

  // The picture is drawn at the size it has on the page, so that its letters stay readable;
  // the returned function moves the two marks on it.
  function draw(measure) {
    const { values, front, label, ticks } = measure;
    const width = Math.max(280, at("picture").clientWidth);
    const height = Math.round(Math.min(430, Math.max(300, width * 0.58)));
    const box = { left: 42, right: width - 12, top: 28, bottom: height - 42 };
    const scale = (low, high, from, to) => (value) =>
      +(from + ((value - low) / (high - low)) * (to - from)).toFixed(1);
    const x = scale(0, Math.max(...parameters) * 1.02, box.left, box.right);
    const [low, high] = [Math.min(...values) * 0.9, Math.max(...values) * 1.05].map(Math.log);
    const logarithmic = scale(low, high, box.bottom, box.top);
    const y = (value) => logarithmic(Math.log(value));
    const lines = [
      ...[0, 3000, 6000, 9000, 12000].map(
        (n) => `<path class="grid" d="M${x(n)} ${box.top}V${box.bottom}"/>
          <text x="${x(n)}" y="${box.bottom + 17}" text-anchor="middle">${count(n)}</text>`,
      ),
      ...ticks.map(
        (n) => `<path class="grid" d="M${box.left} ${y(n)}H${box.right}"/>
          <text x="${box.left - 6}" y="${y(n) + 4}" text-anchor="end">${n}</text>`,
      ),
    ];
    const dots = parameters.map((p, i) => `M${x(p)} ${y(values[i])}h0`).join("");
    const steps = front.map((i, n) => `${n ? "H" : "M"}${x(parameters[i])}${n ? "V" : " "}${y(values[i])}`);
    at("picture").innerHTML = `<svg class="picture" viewBox="0 0 ${width} ${height}" role="img">
      <title></title>${lines.join("")}
      <text x="0" y="14">${label}</text>
      <text x="${box.right}" y="${height - 5}" text-anchor="end">parameters</text>
      <path class="cloud" d="${dots}"/>
      <path class="front" d="${steps.join("")}H${box.right}"/>
      <path class="cloud" d="M${box.left + 12} ${box.bottom - 34}h0m8 -4h0m8 6h0"/>
      <text x="${box.left + 40}" y="${box.bottom - 30}">all combinations</text>
      <path class="front" d="M${box.left + 10} ${box.bottom - 14}h20"/>
      <text x="${box.left + 40}" y="${box.bottom - 10}">the best of them</text>
      <path class="guide"/><g id="at-best">${SHAPES.best}</g><g id="at-yours">${SHAPES.yours}</g></svg>`;
    const svg = at("picture").firstChild;
    return (mine, other) => {
      const place = (i) => [x(parameters[i]), y(values[i])];
      svg.querySelector("#at-yours").setAttribute("transform", `translate(${place(mine)})`);
      svg.querySelector("#at-best").setAttribute("transform", `translate(${place(other)})`);
      svg.querySelector(".guide").setAttribute("d", `M${place(mine)}V${box.bottom}`);
      svg.querySelector("title").textContent =
        `${label}, on a logarithmic scale, against parameters. Your ranks: ${values[mine].toPrecision(4)} ` +
        `with ${count(parameters[mine])}. The best with no more: ${values[other].toPrecision(4)}.`;
    };
  }

  let measure = MEASURES.loss;
  let move = draw(measure);

  function show() {
    const mine = row(sliders.map((slider) => +slider.value));
    const other = best(measure.front, parameters[mine]);
    sliders.forEach((slider, i) => {
      slider.nextElementSibling.value = `${slider.value} of ${full[i]}`;
      slider.setAttribute("aria-valuetext", `rank ${slider.value} of ${full[i]}`);
    });
    at("said").textContent =
      `test loss ${MEASURES.loss.values[mine].toFixed(3)}, ` +
      `test error ${MEASURES.error.values[mine].toFixed(1)} %, ${count(parameters[mine])} parameters`;
    at("result").innerHTML = table([
      ["yours", "your ranks", mine],
      ["best", "the best with no more parameters", other],
      ["full", "full ranks", whole],
    ]);
    move(mine, other);
  }

  for (const slider of sliders) slider.addEventListener("input", show);
  for (const choice of document.getElementsByName("measure")) {
    choice.addEventListener("change", () => {
      measure = MEASURES[choice.value];
      move = draw(measure);
      show();
    });
  }
  let width = at("picture").clientWidth;
  new ResizeObserver(() => {
    if (at("picture").clientWidth === width) return;
    width = at("picture").clientWidth;
    move = draw(measure);
    show();
  }).observe(at("picture"));
  show();
})();
