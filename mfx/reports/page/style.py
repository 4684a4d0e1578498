"""The style sheet of the page, for light and dark, wide and narrow screens."""

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1c2330; --dim: #5b6577; --rule: #d5dbe4; --panel: #f5f7fa;
  --plain: #5b6577; --second: #c46a12; --momentum: #2f6fde; --fourth: #23854f; --fifth: #9a3f86; --sixth: #7d6030; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161d; --ink: #e6eaf0; --dim: #9aa5b5; --rule: #323b49;
  --panel: #1a202a; --plain: #aab4c3; --second: #f0a04b; --momentum: #6ea1ff; --fourth: #58c98b; --fifth: #d986c6;
  --sixth: #c9a86a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 62rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; } .dim, small, figcaption { color: var(--dim); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .85rem; }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; padding: .7rem; margin: .4rem 0;
  overflow: auto; max-height: 30rem; }
.verdict { font-size: 1.1rem; font-weight: 600; margin: .8rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem;
  margin: 1rem 0; padding: 0; }
.card { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.35rem; line-height: 1.3; }
.wide { overflow-x: auto; } figure { margin: .6rem 0; overflow-x: auto; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--dim); font-weight: 500; } td.number, th.number { text-align: right; white-space: nowrap; }
td.name { overflow-wrap: anywhere; min-width: 8rem; } th, td { overflow-wrap: normal; }
details { border: 1px solid var(--rule); border-radius: 6px; padding: .5rem .8rem; margin: .5rem 0; }
summary { cursor: pointer; } ul { margin: .4rem 0; padding-left: 1.2rem; }
.plot { width: 100%; max-width: 44rem; } .plot text { fill: var(--dim); font: 12px system-ui, sans-serif; }
.plot .grid { stroke: var(--rule); } .plot polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.way0 { stroke: var(--plain); } .way1 { stroke: var(--second); } .way2 { stroke: var(--momentum); }
.way3 { stroke: var(--fourth); } .way4 { stroke: var(--fifth); } .way5 { stroke: var(--sixth); }
.plot circle { fill: var(--ground); stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; }
.legend svg { vertical-align: middle; margin-right: .4rem; } .legend line { stroke-width: 3; }
@media (max-width: 40rem) { body { padding: .8rem; } thead { display: none; } table, tbody, tr { display: block; }
  tr { border-bottom: 1px solid var(--rule); padding: .4rem 0; } td, td.number { display: flex; border: 0;
  padding: .1rem 0; justify-content: space-between; gap: 1rem; text-align: right; white-space: normal; }
  td.name { font-weight: 600; }
  td::before { content: attr(data-label); color: var(--dim); font-weight: 400; } }
@media print { pre { max-height: none; white-space: pre-wrap; } }
"""
