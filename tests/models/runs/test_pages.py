"""Reports as a browser shows them: every picture is there, without a network."""

import re
import shutil
import subprocess

import pytest
from PIL import Image

from models.probes import Report
from models.runs.pages import page, table
from models.runs.results import PAGE, keep

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ALONE = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
# writes into the page what the browser has made of every picture
WIDTHS = (
    "<script>onload = () => { document.body.dataset.widths = [...document.images].map(i => i.naturalWidth) }</script>"
)


@pytest.fixture
def written(tmp_path):
    """The page of a report with two pictures, a table longer than what is shown, and awkward text."""
    pictures = {"cat": Image.new("RGB", (30, 20), "red"), "dog": Image.new("L", (50, 20), 80)}
    rows = [{"layer": f"<b>{i}</b>", "entropy": i / 3} for i in range(60)]
    report = Report(
        {"entropy": 0.5}, pictures=pictures, captions={"cat": 'a "cat" & <i>'}, tables={"layers": rows}, lines=["a < b"]
    )
    said = keep(report, tmp_path, "digits-32", {"arguments": "probe=x input='a b'"}, "x: <model>")
    assert f"{PAGE}, layers.csv, cat.png, dog.png" in said[-1]
    return tmp_path / "digits-32" / PAGE


def test_a_report_is_a_page(written):
    text = written.read_text()
    assert text.count("<img") == 2 and "alt='a &quot;cat&quot; &amp; &lt;i&gt;'" in text
    assert "<h1>x: &lt;model&gt;</h1>" in text and "<p>a &lt; b</p>" in text and "<b>0</b>" not in text
    assert "the first 50 of 60 rows" in text and "python eval.py probe=x" in text
    assert not re.search(r"(src|href)='(?!data:)", text)


def test_no_pictures_no_page(tmp_path):
    assert PAGE not in "".join(keep(Report({"a": 1}, tables={"t": [{"a": 1}]}), tmp_path, "x", {}))
    assert page("t", ["", table([["a"], ["1"]])]).count("<tr>") == 2


@pytest.mark.full
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_shows_every_picture(written, tmp_path):
    watched = written.with_name("watched.html")
    watched.write_text(written.read_text() + WIDTHS)
    command = [BROWSER, *ALONE, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", watched.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert 'data-widths="30,50"' in done.stdout, done.stderr
