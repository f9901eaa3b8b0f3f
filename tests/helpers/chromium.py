"""Chromium without a window, driven by selenium; tests are skipped where one of them is missing."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

Result = TypeVar("Result")
WAIT = 60.0  # seconds that a busy machine may take for anything

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def programs() -> tuple[str, str]:
    """Paths of the browser and of its driver; without them the test is skipped."""
    pytest.importorskip("selenium")
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("there is no Chromium with its driver")
    return browser, driver


@contextmanager
def chromium(folder: Path) -> Iterator[Any]:
    """A browser whose profile and downloads are in the folder."""
    browser, driver = programs()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*_FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    try:
        window.set_script_timeout(WAIT)
        downloads = {"behavior": "allow", "downloadPath": str(folder / "downloads")}
        window.execute_cdp_cmd("Browser.setDownloadBehavior", downloads)
        yield window
    finally:
        window.quit()


def resize(window: Any, width: int, height: int, *, dark: bool = False) -> None:
    """The size of the page, as a telephone's if it is narrow, and the colours that its owner prefers."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def requested(window: Any) -> set[str]:
    """Addresses that were asked for since the last call."""
    messages = (json.loads(entry["message"])["message"] for entry in window.get_log("performance"))
    kinds = ("Network.requestWillBeSent", "Network.webSocketCreated")
    found = [one["params"] for one in messages if one["method"] in kinds]
    return {one["request"]["url"] if "request" in one else one["url"] for one in found}


def wait_for(what: str, get: Callable[[], Result]) -> Result:
    """The first result that is not empty; what fails while the page changes is tried again."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + WAIT
    problem = ""
    while time.monotonic() < end:
        try:
            if found := get():
                return found
        except WebDriverException as error:
            problem = f" ({error.msg})"
        time.sleep(0.1)
    pytest.fail(f"waited {WAIT:.0f} s for {what}{problem}")
