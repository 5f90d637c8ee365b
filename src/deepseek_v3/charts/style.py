"""The style sheet of our pages: one column of text; blue shows the data after a run, orange the data before it."""

STYLE = """\
:root {
  --paper: #fdfdfc; --panel: #f3f4f5; --ink: #1c2127; --soft: #58626d; --line: #dfe3e7;
  --after: #1763ab; --before: #d8690a; --before-area: #f9e0c8; --other: #7b848e;
  --mark: #fce1c4; --alarm: #a8201a; --alarm-area: #fdeeec;
  --series-a: #1763ab; --series-b: #c85a00; --series-c: #1f8a4c; --series-d: #8b3fb5; --series-e: #b0267a;
  --series-f: #5f6b76;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --panel: #1f2328; --ink: #e3e6e9; --soft: #a2abb4; --line: #32383f;
    --after: #5ba4ee; --before: #ef9a4d; --before-area: #49331f; --other: #8b949e;
    --mark: #5a3d1e; --alarm: #ff938a; --alarm-area: #351c1b;
    --series-a: #5ba4ee; --series-b: #ef9a4d; --series-c: #58c486; --series-d: #c490ea; --series-e: #f07bb5;
    --series-f: #a2abb4;
  }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; scroll-behavior: smooth; scroll-padding-top: 3.5rem; }
body {
  margin: 0 auto; max-width: 64rem; padding: 2.5rem 1.5rem 5rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1, h2, h3, h4 { line-height: 1.25; font-weight: 600; text-wrap: balance; }
h1 { font-size: 1.75rem; margin: 0 0 1.5rem; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; margin: 0 0 1rem; }
h3 { font-size: 1rem; margin: 2rem 0 0.5rem; }
h4 { font-size: 0.9375rem; margin: 0 0 0.5rem; }
p { margin: 0 0 0.75rem; max-width: 46rem; }
a { color: var(--after); text-underline-offset: 0.2em; text-decoration-thickness: 1px; }
code { font: 0.875em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
:focus-visible { outline: 2px solid var(--after); outline-offset: 2px; }
main > section { margin-top: 3.5rem; }
figure { margin: 0; min-width: 0; }
figcaption, .note, .legend { color: var(--soft); font-size: 0.875rem; }
.note { margin-top: 0.5rem; }
nav {
  position: sticky; top: 0; z-index: 1; display: flex; gap: 0.25rem 1.25rem; overflow-x: auto; margin-top: 2rem;
  padding: 0.75rem 0; background: var(--paper); border-bottom: 1px solid var(--line); font-size: 0.875rem;
}
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }

.bar {
  display: block; width: 100%; height: 0.625rem; background: var(--panel); border-radius: 2px; overflow: hidden;
}
.bar rect, .key rect, .chart .after { fill: var(--other); }
.bar .kept, .bar .after, .key .after, .chart .after { fill: var(--after); }
.bar .dropped, .bar .before, .key .before { fill: var(--before); }
.key { width: 0.75rem; height: 0.75rem; margin: 0 0.25rem 0 0.75rem; vertical-align: -0.0625rem; }
.key:first-child { margin-left: 0; }

figure + .scroll, figure + .charts { margin-top: 1.5rem; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: 0 0 0.5rem; }
th, td {
  padding: 0.3125rem 0 0.3125rem 1rem; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: baseline;
}
th:first-child { padding-left: 0; }
thead th { font-weight: 400; color: var(--soft); white-space: nowrap; border-bottom-color: var(--soft); }
th[scope=row], .left, .group th { text-align: left; font-weight: 400; }
th[scope=row] { overflow-wrap: anywhere; min-width: 8rem; }
.group th { font-weight: 600; padding-top: 1.125rem; }
td { white-space: nowrap; }
td.left { white-space: normal; min-width: 14rem; }
td:has(.bar) { width: 30%; min-width: 6rem; vertical-align: middle; }
td:has(.bar):nth-last-child(2) { width: 60%; }

.charts { columns: 26rem; column-gap: 3rem; }
.charts figure { break-inside: avoid; padding-bottom: 2.5rem; }
.chart { display: block; overflow: visible; width: calc(100% - 3.75rem); margin: 0 0.75rem 0.25rem 3rem; }
.chart text { font-size: 0.75rem; fill: var(--soft); font-variant-numeric: tabular-nums; }
.chart .grid { stroke: var(--line); }
.chart .tick { stroke: var(--soft); }
.chart .before-area { fill: var(--before-area); }
.chart .before-line { fill: none; stroke: var(--before); stroke-width: 1.75px; stroke-linejoin: round; }
.s0 { --colour: var(--series-a); } .s1 { --colour: var(--series-b); } .s2 { --colour: var(--series-c); }
.s3 { --colour: var(--series-d); } .s4 { --colour: var(--series-e); } .s5 { --colour: var(--series-f); }
.chart .line { fill: none; stroke: var(--colour); stroke-width: 1.75px; stroke-linejoin: round; }
.chart .dashed { stroke-dasharray: 5 4; }
.chart .dots { fill: none; stroke: var(--colour); stroke-width: 6px; stroke-linecap: round; }
.chart .band { fill: var(--colour); fill-opacity: 0.16; }
.chart .marker { stroke: var(--soft); stroke-dasharray: 2 3; }
.chart .marker.alarm { stroke: var(--alarm); stroke-dasharray: none; }
.key .swatch { fill: var(--colour); }
.legend .entry { margin-right: 1.25rem; }
.heat-map { display: flex; gap: 0.5rem; }
.heat-map .rows {
  display: flex; flex-direction: column; justify-content: space-between; flex: none; width: 2.5rem;
  text-align: right; font-size: 0.75rem; line-height: 1; color: var(--soft); font-variant-numeric: tabular-nums;
}
.heat {
  display: block; flex: 1; min-width: 0; width: 100%; image-rendering: pixelated; border: 1px solid var(--line);
}
.heat-key { display: inline-block; width: 0.75rem; height: 0.75rem; vertical-align: -0.0625rem; }
.heat-key.none { background: #be1e28; } .heat-key.below { background: #2e7dd1; }
.heat-key.above { background: #e8771a; }
.chart .hint { fill: transparent; }
.chart .hint:hover { fill: var(--ink); fill-opacity: 0.08; }

.alarms {
  border: 1px solid var(--alarm); border-left-width: 6px; background: var(--alarm-area);
  padding: 0.75rem 1rem; margin-bottom: 1.5rem; border-radius: 4px;
}
.alarms h2 { font-size: 1rem; color: var(--alarm); margin: 0 0 0.25rem; }
.alarms h2::before { content: "\\26a0\\fe0e  "; }
.alarms ul { margin: 0; padding-left: 1.25rem; }
.cards {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1.25rem 1.5rem;
  margin: 0 0 1rem;
}
.card { border-top: 3px solid var(--line); padding-top: 0.5rem; }
.card dt { font-size: 0.875rem; color: var(--soft); }
.card dd { margin: 0; }
.card strong { font-size: 1.625rem; font-weight: 600; font-variant-numeric: tabular-nums; letter-spacing: -0.01em; }
.card span { color: var(--soft); font-size: 0.875rem; white-space: nowrap; }
.card .meaning { font-size: 0.8125rem; color: var(--soft); line-height: 1.35; }
.facts { display: flex; flex-wrap: wrap; gap: 0.5rem 2rem; margin: 0 0 1rem; }
.facts dt { font-size: 0.8125rem; color: var(--soft); }
.facts dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }

summary { cursor: pointer; padding: 0.25rem 0; }
.numbers { font-size: 0.875rem; color: var(--soft); }
.numbers caption { display: none; }
.text {
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.875rem; line-height: 1.5; unicode-bidi: isolate;
}
.text i { font-style: normal; color: var(--alarm); font-size: 0.875em; }
mark { background: var(--mark); color: inherit; border-bottom: 2px solid var(--before); }

@media (max-width: 34rem) {
  .cards { grid-template-columns: 1fr 1fr; }
  body { padding: 1.5rem 1rem 3rem; }
  th, td { padding-left: 0.625rem; }
  td:has(.bar) { min-width: 3rem; }
}
@media print {
  :root {
    --paper: #fff; --panel: #f3f4f5; --ink: #000; --soft: #444; --line: #ccc; --after: #1763ab; --before: #d8690a;
    --before-area: #f9e0c8; --other: #7b848e; --mark: #fce1c4; --alarm: #a8201a; --alarm-area: #fdeeec;
    --series-a: #1763ab; --series-b: #c85a00; --series-c: #1f8a4c; --series-d: #8b3fb5; --series-e: #b0267a;
    --series-f: #5f6b76;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, .numbers { display: none; }
  .scroll { overflow: visible; }
  .charts { columns: auto; }
  tr, figure { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
}
"""
