"""The page that a report is filled into, and its few lines of script: charts drawn, tables sorted by a click."""

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
body { font: 15px/1.5 Helvetica, Arial, 'Liberation Sans', sans-serif; color: #222; max-width: 1000px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem; }
p { margin: .2rem 0 .6rem; max-width: 52rem; }
section > p { color: #555; font-size: 14px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; font-size: 14px; }
dt { color: #666; }
dd { margin: 0; }
.chart, .wide { overflow-x: auto; }
.wide { max-height: 36rem; overflow-y: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; white-space: nowrap; border-bottom: 1px solid #eee; }
th { cursor: pointer; position: sticky; top: 0; background: #fff; font-weight: 600; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
tr.mark td { background: #fdf1e7; }
a { color: #0072b2; }
#framed { position: sticky; top: 0; z-index: 1; background: #eef5fa; border-left: 3px solid #0072b2;
  padding: .3rem .8rem; max-width: none; font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: .8rem; }
figure { margin: 0; }
figure img { width: 100%; image-rendering: pixelated; border: 1px solid #ddd; }
figcaption { font-size: 12px; line-height: 1.3; color: #333; }
</style></head><body>
<h1>$title</h1>$summary
<p id="framed" hidden>Runs open from here by a click with the middle button, or with Ctrl (&#8984; on a Mac) held; a
click on a mark of a chart names its run. <a target="_blank" rel="noopener"></a></p>
<dl>$facts</dl>
$body
<script>$script</script>
<script>
// MLflow shows pages as blobs, from an address that may be a forwarded port, in a frame that opens no link on a click.
const framed = self.origin === "null" && location.protocol === "blob:";
const reached = text => framed ? text.replace(/https?:\\/\\/[^"\\/]+(?=\\/#\\/runs\\/)/g, location.origin) : text;
const note = document.getElementById("framed");
const name_run = url => { note.lastElementChild.href = note.lastElementChild.textContent = url; };
const named = {load: () => Promise.reject(), sanitize: url => { name_run(url); return Promise.reject(); }};
document.querySelectorAll("td a").forEach(link => link.href = reached(link.href));
if (framed) {
  note.hidden = false;
  document.addEventListener("click", event => {
    if (event.target.closest("a[target]") && !event.ctrlKey && !event.metaKey) event.preventDefault();
  });
}
const specs = JSON.parse(reached(JSON.stringify($specs)));
const actions = {export: true, source: false, compiled: false, editor: false};
const options = {actions, renderer: "canvas", loader: framed ? named : {target: "_blank"}};
for (const [name, spec] of Object.entries(specs))
  vegaEmbed("#" + name, spec, options).catch(error => console.error(name, error));
const key = cell => "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent;
const order = (a, b) => typeof a === typeof b ? (a > b) - (a < b) : typeof a === "number" ? -1 : 1;
document.querySelectorAll("th").forEach(head => head.addEventListener("click", () => {
  const column = head.cellIndex, body = head.closest("table").tBodies[0], sign = head.dataset.up === "1" ? -1 : 1;
  head.dataset.up = sign === 1 ? "1" : "0";
  const compare = (a, b) => sign * order(key(a.cells[column]), key(b.cells[column]));
  [...body.rows].sort(compare).forEach(row => body.append(row));
}));
</script></body></html>
""")
