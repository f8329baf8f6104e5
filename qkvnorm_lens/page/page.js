"use strict";
(() => {
  const all = (what, within) => Array.from((within || document).querySelectorAll(what));
  const root = document.documentElement;

  // Tabs: without this script every section shows.
  const list = document.querySelector(".tabs");
  const sections = all("section[data-tab]");
  const choose = (name, focus) => {
    for (const section of sections) section.hidden = section.dataset.tab !== name;
    for (const tab of all("button", list)) {
      const on = tab.dataset.tab === name;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      if (on && focus) tab.focus();
    }
  };
  if (list) {
    list.hidden = false;
    const tabs = all("button", list);
    tabs.forEach((tab, i) => {
      tab.addEventListener("click", () => choose(tab.dataset.tab));
      tab.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (step) choose(tabs[(i + step + tabs.length) % tabs.length].dataset.tab, true);
      });
    });
    choose(tabs[0].dataset.tab);
  }

  // Light and dark: the system's, until one is chosen.
  const theme = document.querySelector(".theme");
  if (theme) {
    theme.hidden = false;
    const dark = () => root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    const name = () => { theme.textContent = dark() ? "Light" : "Dark"; };
    theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); });
    name();
  }

  // Tables: a click on a column's name sorts; what is no number comes last.
  for (const table of all("table.sortable")) {
    all("th", table).forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        all("th", table).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const body = table.tBodies[0];
        const key = (row) => row.cells[column].dataset.value;
        const words = head.classList.contains("text");
        const rows = Array.from(body.rows).map((row, i) => [row, i]);
        rows.sort(([a, i], [b, j]) => {
          const [x, y] = [key(a), key(b)];
          if (words) return (up ? 1 : -1) * x.localeCompare(y, undefined, { numeric: true }) || i - j;
          if (x === "" || y === "") return (x === "") - (y === "") || i - j;
          return (up ? 1 : -1) * (Number(x) - Number(y)) || i - j;
        });
        for (const [row] of rows) body.appendChild(row);
      });
    });
  }

  // What scrolls says so, and can be reached by keyboard.
  for (const box of all(".wide")) {
    const cue = box.nextElementSibling;
    const look = () => {
      const right = box.scrollWidth - box.clientWidth, below = box.scrollHeight - box.clientHeight;
      const more = [right - box.scrollLeft > 2 && "right", below - box.scrollTop > 2 && "below"];
      box.dataset.more = more.filter(Boolean).join(" ");
      if (right > 2 || below > 2) box.tabIndex = 0; else box.removeAttribute("tabindex");
      if (cue && cue.classList.contains("cue")) cue.hidden = right <= 2 && below <= 2;
    };
    box.addEventListener("scroll", look, { passive: true });
    new ResizeObserver(look).observe(box);
  }

  // Tooltips of the pictures, without the browser's delay.
  const tip = document.createElement("div");
  tip.id = "tip";
  document.body.appendChild(tip);
  for (const picture of all("svg")) {
    for (const title of all("title", picture)) {
      title.parentNode.dataset.tip = title.textContent;
      title.remove();
    }
    picture.addEventListener("mousemove", (event) => {
      const said = event.target.dataset ? event.target.dataset.tip : "";
      tip.style.display = said ? "block" : "none";
      tip.textContent = said || "";
      tip.style.left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8) + "px";
      tip.style.top = event.clientY + 14 + "px";
    });
    picture.addEventListener("mouseleave", () => { tip.style.display = "none"; });
  }
})();
