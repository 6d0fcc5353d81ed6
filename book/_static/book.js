// What scrolls sideways can be reached and moved by the keyboard, and says what it is.
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
  let waiting = 0;
  const soon = () => {
    clearTimeout(waiting);
    waiting = setTimeout(mark, 100);
  };
  addEventListener("load", mark);
  addEventListener("resize", soon);
  addEventListener("toggle", soon, true);
})();
