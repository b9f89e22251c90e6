"""The page in headless Chromium: ask both models, add a fact, take it back.

Skipped where the machine has no browser. Playwright drives it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from hiedit_agents.serving.app import create_app
from tests.support.editors import FACTS
from tests.support.served import TEMPLATE, TOKEN, listening, served

sync = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FACT = FACTS[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[sync.Browser]:
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    with sync.sync_playwright() as driver:
        try:
            found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture
def page(browser: sync.Browser) -> Iterator[sync.Page]:
    """A page of a server with a chat template; whatever it logs is an error."""
    with listening(create_app(served(template=TEMPLATE), TOKEN)) as address:
        context = browser.new_context(base_url=address)
        opened = context.new_page()
        opened.set_default_timeout(20_000)
        said: list[str] = []
        opened.on("console", lambda message: said.append(message.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        yield opened
        context.close()
    # The browser itself logs a status that is no success.
    assert not [text for text in said if "status of 401" not in text]


def write(page: sync.Page, prompt: str, answer: str) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Answer").fill(answer)
    page.get_by_role("button", name="Write it").click()


def test_a_fact_is_asked_written_and_taken_back(page: sync.Page) -> None:
    expect = sync.expect
    page.goto(f"/#token={TOKEN}")
    expect(page.locator("#about")).to_contain_text("tiny · 0 edits in place")
    assert "token" not in page.url
    expect(page.get_by_text("None yet.")).to_be_visible()

    page.get_by_label("Text to continue").fill(FACT.prompt)
    page.get_by_role("button", name="Ask", exact=True).click()
    unedited, edited = page.locator("#unedited"), page.locator("#edited")
    expect(unedited).to_contain_text(FACT.prompt)
    expect(page.locator("#ask button")).to_be_enabled()
    was = unedited.inner_text()
    assert was.startswith(FACT.prompt)
    assert was != FACT.prompt
    assert edited.inner_text() == was
    assert FACT.answer not in was

    write(page, FACT.prompt, FACT.answer)
    expect(page.locator("#result")).to_contain_text("Written as edit 1")
    expect(page.locator("#about")).to_contain_text("1 edit in place")
    row = page.get_by_role("row", name="Take edit 1 back")
    expect(row).to_contain_text(FACT.answer)
    expect(edited.locator(".differs")).to_contain_text(FACT.answer)
    assert unedited.inner_text() == was

    row.get_by_role("button").click()
    expect(page.locator("#result")).to_contain_text("Edit 1 is taken back")
    expect(page.locator("#about")).to_contain_text("0 edits in place")
    expect(page.get_by_text("None yet.")).to_be_visible()
    expect(edited).to_have_text(was)


def test_chat_markup_in_texts_and_the_token(page: sync.Page) -> None:
    expect = sync.expect
    page.goto("/")
    expect(page.get_by_text("Give the token to see them.")).to_be_visible()
    markup = "<b>Belka</b> lives in"
    write(page, markup, FACT.answer)
    expect(page.locator("#result")).to_contain_text("a token is needed")
    page.get_by_label("Token", exact=True).fill("wrong")
    page.get_by_role("button", name="Write it").click()
    expect(page.locator("#result")).to_contain_text("the token is wrong")
    page.get_by_label("Token", exact=True).fill(TOKEN)
    page.get_by_role("button", name="Write it").click()
    expect(page.locator("#result")).to_contain_text("Written as edit 1")
    # Shown as it is.
    expect(page.get_by_role("cell", name=markup)).to_be_visible()
    assert page.locator("td b").count() == 0

    page.get_by_label("in a chat").check()
    page.get_by_label("Message to the model").fill("Hello")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#ask button")).to_be_enabled()
    expect(page.locator("#unedited")).not_to_contain_text("Hello")
    expect(page.locator("#unedited")).not_to_be_empty()
