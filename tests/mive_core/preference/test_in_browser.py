"""The page in Chromium, from file:// to the report: needs selenium, Chromium and its driver."""

import json
import shutil
import time

import pytest
from preference_study import SYSTEMS

from mive_core.preference.report import make_report
from mive_core.preference.votes import read_key, read_votes

CHROMIUM, DRIVER = (next(filter(None, map(shutil.which, names)), None) for names in (("chromium", "google-chrome", "chrome"), ("chromedriver",)))
try:
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
except ImportError:
    webdriver = None
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (CHROMIUM and DRIVER and webdriver), reason="needs selenium, Chromium and chromedriver")]
FIRST, SECOND = SYSTEMS


@pytest.fixture
def browser(page, tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,800"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get(page.as_uri())
        yield driver
    finally:
        driver.quit()


def wait(condition, seconds: float = 20):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)
    return value


def wait_for_pair(browser, position: int, left: str | None = None):
    """Waits until the pair of that number can be voted on, with this video on the left."""
    wait(
        lambda: (
            browser.find_element(By.ID, "pair").is_displayed()
            and browser.find_element(By.CSS_SELECTOR, "#choices button").is_enabled()
            and shown(browser)[2] == position
            and left in (None, shown(browser)[0])
        )
    )


def press(browser, *keys: str):
    ActionChains(browser).send_keys(*keys).perform()


def shown(browser) -> tuple[str, str, int]:
    """Tokens of the videos and the number of the pair."""
    return tuple(browser.execute_script("return [...sidesOf(session(), comparison()), session().position]"))


def test_from_the_first_pair_to_the_report(browser, page, key, tmp_path):
    """Votes by keys and by mouse, a correction, a reload in the middle; the report has what was meant."""
    system_of = {token: video["system"] for token, video in key["videos"].items()}
    browser.find_element(By.ID, "rater").send_keys('Zoë "宇"', Keys.ENTER)
    for number in range(3):
        wait_for_pair(browser, number)
        left, right, _ = shown(browser)
        wait(lambda: browser.execute_script("return players.every((player) => player.currentTime > 0.1)"))
        times = browser.execute_script("return players.map((player) => player.currentTime)")
        assert max(times) - min(times) < 0.13, "one frame of 8 a second"
        for token in (left, right):
            press(browser, "4" if system_of[token] == FIRST else "2")
        if number == 1:
            browser.refresh()
            wait_for_pair(browser, 1, left)
        if number == 2:
            press(browser, Keys.ARROW_LEFT if system_of[left] == FIRST else Keys.ARROW_RIGHT)
        else:
            browser.find_element(By.CSS_SELECTOR, "[data-choice=tie]").click()
        if number == 0:
            wait_for_pair(browser, 1)
            press(browser, "b")
            wait_for_pair(browser, 0, left)
            press(browser, Keys.ARROW_LEFT if system_of[left] == FIRST else Keys.ARROW_RIGHT)
    wait(lambda: browser.find_element(By.ID, "done").is_displayed())
    assert "3 of 3 pairs" in browser.find_element(By.ID, "summary").text
    press(browser, Keys.ENTER)
    (path,) = wait(lambda: list(tmp_path.glob("votes-*.json")))
    wait(lambda: path.stat().st_size)
    known = read_key(page.with_name("page.key.json"))
    report = make_report(known, *read_votes([path], known))
    (pair,) = report["pairs"]
    assert (pair["system"], pair["wins"], pair["losses"], pair["ties"]) == (FIRST, 2, 0, 1)
    assert {row["system"]: row["mean_score"] for row in report["systems"]} == {FIRST: 4, SECOND: 2}
    assert report["raters"][0]["rater"] == 'Zoë "宇"'
    assert browser.get_log("browser") == []
    votes = json.loads(path.read_text(encoding="utf-8"))["votes"]
    assert [vote["comparison"] for vote in votes] == browser.execute_script("return session().order")


def test_sides_and_order_are_drawn_for_each_rater(browser):
    """Of 40 raters: each of three pairs is mirrored for some, and several of the six orders occur."""
    drawn = browser.execute_script("return Array.from({length: 40}, (_, i) => { newSession(`r${i}`); return [session().order, session().sides]; })")
    assert len({tuple(order) for order, _ in drawn}) >= 4
    for pair in drawn[0][0]:
        assert 5 <= sum(sides[pair] for _, sides in drawn) <= 35


def test_a_vote_needs_its_scores(browser):
    browser.find_element(By.ID, "rater").send_keys("Ann", Keys.ENTER)
    wait_for_pair(browser, 0)
    press(browser, Keys.ARROW_LEFT)
    assert "score" in browser.find_element(By.ID, "message").text and shown(browser)[2] == 0
    press(browser, "3")
    assert shown(browser)[2] == 0
    press(browser, "1")
    wait_for_pair(browser, 1)
