"""circuitsvis offline: its script inline, once per page, with data that can't leave its element."""

from __future__ import annotations

from pathlib import Path

from qkvnorm_lens.plots.html.safe import script

LOADER = """\
(() => {
  const data = JSON.parse(document.getElementById("circuits").textContent);
  const draw = (place) => {
    const view = data[Number(place.dataset.view)];
    // It numbers what it shows; these tokens have the numbers of their prompt already.
    const tokens = Object.assign([...view.tokens], { map() { return [...this]; } });
    CircuitsVis.render(place.id, CircuitsVis.AttentionHeads, {
      tokens, attention: view.attention,
      attentionHeadNames: view.attentionHeadNames,
      minValue: 0, maxValue: 1, positiveColor: "#0072B2", maskUpperTri: view.maskUpperTri,
    });
  };
  // A view must be seen to be measured: those in a closed tab wait until it opens.
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      draw(entry.target);
    }
  });
  for (const place of document.querySelectorAll(".circuits")) seen.observe(place);
})();
"""


def library() -> str:
    """circuitsvis's own script.

    Raises:
        ImportError: circuitsvis is not installed; names the extra.
    """
    try:
        import circuitsvis
    except ImportError as error:
        raise ImportError(
            "attention views need circuitsvis, which is not installed: "
            "pip install 'qkvnorm-lens[plots]'"
        ) from error
    path = Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js"
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ImportError(
            f"attention views need circuitsvis 1.43, with its script at {path.name}; got none"
        ) from error
    source = source.replace("`(${h.destIdx}, ${h.srcIdx})`,", "")  # as above, in its tooltips
    # Its comments and strings must not end the element that holds it.
    source = source.replace("</script", "<\\/script")
    lines = [line for line in source.splitlines() if not line.startswith("//# sourceMappingURL")]
    source = "\n".join(lines) + "\n"
    script(source)
    return source
