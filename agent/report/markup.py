"""What every page of ours is made of: its style, its frame with the research-use label, and escaped pieces."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

STYLE = """
:root{font:15px/1.45 system-ui,"Segoe UI",Roboto,"Noto Sans",sans-serif;color:#111;background:#fff}
body{margin:0}
.hv{display:table;width:100%;max-width:60rem;margin:0 auto;box-sizing:border-box;padding:0 1rem}
.hv>header,.hv>main{display:block}
.hv>footer{display:table-footer-group;break-inside:avoid}
.ruo{margin:.6rem 0;padding:.35rem .7rem;border:2px solid #a40000;color:#a40000;font-weight:700;text-align:center}
h1{font-size:1.6rem;margin:.6rem 0 .2rem}
h2{font-size:1.15rem;margin:1.5rem 0 .4rem;border-bottom:1px solid #999;break-after:avoid}
h3{font-size:1rem;margin:.9rem 0 .3rem;break-after:avoid}
table{border-collapse:collapse;width:100%;margin:.3rem 0}
caption{text-align:left;font-size:.87rem;color:#333;padding:.2rem 0}
th,td{padding:.22rem .5rem;border-bottom:1px solid #ccc;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr{break-inside:avoid}
h2+.small{break-after:avoid}
dl{break-inside:avoid;display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:.4rem 0}
dt{color:#333}dd{margin:0;overflow-wrap:anywhere}
.flag{font-weight:700;white-space:nowrap}.flag.sure{color:#a40000}
.remarks{border-left:4px solid #b36b00;background:#fff6e5;padding:.3rem .8rem;margin:.6rem 0}
.remarks ul{margin:.2rem 0;padding-left:1.1rem}
svg.chart{width:100%;max-width:680px;height:auto;break-inside:avoid}
svg.map{width:100%;height:auto;border:1px solid #bbb}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;list-style:none;font-size:.9rem}
.legend span{display:inline-block;width:.8rem;height:.8rem;border-radius:50%;margin-right:.35rem}
.kind{display:inline-block;vertical-align:top;max-width:100%;margin-right:1.2rem;break-inside:avoid}
.gallery{margin:.2rem 0;padding:0;list-style:none}
.gallery li{display:inline-block;vertical-align:top;margin:0 .4rem .5rem 0}
.gallery figure{margin:0;width:7.2rem;break-inside:avoid}
.gallery img{width:7.2rem;height:7.2rem;object-fit:contain;border:1px solid #bbb;background:#f4f4f4}
.gallery figcaption{font-size:.75rem;overflow-wrap:anywhere}
th.band{font-weight:400;white-space:nowrap}tbody{break-inside:avoid}
.panels{display:flex;flex-wrap:wrap;gap:.4rem .9rem;padding:0;margin:.4rem 0;list-style:none}
.panels li{width:18rem;break-inside:avoid}.panels svg{width:100%;height:auto}
.small{font-size:.87rem;color:#333}
code{font:.87rem ui-monospace,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
@page{size:A4;margin:14mm 13mm}
@media print{:root{font-size:10.5pt}.hv{max-width:none;padding:0}svg.map{max-height:150mm}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""


def page(title: str, body: str) -> str:
    """A whole file: nothing is fetched, nothing runs."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:;'
        " style-src 'unsafe-inline'\">\n"
        f"<title>{e(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def labelled(notice: str, sections: Iterable[str], foot: str) -> str:
    """The content of a page, the label above it and in the foot that is printed on every page. Needs STYLE.

    sections: HTML, empty ones are left out; notice, foot: text.
    """
    label = e(notice)
    return (
        f'<div class="hv"><header><p class="ruo" role="note">{label}</p></header>\n<main>'
        + "\n".join(section for section in sections if section)
        + f'</main>\n<footer><p class="ruo">{label} <span class="small">{e(foot)}</span></p></footer></div>'
    )


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names with what is to be said of each."""
    return f"<dl>{''.join(f'<dt>{e(name)}</dt><dd>{e(words)}</dd>' for name, words in rows)}</dl>"


def e(words: object) -> str:
    """Text as it may stand in HTML, between tags or in an attribute."""
    return escape(str(words), quote=True)


def n(words: object) -> str:
    """A table's cell with a figure."""
    return f'<td class="n">{e(words)}</td>'


def th(words: str) -> str:
    """The head of a column of figures."""
    return f'<th scope="col" class="n">{e(words)}</th>'
