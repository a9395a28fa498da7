"""The picture in docs/report.md: the page of a run in headless Chromium.

    python examples/report_picture.py RUN [--item 0] [--out docs/images/report.png]

Needs chromium and chromium-driver (Debian's packages of these names).
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from aiba_eval.report import write_report

OUT = Path(__file__).resolve().parent.parent / "docs" / "images" / "report.png"
#: what is set before the picture is taken
SET = """
document.documentElement.style.scrollBehavior = "auto";
document.querySelector(`input[name=item][value="${arguments[0]}"]`).click();
const level = document.getElementById("level");
level.value = level.max;
level.dispatchEvent(new Event("input"));
document.getElementById("audio").currentTime = arguments[1];
document.getElementById("viewer").scrollIntoView();
document.querySelector("nav").hidden = true;
"""


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a folder that aiba evaluate wrote")
    parser.add_argument("--item", type=int, default=0, help="which item of the page, 0 the best")
    parser.add_argument("--seconds", type=float, default=1.1, help="where the cursor stands")
    parser.add_argument("--out", type=Path, default=OUT, help="file to write")
    given = parser.parse_args(arguments)
    options = Options()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    with tempfile.TemporaryDirectory() as folder:
        written = write_report(given.run, out=Path(folder) / "report", items=4, figures=False)
        driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
        try:
            window = {"width": 1100, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
            driver.get((written.out / "report.html").as_uri())
            driver.execute_script(SET, given.item, given.seconds)
            driver.implicitly_wait(5)
            driver.execute_async_script("setTimeout(arguments[0], 500)")
            taken = driver.find_element("id", "viewer").screenshot_as_png
        finally:
            driver.quit()
    picture = Image.open(io.BytesIO(taken)).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(given.out, optimize=True)
    return given.out


if __name__ == "__main__":
    print(main())
