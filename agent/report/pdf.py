"""A report as PDF: its HTML laid out on A4 by WeasyPrint, so that no figure is written down twice.

Chart and slide map become vectors, the label stands at the head of every page, and nothing is fetched. Needs the extra
`report` and the library Pango, which is no Python package: docs/decisions/0006-a-pdf-is-the-html-on-paper.md.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

from agent.errors import ConfigError

HOW_TO_GET_PANGO = (
    "`apt install libpango-1.0-0 libpangoft2-1.0-0 libharfbuzz-subset0 fonts-dejavu-core` brings what is missing"
)

# In the margins: the label above, what it is and the number of the page below.
_PAPER = """
@page{{size:A4;margin:24mm 15mm 18mm;
@top-center{{content:{notice};width:100%;height:7mm;margin:11mm 0 6mm;vertical-align:middle;text-align:center;
font:700 9pt "DejaVu Sans",sans-serif;color:#a40000;border:.8pt solid #a40000}}
@bottom-left{{content:{foot};font:7.5pt "DejaVu Sans",sans-serif;color:#444;white-space:nowrap}}
@bottom-right{{content:"Page " counter(page) " of " counter(pages);font:7.5pt "DejaVu Sans",sans-serif;color:#444}}}}
:root{{font:9pt/1.42 "DejaVu Sans",sans-serif}}
.hv{{display:block;max-width:none;padding:0}}
.hv>header,.hv>footer{{display:none}}
h1{{margin-top:0}}th,td{{padding:.2rem .35rem}}
"""


def render_pdf(html: str, notice: str, foot: str) -> bytes:
    """A page of `agent.report.html` on paper; notice, foot: text of the margins. Raises ConfigError: not here."""
    weasyprint = _weasyprint()
    paper = _PAPER.format(notice=_css_text(notice), foot=_css_text(foot))
    fetcher = weasyprint.URLFetcher(allowed_protocols=("data",))
    document = weasyprint.HTML(string=html.replace("</head>", f"<style>{paper}</style></head>", 1), url_fetcher=fetcher)
    made: bytes = document.write_pdf(pdf_tags=True)
    return made


def _css_text(text: str) -> str:
    """A string of CSS in which nothing but letters and digits stands for itself."""
    return '"' + "".join(c if c.isascii() and c.isalnum() else f"\\{ord(c):06x}" for c in text) + '"'


def _weasyprint() -> Any:
    """The library. Its own word on a page that is not perfect (a style for screens) goes to nobody."""
    try:
        with warnings.catch_warnings():
            # Without a font a page would have boxes for letters.
            warnings.filterwarnings("error", message=".*FontConfig.*")
            import weasyprint
            import weasyprint.urls
    except ModuleNotFoundError as error:
        fault = f"{error.name} is not installed; `pip install 'hematovision-agent[report]'` brings it"
        raise ConfigError("hematovision report --format pdf", (fault,)) from None
    except OSError as error:
        words = str(error).splitlines()[0]
        raise ConfigError("hematovision report --format pdf", (f"{words}; {HOW_TO_GET_PANGO}",)) from error
    except UserWarning as error:
        raise ConfigError("hematovision report --format pdf", (f"no font is here; {HOW_TO_GET_PANGO}",)) from error
    logging.getLogger("weasyprint").setLevel(logging.ERROR)
    return weasyprint
