(() => {
  const root = document.documentElement, tip = document.getElementById("tip");
  root.classList.add("js");

  const theme = document.getElementById("theme");
  theme.addEventListener("click", () => {
    const now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
  });

  for (const box of document.querySelectorAll(".compare")) {
    const stage = box.querySelector(".stage"), range = box.querySelector("input"), flicker = box.querySelector("button");
    const sides = [...box.querySelectorAll("select")], names = box.querySelectorAll(".names span");
    const draw = () => {
      stage.style.setProperty("--at", range.value + "%");
      sides.forEach((select, side) => {
        names[side].textContent = select.selectedOptions[0].textContent;
        for (const sheet of stage.querySelectorAll("img")) {
          sheet.classList.toggle(["left", "right"][side], sheet.dataset.sheet === select.value);
        }
      });
    };
    for (const input of [range, ...sides]) input.addEventListener("input", draw);
    flicker.addEventListener("click", () => {
      flicker.setAttribute("aria-pressed", box.classList.toggle("flicker"));
    });
    let dragged = null;  // the column of pictures that the drag began in
    const drag = (event) => {
      const frame = stage.getBoundingClientRect(), columns = Number(stage.dataset.columns);
      const place = (event.clientX - frame.left) / frame.width * columns;
      if (dragged === null) dragged = Math.min(Math.max(Math.floor(place), 0), columns - 1);
      range.value = 100 * (place - dragged);
      draw();
    };
    stage.addEventListener("pointerdown", (event) => {
      stage.setPointerCapture(event.pointerId);
      drag(event);
    });
    stage.addEventListener("pointermove", (event) => { if (dragged !== null) drag(event); });
    for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, () => { dragged = null; });
    draw();
  }

  const heat = document.querySelector(".heat");
  const groups = heat && heat.tHead.rows[0].cells, steps = heat && heat.dataset.steps.split("|");
  const place = (cell) => {  // layer, scheme and steps of a cell of the heat map
    if (!heat || cell.tagName !== "TD" || !heat.contains(cell) || cell.cellIndex < 3) return "";
    const column = cell.cellIndex - 3, stride = steps.length + 1;  // one empty cell before each group
    const layer = cell.parentNode.cells[0], group = groups[4 + 2 * Math.floor(column / stride)];
    return `${layer.title || layer.dataset.tip}\n${group.textContent}, steps ${steps[column % stride - 1]}\nerror `;
  };
  const show = (event) => {
    const cell = event.target.closest && event.target.closest("[title], [data-tip]");
    tip.hidden = !cell;
    if (!cell) return;
    if (cell.title) { cell.dataset.tip = cell.title; cell.removeAttribute("title"); }
    tip.textContent = place(cell) + cell.dataset.tip;
    const box = cell.getBoundingClientRect(), below = box.bottom + 6, above = box.top - tip.offsetHeight - 6;
    tip.style.left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = (below + tip.offsetHeight > innerHeight ? above : below) + "px";
  };
  for (const kind of ["pointerover", "click", "focusin"]) document.addEventListener(kind, show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, true);
})();
