"""Tests of the page in a browser without network: no requests, sortable tables, visible plots."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from lpc_lightning.evaluation.report.command import report

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs Debian's packages chromium and chromium-driver"
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # required for root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
LATENTS = {"none": 0.7, "gumbel": 0.65, "marginal": 0.9}


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = BROWSER or ""
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    # With the path of the driver, selenium does not download one.
    with Chrome(options=options, service=Service(DRIVER)) as chrome:
        chrome.execute_cdp_cmd("Network.enable", {})
        no_network = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        chrome.execute_cdp_cmd("Network.emulateNetworkConditions", no_network)
        yield chrome


@pytest.fixture(scope="module")
def address(write_ablation: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of a page on 18 runs, of which one has failed and one is missing."""

    def value(latent: str, codes: int, seed: int) -> float | str | None:
        errors = {("gumbel", 8, 2): "Traceback\n  see https://example.org/x.js\nValueError: <i>no</i>"}
        if (latent, codes, seed) == ("none", 64, 3):
            return None
        return errors.get((latent, codes, seed), LATENTS[latent] + 0.001 * seed**2 - 0.0001 * codes)

    folder = write_ablation({"latent": list(LATENTS), "codes": [8, 64]}, [1, 2, 3], value)
    out = tmp_path_factory.mktemp("report")
    report([str(folder)], out=str(out))
    return (out / "report.html").as_uri()


@pytest.fixture
def page(browser: Chrome, address: str) -> Chrome:
    """The page, newly opened."""
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(address)
    return browser


def column(table: WebElement, name: str) -> tuple[WebElement, list[str]]:
    """Return the header cell of a column and the texts below it."""
    headers = table.find_elements(By.CSS_SELECTOR, "thead th")
    index = [header.text.split("\n")[0].strip() for header in headers].index(name)
    cells = table.find_elements(By.CSS_SELECTOR, f"tbody td:nth-child({index + 1})")
    return headers[index], [cell.text for cell in cells]


@pytest.mark.slow
def test_page_makes_no_requests(page: Chrome) -> None:
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]
    assert any(url.startswith("file://") for url in urls)
    assert [url for url in urls if not url.startswith(("file://", "data:"))] == []
    assert page.get_log("browser") == []


@pytest.mark.slow
def test_page_shows_every_plot(page: Chrome) -> None:
    pictures = page.find_elements(By.CSS_SELECTOR, "figure img")
    assert len(pictures) >= 6
    for picture in pictures:
        assert page.execute_script("return arguments[0].complete && arguments[0].naturalWidth", picture) > 200
        assert picture.size["width"] > 300
        assert picture.size["height"] > 60
        assert len(picture.get_attribute("alt") or "") > 30


@pytest.mark.slow
def test_table_sorts_by_click(page: Chrome) -> None:
    table = page.find_element(By.CSS_SELECTOR, "#table-means table")
    header, before = column(table, "val/rewards/accuracies")
    assert before != sorted(before)
    header.find_element(By.TAG_NAME, "button").click()
    header, after = column(table, "val/rewards/accuracies")
    assert after == sorted(before, key=float)
    assert header.get_attribute("aria-sort") == "ascending"
    header.find_element(By.TAG_NAME, "button").click()
    header, reversed_values = column(table, "val/rewards/accuracies")
    assert reversed_values == after[::-1]
    assert header.get_attribute("aria-sort") == "descending"
    # 8 comes before 64, and now the other column is the sorted one.
    other, _ = column(table, "codes")
    other.find_element(By.TAG_NAME, "button").click()
    assert column(table, "codes")[1] == ["8"] * 3 + ["64"] * 3
    assert column(table, "val/rewards/accuracies")[0].get_attribute("aria-sort") is None


def test_table_sorts_by_key_empty_values_last(page: Chrome) -> None:
    table = page.find_element(By.CSS_SELECTOR, "#runs table")
    for press, key in enumerate((Keys.ENTER, Keys.SPACE)):
        header, _ = column(table, "val/rewards/accuracies")
        header.find_element(By.TAG_NAME, "button").send_keys(key)
        _, values = column(table, "val/rewards/accuracies")
        assert values[-2:] == ["-", "-"]
        assert values[:-2] == sorted(values[:-2], key=float, reverse=bool(press))
    header, _ = column(table, "latent")
    header.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert column(table, "latent")[1] == ["gumbel"] * 6 + ["marginal"] * 6 + ["none"] * 6


def test_page_lists_failed_and_missing_runs(page: Chrome) -> None:
    section = page.find_element(By.ID, "left-out")
    table = section.find_element(By.TAG_NAME, "table")
    reasons = dict(zip(column(table, "run")[1], column(table, "why")[1], strict=True))
    assert reasons["latent=gumbel,codes=8,seed=2"] == "ValueError: <i>no</i>"
    assert reasons["latent=none,codes=64,seed=3"] == "This cell of the grid was never started."
    section.find_element(By.TAG_NAME, "summary").click()
    assert "https://example.org/x.js" in section.find_element(By.TAG_NAME, "pre").text


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_page_fits_the_window(page: Chrome, width: int) -> None:
    sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


CONTRAST = """
const luminance = (colour) => {
  const [r, g, b] = colour.match(/[0-9.]+/g).map((value) => value / 255)
    .map((value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const paper = luminance(getComputedStyle(document.body).backgroundColor);
return arguments[0].map((selector) => {
  const ink = luminance(getComputedStyle(document.querySelector(selector)).color);
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
});
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrast(page: Chrome, scheme: str) -> None:
    """WCAG 2.2, section 1.4.3, requires a contrast of at least 4.5."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    contrasts = page.execute_script(CONTRAST, ["body", "a", ".note", "figcaption", ".pairs th", "thead button"])
    assert min(contrasts) >= 4.5
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
