"""A page in a real browser: headless Chromium, where it is installed."""

import shutil
import subprocess
import tempfile

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def browser():
    """Path of the browser; the test is skipped where there is none."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    return found


def run(*words):
    """What the browser prints; it sees no network."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        command += ["--proxy-server=127.0.0.1:1", f"--user-data-dir={profile}", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def document(file, probe="", width=1300, dark=False):
    """
    The document after its scripts have run, in a frame of some width; `probe` is a script that is run in it, and what
    it assigns to `result` is in the document as `<pre id="probe">`.
    """
    words = ["--force-dark-mode"] if dark else []
    page = file.read_text(encoding="utf-8")
    page = page.replace(
        "</body>",
        f"<script>{{let result = null; {probe}; const out = document.createElement('pre'); out.id = 'probe';"
        "out.textContent = JSON.stringify(result); document.body.append(out);}</script></body>",
    )
    copy = file.with_name(f"probed-{width}-{dark}.html")
    copy.write_text(page, encoding="utf-8")
    frame = file.with_name(f"frame-{width}-{dark}.html")
    # A window is never narrower than some 500 pixels, a frame is.
    frame.write_text(
        f"<body><iframe id='f' src='{copy.name}' style='width:{width}px;height:900px;border:0'></iframe>"
        "<pre id='out'></pre><script>f.onload = () => { out.textContent = f.contentDocument.getElementById('probe')"
        ".textContent; };</script></body>"
    )
    return run(
        "--allow-file-access-from-files", "--virtual-time-budget=5000", *words, "--dump-dom", frame.resolve().as_uri()
    )
