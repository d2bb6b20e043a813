"""The page in a real browser, Debian's Chromium: what a parser can't tell."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_parts import WriteRun, attempt, run_config, step_lines

from cosmos_hpc.config.run_folder import ExperimentFolder
from cosmos_hpc.report.page import write_report

ASK = """<script>
const heading = [...document.querySelectorAll("#runs thead th")].find(head => head.innerText.startsWith("gain"));
const rows = () => [...document.querySelectorAll("#runs tbody tr th")].map(cell => cell.innerText.slice(0, 3));
const seen = [rows()];
heading.click(); seen.push(rows());
heading.click(); seen.push(rows());
const overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const curve = document.querySelector("#psnr-curves svg").getBoundingClientRect();
document.body.innerHTML = "";
document.body.append("ANSWER" + JSON.stringify({seen, overflow, size: [curve.width, curve.height]}) + "END");
</script></body>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        assert "COSMOS_HPC_REQUIRES_CLUSTER" not in os.environ, "CI has to install chromium"
        pytest.skip("no chromium on this machine: apt-get install chromium")
    return found


def test_page_sorts_by_a_heading_and_fits_the_window(
    chromium: str, tmp_path: Path, experiment: ExperimentFolder, write_run: WriteRun
) -> None:
    for lr, end in ((1e-4, 12.0), (3e-4, 9.5), (1e-3, 14.0), (3e-3, None)):
        scores = {} if end is None else {"val_psnr": end}
        lines = [{"step": 0, "val_psnr": 10.0, "attempt": 0}, *step_lines(1, 39, 0), *step_lines(40, 40, 0, **scores)]
        ended = attempt(0, 0.0, 9.0, "finished", step=40)
        write_run(run_config("gone", lr=lr), lines, {"status": "finished", "attempts": [ended]})
    page = tmp_path / "asked.html"
    page.write_text(write_report(experiment).read_text().replace("</body>", ASK))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom", f"file://{page}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    answer = json.loads(re.search(r"ANSWER(\{.*\})END", done.stdout)[1])  # type: ignore[index]
    # the first click brings the largest to the top, the second the smallest; runs without a number stay last
    assert answer["seen"] == [["000", "001", "002", "003"], ["002", "000", "001", "003"], ["001", "000", "002", "003"]]
    assert answer["overflow"] == 0
    assert min(answer["size"]) > 200
