"""The report's page in a browser: nothing is logged, controls work by mouse and keyboard, no prompt becomes a script.

Needs Debian's chromium and chromium-driver (``make browser`` installs them); skipped where they are not.
"""

from __future__ import annotations

import os
import shutil
import time

import pytest

from aiba_eval.report import Entries
from aiba_eval.report.page import page
from tests.report_runs import PROMPT, make_run

pytest.importorskip("selenium", reason="selenium is not installed: pip install 'aiba[dev]'")

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="chromium and chromedriver are not installed: `make browser`, or apt-get install chromium chromium-driver",
)

#: what a canvas shows
PIXELS = "return document.getElementById(arguments[0]).toDataURL()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def address(folder):
    path = folder / "report.html"
    path.write_text(page(Entries(make_run(folder / "run", pieces=3)), items=3), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def driver():
    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--mute-audio", "--window-size=1200,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    made.set_script_timeout(60)
    yield made
    made.quit()


@pytest.fixture
def browser(driver, address):
    emulate(driver)
    driver.get(address)
    wait(lambda: driver.execute_script("return !!document.getElementById('cursor').dataset.x"))
    yield driver
    assert logged(driver) == []


def emulate(driver, scheme="light", motion="no-preference"):
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": motion},
    ]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def logged(driver):
    return [entry["message"] for entry in driver.get_log("browser")]


def wait(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return found


def pixels(driver, name="view"):
    return driver.execute_script(PIXELS, name)


def press(driver, name, *keys):
    element = driver.find_element(By.ID, name)
    element.send_keys(*keys)
    return element


def text(driver, name):
    return driver.find_element(By.ID, name).text


def focused(driver):
    element = driver.switch_to.active_element
    return element.get_attribute("id") or element.get_attribute("name") or element.tag_name


def test_every_control_changes_what_is_drawn(browser):
    seen = [pixels(browser)]

    def changed():
        now = pixels(browser)
        assert now not in seen
        seen.append(now)

    press(browser, "layer", Keys.ARROW_RIGHT)
    assert "down.0.attn2 (16 × 8)" in text(browser, "layer-text")
    changed()
    press(browser, "level", Keys.ARROW_RIGHT)
    assert text(browser, "level-text") == "t = 800"
    changed()
    press(browser, "opacity", Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert text(browser, "opacity-text") == "70 %"
    changed()
    press(browser, "target", "dom")
    assert browser.find_element(By.ID, "target").get_property("value") == "dominance"
    changed()
    browser.find_element(By.CSS_SELECTOR, "#words input").send_keys(Keys.SPACE)
    changed()
    press(browser, "layer", Keys.HOME)
    changed()
    press(browser, "variant", "spatial")
    assert browser.find_element(By.ID, "variant").get_property("value") == "1"
    changed()
    press(browser, "layer", Keys.END)
    assert not browser.find_element(By.ID, "variant").is_enabled()  # a variant is of all layers


def test_words_blend(browser):
    boxes = browser.find_elements(By.CSS_SELECTOR, "#words input")
    assert [box.is_selected() for box in boxes] == [True, True]
    both = pixels(browser)
    boxes[0].send_keys(Keys.SPACE)
    second = pixels(browser)
    boxes[0].send_keys(Keys.SPACE)
    boxes[1].send_keys(Keys.SPACE)
    first = pixels(browser)
    boxes[0].send_keys(Keys.SPACE)
    assert len({both, first, second, pixels(browser)}) == 4
    assert "No word is switched on" in text(browser, "legend")
    press(browser, "opacity", Keys.HOME)
    boxes[1].send_keys(Keys.SPACE)
    assert text(browser, "opacity-text") == "0 %"


def test_another_item_is_shown_with_its_own_scores(browser):
    before = pixels(browser)
    assert [a.is_displayed() for a in browser.find_elements(By.CSS_SELECTOR, "article.item")] == [True, False, False]
    browser.find_element(By.CSS_SELECTOR, "input[name=item]:checked").send_keys(Keys.ARROW_RIGHT)
    assert [a.is_displayed() for a in browser.find_elements(By.CSS_SELECTOR, "article.item")] == [False, True, False]
    assert pixels(browser) != before
    assert text(browser, "prompt") == "a song with bass and drums"


def test_the_cursor_follows_the_audio(browser):
    place = "return [Number(cursor.dataset.x), audio.currentTime, Number(seek.value)]"
    named = "const [cursor, audio, seek] = ['cursor', 'audio', 'seek'].map((id) => document.getElementById(id));"
    ready = "return document.getElementById('audio').readyState >= 2"
    wait(lambda: browser.execute_script(ready))
    start = browser.execute_script(named + place)
    assert start[1:] == [0, 0]
    before = pixels(browser, "cursor")
    browser.execute_script("document.getElementById('audio').currentTime = 1")
    middle = wait(lambda: (now := browser.execute_script(named + place))[0] > start[0] and now)
    assert middle[1:] == [1, 1]
    assert pixels(browser, "cursor") != before
    press(browser, "seek", Keys.END)
    end = wait(lambda: (now := browser.execute_script(named + place))[0] > middle[0] and now)
    assert end[0] - start[0] == pytest.approx(2 * (middle[0] - start[0]), abs=0.5)  # 2 s of audio
    press(browser, "seek", Keys.HOME)
    assert "of 2.0 s" in text(browser, "clock")
    # by the mouse: the middle of the canvas lies in the first 2 s
    browser.find_element(By.ID, "view").click()
    wait(lambda: browser.execute_script(named + place)[1] > 0.5)


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_it_plays_and_pauses(browser, motion):
    emulate(browser, motion=motion)
    wait(lambda: browser.execute_script("return document.getElementById('audio').readyState >= 2"))
    press(browser, "seek", Keys.HOME)
    button = press(browser, "play", Keys.ENTER)
    wait(lambda: button.get_attribute("aria-pressed") == "true")
    assert button.text == "Pause"
    first = browser.execute_script("return Number(document.getElementById('cursor').dataset.x)")
    wait(lambda: browser.execute_script("return Number(document.getElementById('cursor').dataset.x)") > first)
    if button.get_attribute("aria-pressed") == "true":
        button.send_keys(Keys.SPACE)
    wait(lambda: button.get_attribute("aria-pressed") == "false")
    assert button.text == "Play"


def test_everything_is_reached_by_the_keyboard_and_shows_it(browser):
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    reached, outlined = [], []
    for _ in range(40):
        reached.append(focused(browser))
        outlined.append(
            browser.execute_script(
                "const e = document.activeElement, s = getComputedStyle(e), n = e.nextElementSibling;"
                "return s.outlineStyle !== 'none' || (n && getComputedStyle(n).outlineStyle !== 'none')"
            )
        )
        if reached[-1] == "target":
            break
        browser.switch_to.active_element.send_keys(Keys.TAB)
    expected = ["theme", "item", "play", "seek", "opacity", "layer", "level", "variant", "target"]
    assert [name for name in reached if name in expected] == expected, reached
    assert all(outlined), list(zip(reached, outlined, strict=True))
    assert reached[0] == "a"  # the link that skips to the maps


def test_light_and_dark_differ_and_can_be_chosen(browser):
    def look():
        colour = "return getComputedStyle(document.body).backgroundColor"
        return browser.execute_script(colour), pixels(browser)

    light = look()
    emulate(browser, "dark")
    wait(lambda: look()[1] != light[1])
    dark = look()
    assert dark[0] != light[0]
    choice = {e.get_attribute("value"): e for e in browser.find_elements(By.CSS_SELECTOR, "input[name=theme]")}
    choice["auto"].send_keys(Keys.ARROW_RIGHT)
    assert choice["light"].is_selected() and look() == light
    choice["light"].send_keys(Keys.ARROW_RIGHT)
    assert choice["dark"].is_selected() and look() == dark
    emulate(browser, "light")
    assert look() == dark
    choice["dark"].send_keys(Keys.ARROW_RIGHT)
    assert choice["auto"].is_selected() and look() == light


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_its_window(browser, width):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        wait(lambda: browser.execute_script("return window.innerWidth") == width)
        drawn = "return document.getElementById('view').getBoundingClientRect().width"
        wait(lambda: browser.execute_script(drawn) <= width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_prints_in_light_with_everything_unfolded(browser):
    emulate(browser, "dark")
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script("return document.querySelectorAll('details:not([open])').length") == 0
    assert browser.execute_script("return document.documentElement.dataset.theme") == "light"
    browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script("return document.querySelectorAll('details:not([open])').length") > 0
    assert browser.execute_script("return document.documentElement.dataset.theme ?? 'auto'") == "auto"


def test_a_prompt_runs_nothing(driver, folder):
    path = folder / "hostile.html"
    path.write_text(page(Entries(make_run(folder / "hostile", pieces=2, hostile=True)), items=2), encoding="utf-8")
    emulate(driver)
    driver.get(path.as_uri())
    wait(lambda: driver.execute_script("return !!document.getElementById('cursor').dataset.x"))
    assert driver.execute_script("return window.injected === undefined")
    shown = driver.execute_script("return document.getElementById('prompt').textContent")
    assert shown == PROMPT
    assert driver.execute_script("return document.querySelectorAll('main img, main svg[onload], main i').length") == 0
    assert logged(driver) == []


def test_the_policy_stops_what_is_not_of_the_page(driver, address):
    emulate(driver)
    driver.get(address)
    driver.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.injected = 1'; document.body.append(s);"
        "const i = document.createElement('img'); i.src = 'https://example.org/x.png'; document.body.append(i);"
    )
    wait(
        lambda: (
            len(refused := [m for m in driver.get_log("browser") if "Content Security Policy" in m["message"]]) > 0
            and refused
        )
    )
    assert driver.execute_script("return window.injected === undefined")
    logged(driver)


@pytest.mark.parametrize("missing", [{"maps": False}, {"audio": False}, {"scores": False, "controls": False}])
def test_a_page_with_missing_parts_works(driver, folder, missing):
    name = "-".join(missing)
    path = folder / f"{name}.html"
    path.write_text(page(Entries(make_run(folder / name, pieces=1, **missing)), items=1), encoding="utf-8")
    emulate(driver)
    driver.get(path.as_uri())
    wait(lambda: driver.execute_script("return !!document.getElementById('cursor').dataset.x"))
    assert driver.find_element(By.ID, "layer").is_enabled() == ("maps" not in missing)
    assert driver.find_element(By.ID, "play").is_enabled() == ("audio" not in missing)
    before = pixels(driver)
    driver.find_element(By.CSS_SELECTOR, "#words input").send_keys(Keys.SPACE)
    assert pixels(driver) != before
    if "audio" in missing:
        at = driver.execute_script("return Number(document.getElementById('cursor').dataset.x)")
        press(driver, "seek", Keys.ARROW_RIGHT)
        assert driver.execute_script("return Number(document.getElementById('cursor').dataset.x)") > at
    assert logged(driver) == []
