"""The style of the page of a sweep: light and dark, on paper, and on a narrow screen."""

from string import Template

_LIGHT = {
    "text": "#1f2328",
    "dim": "#59636e",
    "ground": "#fff",
    "field": "#f4f6f8",
    "line": "#d5dbe1",
    "blue": "#0072b2",
    "green": "#009e73",
    "grey": "#8a939c",
    "red": "#d55e00",
}
_DARK = {
    "text": "#e3e7ec",
    "dim": "#9aa5b1",
    "ground": "#14181d",
    "field": "#1f252c",
    "line": "#39424c",
    "blue": "#56b4e9",
    "green": "#2cc39a",
    "grey": "#7d8791",
    "red": "#f08a4b",
}
_PAPER = {"text": "#000", "ground": "#fff"}


def _root(colors: dict[str, str]) -> str:
    return ":root{" + ";".join("--" + name + ":" + color for name, color in colors.items()) + "}"


_TEMPLATE = Template(
    """
$light
@media(prefers-color-scheme:dark){$dark figure svg{filter:invert(.91) hue-rotate(180deg)}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:66rem;padding:1rem 1.25rem 3rem;background:$ground;color:$text;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2;margin:.6rem 0 0}h2{font-size:1.2rem;margin:2.2rem 0 .6rem;
border-bottom:1px solid $line;padding-bottom:.25rem}h3{font-size:1rem;margin:1.4rem 0 .4rem}
header p,small,summary,dt{color:$dim}header p{margin:.2rem 0 .8rem}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:.9rem}a{color:$blue}
.verdict{border-left:4px solid $grey;background:$field;padding:.7rem 1rem;margin:.8rem 0;font-size:1.05rem}
.verdict.shown{border-color:$blue}
pre{background:$field;border:1px solid $line;border-radius:6px;padding:.7rem .9rem;margin:.4rem 0;
white-space:pre-wrap;user-select:all;font:.85rem/1.5 ui-monospace,"DejaVu Sans Mono",monospace}
pre+p{margin:.2rem 0 1rem;font-size:.85rem;color:$dim}
figure{margin:1rem 0;overflow-x:auto}figure svg{max-width:100%;min-width:34rem;height:auto;display:block}
.wide{overflow-x:auto;margin:.5rem 0}table{border-collapse:collapse;width:100%;font-size:.88rem}
th,td{text-align:left;padding:.28rem .6rem .28rem 0;border-bottom:1px solid $line;vertical-align:top;
min-width:2rem}th{font-weight:600;color:$dim;white-space:nowrap;vertical-align:bottom}
td{overflow-wrap:normal}td:first-child:not(.n),.n+td:not(.n){overflow-wrap:anywhere;min-width:7rem}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.bar{height:.8rem;margin-top:.3rem;background:$blue;border-radius:1px;min-width:1px}
td:has(.bar){min-width:4rem}.bar.best{background:$green}.bar.last{background:$grey}
.tag{font-size:.72rem;border:1px solid $line;border-radius:9px;padding:0 .45rem;color:$dim;
white-space:nowrap}
svg.row{width:100%;min-width:9rem;height:1rem;display:block;margin-top:.2rem;background:$field;fill:$blue}
svg.row .minus{fill:$red}.why{white-space:pre-line}
summary{cursor:pointer;margin:.4rem 0}dt{margin-top:.5rem;font-size:.85rem}dd{margin:0}
@media(max-width:36rem){body{padding:.5rem .9rem 2rem}td,th{padding-right:.4rem}
td:first-child:not(.n),.n+td:not(.n){min-width:5rem}td:has(.bar){min-width:2.5rem;width:4rem}svg.row{min-width:7rem}}
@media print{$paper nav{display:none}body{max-width:none;padding:0;font-size:11px}
tr,figure,.verdict{break-inside:avoid}h2,h3{break-after:avoid}figure svg{filter:none;min-width:0}
.bar,svg.row,.verdict{print-color-adjust:exact;-webkit-print-color-adjust:exact}
details::details-content{content-visibility:visible;height:auto}summary{display:none}.wide{overflow:visible}}
"""
)
STYLE = _TEMPLATE.substitute(
    {name: "var(--" + name + ")" for name in _LIGHT}, light=_root(_LIGHT), dark=_root(_DARK), paper=_root(_PAPER)
)
