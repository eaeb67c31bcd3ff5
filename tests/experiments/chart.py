"""A bar chart as SVG, for light and dark backgrounds."""
from html import escape

ROW, BAR, LABELS, BARS, VALUES, HEAD = 40, 14, 190, 380, 150, 64  # pixels
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: bold }
.note { fill: #59636e }
.axis { stroke: #9198a1 }
.spread { stroke: #1f2328 }
.bar0 { fill: #218bff }
.bar1 { fill: #fb8f44 }
.user, .kernel { stroke: #59636e }
.main { stroke: #0969da }
.engine { stroke: #bc4c00 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .note { fill: #9198a1 }
  .axis { stroke: #656c76 }
  .spread { stroke: #f0f6fc }
  .bar0 { fill: #1f6feb }
  .bar1 { fill: #bd561d }
  .user, .kernel { stroke: #9198a1 }
  .main { stroke: #4493f8 }
  .engine { stroke: #f0883e }
}
"""


def text(x, y, content, attributes=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(content)}</text>'


def bar(number, y, value, scale, unit):
    """A bar from the axis to the median, a line from the least to the most, the median as a number;
    or a string in place of the bar."""
    if isinstance(value, str):
        return text(LABELS + 6, y + BAR - 3, value, 'class="note"')
    median, least, most = (LABELS + scale * number for number in value)
    middle = y + BAR / 2
    return (f'<rect class="bar{number}" x="{LABELS}" y="{y}" width="{median - LABELS:.1f}" '
            f'height="{BAR - 1}"/><path class="spread" d="M{least:.1f} {middle}H{most:.1f}"/>'
            + text(most + 6, y + BAR - 3, f"{value[0]:.2f} {unit}"))


def bar_chart(title, unit, series, rows):
    """rows are (label, a value per series); a value is (median, least, most) or a string."""
    highest = max((value[2] for _, values in rows for value in values
                   if not isinstance(value, str)), default=0)
    scale = BARS / (highest or 1)
    width, height = LABELS + BARS + VALUES, HEAD + ROW * len(rows) + 8
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
             f'viewBox="0 0 {width} {height}" role="img">', f"<title>{escape(title)}</title>",
             f"<style>{STYLE}</style>", text(8, 20, title, 'class="title"')]
    for i, name in enumerate(series):
        x = LABELS + i * 200
        parts.append(f'<rect class="bar{i}" x="{x}" y="34" width="{BAR}" height="{BAR}"/>')
        parts.append(text(x + BAR + 6, 46, name))
    for i, (label, values) in enumerate(rows):
        top = HEAD + i * ROW
        parts.append(text(LABELS - 8, top + BAR + 4, label, 'text-anchor="end"'))
        for j, value in enumerate(values):
            parts.append(bar(j, top + j * BAR, value, scale, unit))
    parts.append(f'<path class="axis" d="M{LABELS} {HEAD - 6}V{height - 6}"/></svg>')
    return "\n".join(parts) + "\n"
