// What scrolls sideways, and what unfolds a list of pages, is reached by the keyboard and says what it is.
(() => {
  const boxes = ".pst-scrollable-table-container, div.cell_output .output, .bd-content pre, .bd-content figure, .math";
  const mark = () => {
    for (const box of document.querySelectorAll(boxes)) {
      const scrolls = box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX !== "visible";
      if (scrolls) {
        box.tabIndex = 0;
        if (!box.hasAttribute("role") && box.tagName !== "FIGURE") {
          box.setAttribute("role", "group");
          box.setAttribute("aria-label", box.querySelector("table") ? "a wide table" : "wide content");
        }
      } else if (box.tabIndex === 0) {
        box.removeAttribute("tabindex");
      }
    }
  };
  const name = () => {
    for (const handle of document.querySelectorAll("nav summary, .sidebar summary, .bd-sidebar-primary summary")) {
      if (!handle.textContent.trim()) handle.setAttribute("aria-label", "pages below");
    }
  };
  let waiting = 0;
  const soon = () => {
    clearTimeout(waiting);
    waiting = setTimeout(mark, 100);
  };
  addEventListener("load", mark);
  addEventListener("DOMContentLoaded", name);
  addEventListener("resize", soon);
  addEventListener("toggle", soon, true);
})();
