"""The report's page as a browser shows it."""

import struct

import pytest

from scripts.report import Report, find_browser, report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the page is not looked at")
RUNS, SECONDS, MEGABYTES = 200, 10, 15  # seconds: three times what a laptop needs
TRACES = "document.getElementById('validation-plot').data"


@pytest.fixture(scope="module")
def chromium():
    try:
        path = find_browser()
    except ValueError as error:
        pytest.skip(str(error))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(laboratory, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    report(Report(runs=(str(laboratory),), output=path))
    return path


@pytest.fixture(scope="module")
def open_page(chromium):
    """Return a function that opens a page; at the module's end, fail if a page logged anything or used the network."""
    complaints, pages = [], []

    def open_in_browser(path, width=1440, **options):
        def note_request(request):
            if request.url != path.as_uri() and not request.url.startswith(("data:", "blob:")):
                complaints.append(request.url)

        page = chromium.new_page(viewport={"width": width, "height": 900}, **options)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", note_request)
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_in_browser
    for page in pages:
        page.close()
    assert not complaints


@pytest.fixture(scope="module")
def page(open_page, page_file):
    """Return one page for tests that use different parts of it."""
    return open_page(page_file)


def test_every_section_draws_its_figures(page):
    assert page.locator("main > section:visible").count() == 7
    assert page.evaluate(f"{TRACES}.length") == 4 * (3 + 2) + 1  # runs, a band and a mean; one run alone
    assert page.evaluate("document.querySelector('#ablation-figures .plot').data[0].error_x.array.length") == 2
    assert page.evaluate("document.querySelector('#tuning-figures .plot').data[0].x") == [0.01, 0.02, 0.04, 0.08]
    kinds = page.evaluate("[...document.querySelectorAll('#diagnostics-figures .plot')].map((one) => one.data[0].type)")
    assert kinds == ["heatmap"] * 4
    assert page.locator("#schedules-figures .plot .scatterlayer .trace").count() == 1
    assert page.locator(".plot").count() == page.locator(".plot .main-svg:first-child").count()


def test_the_axis_switch_changes_x(page):
    last = f"{TRACES}[0].x.at(-1)"
    assert page.evaluate(last) == 240
    page.get_by_label("tokens", exact=True).check()
    assert page.evaluate(last) == 240 * 768
    page.get_by_label("time", exact=True).check()
    assert page.evaluate(last) == 61
    page.get_by_label("FLOPs").check()
    assert page.evaluate(last) > 240 * 768 * 1e6
    page.get_by_label("bits per byte").check()
    assert page.evaluate(f"{TRACES}[0].y.at(-1)") == pytest.approx(2.11 / 0.693147, rel=1e-4)


def test_lines_without_flops_are_left_out_with_a_note(open_page, fabricate, tmp_path):
    fabricate(tmp_path / "known")
    fabricate(tmp_path / "strange", parameters=1)
    report(Report(runs=(str(tmp_path),), output=tmp_path / "r.html"))
    page = open_page(tmp_path / "r.html")
    assert page.evaluate(f"{TRACES}.length") == 2 and page.locator("#loss-note").text_content() == ""
    page.get_by_label("FLOPs").check()
    assert page.evaluate(f"{TRACES}.map((trace) => trace.name)") == ["known"]
    assert page.locator("#loss-note").text_content() == "Not drawn: 1 of 2 lines, whose FLOPs are not known."


def test_log_axes_and_smoothing(page):
    page.get_by_label("log x").check()
    page.get_by_label("log y").check()
    layout = "document.getElementById('training-plot').layout"
    assert page.evaluate(f"[{layout}.xaxis.type, {layout}.yaxis.type]") == ["log", "log"]
    roughness = ("(() => { const y = document.getElementById('training-plot').data[0].y;"
                 "return y.slice(2).reduce((sum, v, i) => sum + Math.abs(v - 2 * y[i + 1] + y[i]), 0); })()")
    page.get_by_label("Weight of the past").fill("0")
    raw = page.evaluate(roughness)
    page.get_by_label("Weight of the past").fill("0.9")
    assert page.evaluate(roughness) < raw / 3


def test_the_legend_hides_an_experiment_by_keyboard(page):
    button = page.locator("#legend button", has_text="no_smear")
    visible_names = f"{TRACES}.filter((trace) => trace.visible).map((trace) => trace.name)"
    assert "no_smear-seed1" in page.evaluate(visible_names)
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    assert "no_smear-seed1" not in page.evaluate(visible_names) and len(page.evaluate(visible_names)) == 20
    page.get_by_role("button", name="none", exact=True).click()
    assert page.evaluate(visible_names) == []
    page.get_by_role("button", name="all", exact=True).click()
    assert len(page.evaluate(visible_names)) == 21


def test_a_click_on_a_column_head_sorts(page):
    head = page.locator("#run-table th", has_text="validation loss")
    first = page.locator("#run-table tbody tr:first-child td:first-child")
    head.locator("button").click()
    assert first.text_content() == "lr0.04-seed1" and head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    assert first.text_content() == "no_smear-seed1" and head.get_attribute("aria-sort") == "descending"


def test_differences_are_marked(page):
    marked = page.locator("#difference-table td.odd")
    assert marked.all_text_contents() == ["False"]


def test_figures_follow_the_theme(open_page, page_file):
    page = open_page(page_file, width=390, color_scheme="dark")
    look = "[document.documentElement.dataset.theme, document.getElementById('validation-plot').layout.font.color]"
    looks = [page.evaluate(look)]
    for _ in range(2):
        page.locator("#theme").click()
        looks.append(page.evaluate(look))
    assert [theme for theme, _ in looks] == ["dark", "light", "dark"]
    assert looks[0] == looks[2] != looks[1]
    page.locator("#theme").click()  # auto again: it follows the system
    page.emulate_media(color_scheme="light")
    assert any(page.wait_for_timeout(20) or page.evaluate(look) == looks[1] for _ in range(100))


def test_on_a_phone_tables_scroll_in_their_box_and_the_page_does_not(open_page, page_file):
    page = open_page(page_file, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("#run-table").evaluate("(box) => box.scrollWidth > box.clientWidth && box.clientWidth <= 390")
    page.set_viewport_size({"width": 1440, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") == 1440


def test_two_hundred_runs_open_quickly(open_page, fabricate, tmp_path):
    for number in range(RUNS):
        fabricate(tmp_path / f"draw{number:03}", seed=number, experiment=f"draw{number:03}",
                  settings={"optim.matrix.lr": 0.01 + number / 1000}, loss=2 + number / 1000)
    path = tmp_path / "report.html"
    report(Report(runs=(str(tmp_path),), output=path))
    assert path.stat().st_size < MEGABYTES * 1e6
    page = open_page(path)
    seconds = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
    assert 0 < seconds < SECONDS
    assert page.evaluate(f"{TRACES}.length") == RUNS


def test_pictures_are_drawn(chromium, laboratory, tmp_path):
    written = report(Report(runs=(str(laboratory),), output=tmp_path / "r.html", png=tmp_path / "pictures"))
    assert [path.name for path in written] == ["r.html", "loss.png", "ablation.png"]
    head = written[1].read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", head[16:]) == (2400, 1120)
    assert written[1].stat().st_size > 30_000  # an empty page of this size has some 10 kB
