"""The page in a real browser: every feature clicked through, on wide and narrow screens.

`LEANSD_SCREENSHOTS` names a folder for what it looks like; a test's own folder otherwise.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'leansd[ui]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium"),
    # gradio's and its servers' own threads and sockets end after the test that saw them.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

import gradio  # noqa: E402
import httpx  # noqa: E402

from leansd.plans.plan import Plan  # noqa: E402
from leansd.ui.folders import Folders  # noqa: E402
from leansd.ui.handlers import explain  # noqa: E402
from leansd.ui.serving import Door, Fence, serving  # noqa: E402
from leansd.ui.studio import Studio  # noqa: E402
from tiny import tiny_pipeline  # noqa: E402

STEPS = 10
WAIT = 120_000  # milliseconds; a slow machine is no failure
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("ui")
    tiny_pipeline().save_pretrained(home / "models" / "tiny")
    (home / "secret.txt").write_text("secret")
    return home


@pytest.fixture(scope="module")
def address(home):
    studio = Studio(Folders.open(home / "own", home / "models"), "cpu")
    studio.open("emoji")
    with serving(studio, Door(), limit=2) as address:
        yield address.rstrip("/")


@pytest.fixture(scope="module")
def browser(address):
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    folder = Path(os.environ.get("LEANSD_SCREENSHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Visit:
    """A browser window on the page, with all that it asked for and complained of."""

    def __init__(self, browser, address, size, **options):
        self.context = browser.new_context(viewport=size, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.asked, self.errors = [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector(".plan-name", state="attached")

    def open_tab(self, name):
        tab = self.page.get_by_role("tab", name=name, exact=True)
        if not tab.is_visible():
            self.page.locator(".overflow-menu > button").click()
            tab = self.page.locator(".overflow-dropdown button", has_text=name)
        tab.click()

    def set_steps(self, steps):
        field = self.page.locator("#steps input[type=number]")
        field.fill(str(steps))
        field.press("Enter")
        self.page.wait_for_function(
            "steps => document.querySelector('.prediction').textContent.includes(`of ${steps} st`)",
            arg=steps,
        )

    def choose(self, which, name):
        self.page.click(f"#{which} input")
        self.page.get_by_role("option", name=name, exact=True).click()

    def upload(self, path):
        with self.page.expect_file_chooser() as chooser:
            self.page.click("#upload")
        chooser.value.set_files(path)

    def wait_idle(self):
        self.page.wait_for_selector("#draw:not([disabled])")

    def read_error(self):
        toast = self.page.locator(".toast-body.error").last
        toast.wait_for()
        text = toast.inner_text()
        self.page.locator(".toast-close").last.click()
        toast.wait_for(state="detached")
        return text


@pytest.fixture(scope="module")
def visit(browser, address):
    visit = Visit(browser, address, DESKTOP)
    visit.set_steps(STEPS)
    yield visit
    visit.context.close()


def test_both_runs_side_by_side(visit, home, shots):
    page = visit.page
    visit.choose("plan-name", "deepcache")
    page.fill("#prompt textarea", "a lemon, noto style")
    page.fill("#seed input", "7")
    page.click("#draw")
    # Step by step: the full run first, then the planned one.
    for side in ("full", "lean"):
        page.wait_for_selector(f".lane.active[data-side={side}] .bars[aria-valuenow='1'], .cards")
    page.wait_for_selector(".cards")
    visit.wait_idle()
    text = page.locator(".cards").inner_text()
    assert re.search(r"\d\.\d\dx", text)
    assert re.search(r"\d+\.\d dB", text)
    for name in ("full", "lean"):
        page.wait_for_selector(f"#{name} img")
        assert page.locator(f".lane[data-side={name}] .done").count() == STEPS
    assert page.locator("#slider").is_visible()
    page.wait_for_function("[...document.images].every(image => image.complete)")
    page.screenshot(path=shots / "pictures.png", full_page=True)
    (entry,) = (home / "own" / "history").iterdir()
    assert {path.name for path in entry.iterdir()} == {"entry.json", "full.png", "lean.png"}


def test_nothing_is_fetched_elsewhere_and_no_script_fails(visit, address):
    own = (address, "data:", "blob:")
    assert [url for url in visit.asked if not url.startswith(own)] == []
    assert visit.errors == []


def test_cells_are_changed_predicted_and_saved(visit, shots, home, tmp_path):
    page = visit.page
    visit.open_tab("Plan")
    visit.choose("plan-name", "encoder")  # whatever the tests before have chosen
    page.wait_for_selector("#plan-forecast .plan-name:text-is('encoder')")
    before = page.locator("#plan-forecast b").last.inner_text()
    page.locator("th.step[aria-label^='step 2']").click()
    page.wait_for_function(
        "before => document.querySelector('#plan-forecast').textContent.includes('edited')"
    )
    assert page.locator("#plan-forecast b").last.inner_text() != before
    cell = page.locator("td[aria-label^='up3.l0, step 3:']")
    page.locator("#brush label", has_text="reuse").click()
    was = cell.get_attribute("aria-label")
    cell.click()
    page.wait_for_function(
        "was => ![...document.querySelectorAll('td')].some(td => td.ariaLabel === was)", arg=was
    )
    page.locator("td[aria-label^='guidance, step 5']").click()
    page.wait_for_selector("td[aria-label='guidance, step 5: inherited']")
    page.screenshot(path=shots / "plan.png", full_page=True)
    # What cannot be is told, and changes nothing.
    page.locator("td[aria-label^='up3.l0, step 0']").click()
    assert "first step computes everything" in visit.read_error()
    page.locator("#tier label", has_text="block").click()
    page.wait_for_selector("td[aria-label^='up3, step 3']")
    save_and_load(visit, home, tmp_path)


def save_and_load(visit, home, tmp_path):
    """The plan that was just changed, and files of plans."""
    page = visit.page
    name = page.locator("#save-name input, #save-name textarea")
    name.fill("../outside")
    page.click("#save")
    assert "no name for a plan" in visit.read_error()
    assert not (home / "outside.json").exists()
    name.fill("mine")
    page.click("#save")
    page.wait_for_function("document.querySelector('#cell').textContent.includes('mine.json')")
    saved = Plan.load(home / "own" / "plans" / "mine.json")
    assert saved.rows[5].guidance == "inherit"
    visit.choose("plan-name", "deepcache")
    page.wait_for_selector("#plan-forecast .plan-name:text-is('deepcache')")
    visit.choose("plan-name", "saved: mine")
    page.wait_for_selector("#plan-forecast .plan-name:text-is('mine')")
    page.wait_for_selector("td[aria-label='guidance, step 5: inherited']")
    Plan.every(3, cut="up2", steps=6, name="given").save(tmp_path / "given.json")
    visit.upload(tmp_path / "given.json")
    page.wait_for_selector("#plan-forecast .plan-name:text-is('given')")
    assert page.locator("#steps input[type=number]").input_value() == "6"
    (tmp_path / "broken.json").write_text("{}")
    visit.upload(tmp_path / "broken.json")
    assert "broken.json is not a valid plan file" in visit.read_error()


def test_the_history_gives_settings_back(visit):
    page = visit.page
    visit.set_steps(STEPS)
    visit.choose("plan-name", "deepcache")
    page.fill("#prompt textarea", "a lemon, noto style")
    page.fill("#seed input", "7")
    page.click("#draw")
    page.wait_for_selector(".cards")
    visit.wait_idle()
    page.fill("#prompt textarea", "something else")
    visit.open_tab("History")
    page.locator("#gallery .thumbnail-item, #gallery .gallery-item button").first.click()
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('lemon')")
    assert page.locator("#seed input").input_value() == "7"
    assert page.locator("#steps input[type=number]").input_value() == str(STEPS)
    page.wait_for_selector("#forecast .plan-name:text-is('deepcache')")


def test_a_mistake_is_told(visit):
    visit.page.fill("#prompt textarea", "  ")
    visit.page.click("#draw")
    assert "say what to draw" in visit.read_error()
    visit.wait_idle()


def test_a_run_is_stopped(visit, home):
    page, before = visit.page, len(list((home / "own" / "history").iterdir()))
    page.fill("#prompt textarea", "a lemon, noto style")
    steps = page.locator("#steps input[type=number]")
    usual = steps.input_value()
    steps.fill("100")  # long enough for a page on a busy machine
    steps.press("Enter")
    page.get_by_role("button", name="More").click()
    field = page.locator("#rounds input[type=number]")
    field.fill("9")
    field.press("Enter")
    page.click("#draw")
    page.wait_for_selector(".lane.active")
    page.click("#stop")
    page.wait_for_function("document.querySelector('#lanes').textContent.includes('stopped')")
    visit.wait_idle()
    assert len(list((home / "own" / "history").iterdir())) == before
    steps.fill(usual)
    steps.press("Enter")


def test_another_model_is_tuned_and_timed(visit, shots):
    page = visit.page
    visit.choose("model", "tiny")
    # Its own guidance comes with it.
    page.wait_for_function("document.querySelector('#guidance input').value === '7.5'")
    visit.set_steps(STEPS)
    visit.open_tab("Tune")
    page.fill("#prompts textarea", "a\nb\nc")
    page.click("#tune")
    assert "4 to 32" in visit.read_error()
    visit.wait_idle()
    page.fill("#prompts textarea", "a\nb\nc\nd")
    for which, value in (("speed", "1.5"), ("tries", "0")):
        field = page.locator(f"#{which} input[type=number]")
        field.fill(value)
        field.press("Enter")
    page.click("#tune")
    page.wait_for_selector("#tuning svg.figure")
    visit.wait_idle()
    page.wait_for_selector("#forecast .plan-name:text-is('tuned 1.5x')")
    page.screenshot(path=shots / "tune.png", full_page=True)
    visit.open_tab("Costs")
    page.wait_for_selector("#anatomy svg.figure")
    page.click("#measure")
    page.wait_for_selector("#costs svg.figure")
    visit.wait_idle()
    assert "as timed" in page.locator("#forecast").inner_text()
    page.screenshot(path=shots / "costs.png", full_page=True)


def test_a_phone_scrolls_in_one_direction_only(browser, address, shots):
    visit = Visit(browser, address, PHONE, color_scheme="dark", has_touch=True)
    page = visit.page
    visit.set_steps(STEPS)
    for name in ("Plan", "Tune", "Costs", "History", "Pictures"):
        visit.open_tab(name)
        page.wait_for_timeout(300)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"], name
        page.screenshot(path=shots / f"phone-{name.lower()}.png", full_page=True)
    visit.open_tab("Plan")
    page.locator("td[aria-label^='up3.l2, step 1:']").tap()
    page.wait_for_function("document.querySelector('.prediction').textContent.includes('edited')")
    assert visit.errors == []
    visit.context.close()


def test_lists_close_behind_who_tabs_past_them(visit):
    page = visit.page
    page.focus("#prompt textarea")
    for _ in range(6):
        page.keyboard.press("Tab")
    page.wait_for_timeout(1000)  # they open a moment after their fields were left
    page.wait_for_function(
        "[...document.querySelectorAll('[role=combobox][aria-expanded=true]')]"
        ".every((field) => field === document.activeElement)"
    )


def test_everything_can_be_done_by_keyboard(browser, address, shots):
    visit = Visit(browser, address, DESKTOP, color_scheme="dark")
    page = visit.page

    def press_until(selector, key="Tab"):
        for _ in range(60):
            page.keyboard.press(key)
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"no way to {selector} by {key}")

    visit.set_steps(4)
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    press_until("#prompt textarea")
    page.keyboard.press("Control+A")
    page.keyboard.type("a pizza, twemoji style")
    press_until("#draw")
    page.keyboard.press("Enter")
    page.wait_for_selector(".cards")
    visit.wait_idle()
    press_until("button[role=tab]")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent").strip() == "Plan"
    page.keyboard.press("Enter")
    page.wait_for_selector("td[role=gridcell]")
    press_until("td[role=gridcell]")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label.startswith("dn0.l0, step 2")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.prediction').textContent.includes('edited')")
    # The focus stays where it was.
    after = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert after.startswith("dn0.l0, step 2")
    page.screenshot(path=shots / "dark.png", full_page=True)
    visit.context.close()


# -- what a server hands out ---------------------------------------------------------------------


def test_files_outside_the_folders_are_not_handed_out(address, home):
    plans, history = home / "own" / "plans", home / "own" / "history"
    plans.mkdir(parents=True, exist_ok=True)
    Plan.full(4).save(plans / "shown.json")
    (history / "link.txt").symlink_to(home / "secret.txt")
    (history / "away").symlink_to(home)
    with httpx.Client(base_url=f"{address}/gradio_api", timeout=60) as client:
        assert client.get(f"/file={plans / 'shown.json'}").status_code == 200
        for path in (
            "/etc/passwd",
            home / "secret.txt",
            home / "models" / "tiny" / "model_index.json",
            f"{history}/../../secret.txt",
            f"{history}/%2e%2e/%2e%2e/secret.txt",
            history / "link.txt",
            history / "away" / "secret.txt",
            "https://example.com/",
            Path(__file__),
            "pyproject.toml",
        ):
            answer = client.get(f"/file={path}")
            assert answer.status_code in (403, 404), path
            assert "secret" not in answer.text
        assert client.get("/proxy=https://example.com/").status_code == 403
    (history / "link.txt").unlink()
    (history / "away").unlink()


def test_uploads_have_a_limit(address):
    with httpx.Client(base_url=f"{address}/gradio_api", timeout=60) as client:
        answer = client.post("/upload", files={"files": ("big.json", b"0" * 2 * 2**20)})
        assert answer.status_code == 413
        small = client.post("/upload", files={"files": ("../../small.json", b"{}")})
        assert ".." not in small.text


def test_the_page_allows_browsers_nothing_foreign(address):
    answer = httpx.get(address, timeout=60)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    tags = re.findall(r"<(?:script|link)[^>]*(?:src|href)=[\"'](?:https?:)?//[^>]*>", answer.text)
    assert tags == []


def test_a_fence_follows_links(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    fence = Fence(None, [tmp_path / "in"])
    assert fence.allows(f"/gradio_api/file={tmp_path}/in/plan.json")
    assert fence.allows("/assets/index.js")
    assert not fence.allows(f"/gradio_api/file={tmp_path}/in/link/secret")
    assert not fence.allows(f"/gradio_api/file={tmp_path}/in/../secret")
    assert not fence.allows("/gradio_api/file=a\0b")


def test_no_changes_leave_the_page_as_it_is():
    """As where a list shows nothing chosen for a moment: gradio takes an empty dict for a value."""
    assert explain(lambda: {})() == gradio.skip()
    assert explain(lambda: {"one": 1})() == {"one": 1}
