"""A browser for the report."""

import os
import shutil

import pytest

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')


@pytest.fixture(scope='module')
def browser():
    """The system's Chromium, headless."""
    api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        pytest.skip('no Chromium on the PATH')
    arguments = ['--no-sandbox'] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()
