"""The page of `show --html` in a real browser, with a moving pointer; truth are the maps computed here."""

import dataclasses
import shutil

import pytest
import torch
from PIL import Image

from llava_projectors.commands.show import colours
from llava_projectors.commands.show.models import random_model
from llava_projectors.commands.show.page import page
from llava_projectors.commands.show.view import make_view

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra llava-projectors[test])")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="no chromium and chromedriver on the PATH (Debian: apt-get install chromium chromium-driver)",
)
COLOURS = ["#{:02x}{:02x}{:02x}{:02x}".format(*colour) for colour in colours.table()]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def square(tiny):
    """All tokens of SAEP on a photograph."""
    with Image.open(tiny.images / "flower.jpg") as picture:
        return make_view(random_model("saep"), picture)


@pytest.fixture(scope="module")
def tiled(tiny):
    """All tokens of TokenPacker on a photograph in 2x3 tiles and a thumbnail."""
    with Image.open(tiny.images / "china.jpg") as picture:
        return make_view(random_model("tokenpacker:scale_factor=3", 9), picture)


class Page:
    """What a user does on the page, and sees."""

    def __init__(self, browser, view, folder):
        self.browser, self.view = browser, view
        path = folder / "page.html"
        path.write_text(page(view), encoding="utf-8")
        browser.get(path.as_uri())

    def point(self, panel, tile, cell):
        """Move the pointer over a cell of a panel."""
        from selenium.webdriver.common.action_chains import ActionChains

        cells = self.view.side if panel == "patches" else self.view.columns
        image = self.browser.find_element("css selector", f"#{panel} image").rect
        left, top = (length / self.view.edge * cells for length in self.view.places[tile])
        size = self.view.picture.width / self.view.edge * cells
        x, y = (at * image["width"] / size for at in (left + cell % cells + 0.5, top + cell // cells + 0.5))
        actions = ActionChains(self.browser, duration=20)
        actions.w3c_actions.pointer_action.move_to_location(int(image["x"] + x), int(image["y"] + y))
        actions.perform()

    def keys(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    @property
    def status(self):
        return self.browser.find_element("id", "status").text

    def marked(self, panel):
        """The tile that is painted on, and cell -> number of its colour."""
        script = """const overlay = document.querySelector(`#${arguments[0]} g`);
            return [overlay.getAttribute("transform"), [...overlay.children].map(r => r.getAttribute("fill"))];"""
        transform, fills = self.browser.execute_script(script, panel)
        colours = {cell: COLOURS.index(fill) for cell, fill in enumerate(fills) if fill != "none"}
        return (transform, colours) if colours else (None, {})

    def frame(self, panel):
        """x, y, width and height of what is outlined, in cells; None for nothing."""
        script = """const found = document.querySelector(`#${arguments[0]} .outline`);
            return found.getAttribute("visibility") === "hidden" ? null
                : ["x", "y", "width", "height"].map(name => Number(found.getAttribute(name)));"""
        return self.browser.execute_script(script, panel)

    def assert_marked(self, panel, shares, tile=0):
        """Exactly the cells that have a share are painted, each with the colour of it."""
        steps = shares.flatten() / self.view.scale
        expected = {cell: float(step) * 255 for cell, step in enumerate(steps) if step > 0.5 / 65535}
        transform, found = self.marked(panel)
        assert found.keys() == expected.keys()
        assert all(abs(found[cell] - expected[cell]) < 0.51 for cell in found)
        cells = self.view.side if panel == "patches" else self.view.columns
        left, top = (length // self.view.edge * cells for length in self.view.places[tile])
        assert transform == f"translate({left} {top})"


@needs_browser
def test_pointing_at_tokens_and_patches(browser, square, tmp_path):
    shown = Page(browser, square, tmp_path)
    assert browser.title == browser.find_element("tag name", "h1").text == square.title
    for token in (40, 0, 143, 77):
        row, column = divmod(token, 12)
        shown.point("tokens", 0, token)
        shown.assert_marked("patches", square.maps[token])
        assert shown.marked("tokens") == (None, {})
        assert shown.frame("patches") == [2 * column, 2 * row, 2, 2]  # its own region
        assert shown.frame("tokens") == [column, row, 1, 1]
        assert shown.status.startswith(f"token {token} (row {row}, column {column}) comes from ")
        most = int(square.maps[token].argmax())
        assert f"most of it from patch {most} (row {most // 24}, column {most % 24}): " in shown.status
    for patch in (178, 0, 575):
        row, column = divmod(patch, 24)
        shown.point("patches", 0, patch)
        takers = square.maps[:, row, column]
        count = int((takers > square.scale / 65535 / 2).sum())  # shares travel as 16 bits
        shown.assert_marked("tokens", takers)
        assert shown.marked("patches") == (None, {})
        assert shown.frame("patches") == [column, row, 1, 1]
        most = int(takers.argmax())
        name = (
            f"token {most} (row {most // 12}, column {most % 12}): {100 * takers.max():#.3g} % of it comes from here."
        )
        assert shown.status == (
            f"patch {patch} (row {row}, column {column}) is taken by "
            f"{count} token{'s' if count > 1 else ''}, most by {name}"
        )


@needs_browser
def test_nothing_is_marked_beside_the_panels(browser, square, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains

    shown = Page(browser, square, tmp_path)
    shown.point("tokens", 0, 40)
    assert shown.marked("patches") != (None, {})
    ActionChains(browser).move_to_element(browser.find_element("tag name", "h1")).perform()
    assert [shown.marked(panel) for panel in ("patches", "tokens")] == [(None, {})] * 2
    assert [shown.frame(panel) for panel in ("patches", "tokens")] == [None, None]
    assert shown.status == ""


@needs_browser
def test_the_keyboard_does_what_the_pointer_does(browser, tiled, tmp_path):
    from selenium.webdriver.common.keys import Keys

    shown = Page(browser, tiled, tmp_path)
    shown.keys(Keys.TAB, Keys.TAB)
    assert shown.status.startswith("token 0 (tile 0, row 0, column 0) ")
    shown.keys(Keys.ARROW_DOWN, *[Keys.ARROW_RIGHT] * 9, Keys.ARROW_UP, Keys.ARROW_UP)
    assert shown.status.startswith("token 65 (tile 1, row 0, column 1) ")
    shown.assert_marked("patches", tiled.maps[65], tile=1)


@needs_browser
def test_tiles(browser, tiled, tmp_path):
    """Row by row, and the thumbnail last: token 5 of each."""
    shown = Page(browser, tiled, tmp_path)
    for tile in range(7):
        shown.point("tokens", tile, 5)
        shown.assert_marked("patches", tiled.maps[64 * tile + 5], tile)
        left, top = (24 * length // 336 for length in tiled.places[tile])
        assert shown.frame("patches") == [left + 15, top, 3, 3]
        shown.point("patches", tile, 24 * 4 + 3)
        shown.assert_marked("tokens", tiled.maps[64 * tile : 64 * tile + 64, 4, 3], tile)
        assert shown.status.startswith(f"patch 99 (tile {tile}, row 4, column 3) is taken by 1 token, most by token ")


@needs_browser
def test_a_page_needs_nothing_but_itself(browser, square, tmp_path):
    """The largest maps that there are, every token from every patch, and a title made to break out."""
    torch.manual_seed(0)
    maps = torch.rand(144, 24, 24).add(0.1)
    title = "</title></script><script>document.title = 1</script> & \"DATA\" 'TITLE'"
    wide = dataclasses.replace(square, title=title, maps=maps / maps.sum((1, 2), keepdim=True), regions=None)
    shown = Page(browser, wide, tmp_path)
    assert (tmp_path / "page.html").stat().st_size < 500_000
    assert browser.title == title
    shown.point("tokens", 0, 100)
    shown.assert_marked("patches", wide.maps[100])
    assert shown.frame("patches") is None
    assert shown.status.startswith("token 100 (row 8, column 4) comes from 576 patches, ")
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert browser.get_log("browser") == []
