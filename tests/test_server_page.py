"""The chat page in a browser."""

import json
import os
import shutil
from pathlib import Path

import pytest
from rc_agents.adapters.server import Limits

from rc_agents.service import GenerationService
from tests.sensing import ensemble, picture, processors
from tests.server_running import running
from tests.test_server import MODEL

webdriver = pytest.importorskip("selenium.webdriver", reason="the page's test needs selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.tiny,
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
SHOTS = os.environ.get("RC_AGENTS_SCREENSHOTS")  # a folder, where somebody wants to see them


@pytest.fixture(scope="module")
def browser():
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1000,720"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield found
    found.quit()


def ask(browser, text, cards):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.find_element("id", "question").send_keys(text + "\n")
    WebDriverWait(browser, 60).until(
        lambda page: len(page.find_elements("css selector", ".speed:not(:empty)")) >= cards
    )
    return [one.text for one in browser.find_elements("css selector", ".turn:last-child .answer")]


def shot(browser, name):
    if SHOTS:
        browser.save_screenshot(str(Path(SHOTS) / f"{name}.png"))


def test_frozen_and_coupled_answers_stand_side_by_side(browser):
    with running(MODEL) as server:
        browser.get(server.url)
        boxes = browser.find_elements("css selector", "#specialists label")
        assert [one.text for one in boxes] == ["medical", "code"]
        tokens = browser.find_element("id", "tokens")
        tokens.clear()
        tokens.send_keys("12")
        frozen, coupled = ask(browser, "Where is the river?", 2)
        assert frozen.startswith("frozen anchor")
        assert coupled.startswith("coupled")
        assert "tokens/s" in frozen
        assert frozen.split("\n", 2)[2] != coupled.split("\n", 2)[2]
        shot(browser, "both")
        browser.find_element("css selector", "input[value=code]").click()
        browser.find_element("id", "frozen").click()
        asked = browser.execute_script("return chosen()")
        assert asked == "rc:medical"
        assert len(ask(browser, "And the town?", 3)) == 1
        log = [one for one in browser.get_log("browser") if one["level"] == "SEVERE"]
        assert log == []


def test_a_picture_goes_with_the_last_question(browser, tmp_path):
    (tmp_path / "it.png").write_bytes(picture())
    with running(GenerationService(ensemble(), processors())) as server:
        browser.get(server.url)
        tokens = browser.find_element("id", "tokens")
        tokens.clear()
        tokens.send_keys("6")
        show = browser.find_element("id", "show")
        assert show.is_displayed()
        assert show.get_attribute("accept").endswith("image/bmp,audio/wav")
        show.send_keys(str(tmp_path / "it.png"))
        shown = ask(browser, "What is here?", 2)
        assert len(browser.find_elements("css selector", "img.shown")) == 1
        ask(browser, "And there?", 4)  # the history has no picture, so one is shown again
        assert browser.find_elements("css selector", ".wrong") == []
        browser.find_element("id", "clear").click()
        alone = ask(browser, "What is here?", 2)
        assert alone[1].split("\n", 2)[2] != shown[1].split("\n", 2)[2]
        assert browser.find_elements("css selector", "img.shown") == []
    with running(MODEL) as server:
        browser.get(server.url)
        ask(browser, "Hi", 2)
        assert not browser.find_element("id", "show").is_displayed()


def test_an_error_and_a_missing_key_are_shown(browser):
    with running(MODEL, api_key="secret", limits=Limits(prompt_tokens=40)) as server:
        browser.get(server.url)
        from selenium.webdriver.support.ui import WebDriverWait

        key = browser.find_element("id", "key")
        WebDriverWait(browser, 20).until(lambda page: key.is_displayed())
        key.send_keys("secret\t")
        WebDriverWait(browser, 20).until(
            lambda page: page.find_elements("css selector", "#specialists label")
        )
        browser.find_element("id", "question").send_keys("word " * 60 + "\n")
        WebDriverWait(browser, 20).until(lambda page: page.find_elements("css selector", ".wrong"))
        assert "this server takes 40" in browser.find_element("css selector", ".wrong").text
        shot(browser, "error")


def test_what_a_model_writes_is_no_markup(browser):
    chunk = json.dumps({"choices": [{"delta": {"content": "<img src=x>"}}]})
    usage = json.dumps({"choices": [], "usage": {"completion_tokens": 3}})
    events = json.dumps(f"data: {chunk}\n\ndata: {usage}\n\ndata: [DONE]\n\n")
    with running(MODEL) as server:
        browser.get(server.url)
        browser.execute_script(f"window.fetch = async () => new Response({events})")
        answers = ask(browser, "Hi", 2)
        assert all("<img src=x>" in one for one in answers)
        assert browser.find_elements("css selector", "main img") == []
