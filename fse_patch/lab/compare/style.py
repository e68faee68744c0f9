"""How the page of a comparison looks: light and dark as the reader's system, narrow and wide."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1b1f24; --paper: #ffffff; --soft: #5b6470; --line: #d5dae0; --track: #eef1f4;
  --faster: #1a7f37; --slower: #c62828; --same: #6e7781;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e9ee; --paper: #14171b; --soft: #9aa4b0; --line: #353c45; --track: #22272e;
    --faster: #3fb950; --slower: #f47067; --same: #8b949e;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 72rem; padding: 1rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.4rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 1.75rem 0 .5rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.faster { --own: var(--faster); }
.slower { --own: var(--slower); }
.same { --own: var(--same); }
.verdict { font-size: 1.15rem; border-left: .3rem solid var(--own); padding: .1rem .75rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: .25rem 0; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td.words, th.words { text-align: left; white-space: normal; }
td.words { color: var(--own, inherit); min-width: 8rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
.chart {
  display: grid; grid-template-columns: max-content 1fr max-content; gap: .45rem .6rem; align-items: center;
}
.chart .label { color: var(--soft); text-align: right; }
.track { position: relative; height: 1.3rem; background: var(--track); border-radius: .2rem; }
.bar { position: absolute; inset: 0 auto 0 0; background: var(--own); border-radius: .2rem; opacity: .85; }
.span { position: absolute; top: .25rem; bottom: .25rem; border: solid var(--ink); border-width: 0 2px; }
.span::after {
  content: ""; position: absolute; left: 0; right: 0; top: calc(50% - 1px); border-top: 2px solid var(--ink);
}
.one { position: absolute; top: -.25rem; bottom: -.25rem; border-left: 2px dashed var(--ink); }
@media (max-width: 30rem) {
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: .4rem; }
  td, th { padding: .3rem .15rem; font-size: .8rem; white-space: normal; }
  td.words { min-width: 0; }
  td.words, th.words { padding-left: .5rem; }
}
"""
