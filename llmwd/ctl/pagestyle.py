"""How a report's page looks: on a light and a dark screen, and on paper."""

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c2430; --quiet: #5c6675; --line: #d5dae1; --ground: #f1f3f6;
  --jobs: #c2570c; --ours: #2563ab; --free: #d9e2ec; --other: #7b3fa0; --unknown: #9099a6; --held: #d0a215; --bad: #c01c28; --good: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --ink: #e3e8ee; --quiet: #9aa5b3; --line: #333c48; --ground: #1b212a;
  --jobs: #f08a3c; --ours: #5b9be6; --free: #3a4654; --other: #b98ad6; --unknown: #6b7684; --held: #d8b13a; --bad: #ff6b6b; --good: #56c271; } }
@media print { :root { color-scheme: light; --page: #ffffff; --ink: #000000; --quiet: #444444; --line: #cccccc; --ground: #f1f3f6;
  --jobs: #c2570c; --ours: #2563ab; --free: #d9e2ec; --other: #7b3fa0; --unknown: #9099a6; --held: #d0a215; --bad: #c01c28; --good: #1a7f37; }
  section, figure, tr { break-inside: avoid; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 820px; padding: 28px 20px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 17px; margin: 36px 0 8px; }
p { margin: 0 0 8px; max-width: 46em; }
.quiet, figcaption, th { color: var(--quiet); }
.summary { margin: 18px 0; padding: 14px 18px; background: var(--ground); border-left: 4px solid var(--good); }
.summary.broken { border-color: var(--bad); }
.summary p { font-size: 16px; margin: 0 0 5px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 16px 0; }
.tile { border: 1px solid var(--line); padding: 10px 12px; border-radius: 6px; }
.tile b { display: block; font-size: 21px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { color: var(--quiet); font-size: 13px; }
figure { margin: 8px 0 0; } figcaption { font-size: 13px; margin-top: 6px; }
svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: normal; font-size: 13px; } .number { text-align: right; white-space: nowrap; } td.time { min-width: 11.5em; }
ul { padding-left: 20px; margin: 0; } li { margin-bottom: 4px; }
code { font-family: ui-monospace, "Liberation Mono", monospace; font-size: 13px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; margin: 4px 0 8px; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 6px; vertical-align: -1px; background: currentColor; }
.label { font-size: 11.5px; fill: var(--quiet); } .strong { fill: var(--ink); }
.ground { fill: var(--ground); } .grid, .axis { stroke: var(--line); stroke-width: 1; }
.bar { fill: var(--ours); } .budget { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 6 4; }
.point { fill: var(--ours); stroke: var(--page); stroke-width: 1; }
.point.simulated { fill: var(--page); stroke: var(--ours); stroke-width: 2; }
.point.broken { fill: var(--bad); } .point.simulated.broken { fill: var(--page); stroke: var(--bad); }
.mark { fill: var(--ink); } .mark.broken { fill: var(--bad); }
.of-slurm, .is-yielding { fill: var(--jobs); color: var(--jobs); } .of-llmwd, .is-serving { fill: var(--ours); color: var(--ours); }
.of-free, .is-waiting { fill: var(--free); color: var(--free); } .of-other, .is-loading { fill: var(--other); color: var(--other); }
.of-unknown, .is-unknown { fill: var(--unknown); color: var(--unknown); }
.is-held { fill: var(--held); color: var(--held); } .is-failed { fill: var(--bad); color: var(--bad); } .is-stopped { fill: none; color: var(--ground); }
.bad { color: var(--bad); font-weight: 600; }
"""
