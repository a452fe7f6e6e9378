from collections.abc import Iterator

import pytest
from browser import CHROMIUM, Browser, browser
from exported import dit, unet

__all__ = ["dit", "tab", "unet"]


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser, one for all tests of pages."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened
