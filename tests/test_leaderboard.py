"""The leaderboard: bad records are named and left out, good ones are shown right, and the page works in a browser."""

import csv
import html
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from conftest import command_line
from leaderboard_records import OWN, png, record, sample, write

import condense
from condense import distilled_sets
from condense.benchmarks import charts, leaderboard
from condense.benchmarks.command_settings import differing_settings
from condense.benchmarks.families import method_facts
from condense.errors import CondenseError
from condense.judge import compute_scores, time_to_accuracy
from condense.registry import METHODS


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


@pytest.fixture
def built(results, tmp_path):
    """``built()`` builds the page of ``results`` and gives what was built and its text."""

    def run(**options):
        found = leaderboard.build_page(results, tmp_path / "site", **options)
        return found, found.index.read_text()

    return run


class Parsed(HTMLParser):
    """Tags and names of attributes that occur, links, sources and ids."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.links, self.ids = [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.attributes |= set(values)
        self.links += [values[key] for key in ("href", "src") if values.get(key)]
        self.ids += [values["id"]] if "id" in values else []


def tables(text):
    """The text of every section of measured rows, without its tags."""
    sections = re.findall(r'<section id="on-.*?</section>', text, re.S)
    return [html.unescape(re.sub(r"<[^>]+>", " ", section)) for section in sections]


def test_bytes_from_outside_and_what_labels_are(results, built):
    content = record(label_kind="teacher")
    content["set"]["bytes"]["external"] += 44_700_000
    content["set"]["bytes"]["total"] += 44_700_000
    content["set"]["labelling"] = {"exactness": "exact", "step_cost": "a forward pass of the teachers"}
    write(results, "a", content)
    text = tables(built()[1])[0]
    assert "teacher labels, exact; a step costs: a forward pass of the teachers" in text
    assert "external 44.7 MB; 1.2 MB stored, 45.9 MB with external" in text


def edited(change, **values):
    """A good record with one fault."""
    content = record(**values)
    change(content)
    return content


def shown(text):
    return len(re.findall(r'<tr class="main">\n<td class="thumb">', text))


# -- what is left out -------------------------------------------------------------------------------------------------

BAD = {
    "foreign-field": (edited(lambda r: r["set"].update(stars=5)), "foreign field 'stars' in 'set'"),
    "missing-field": (edited(lambda r: r.pop("command")), "lacks 'command'"),
    "wrong-type": (edited(lambda r: r["set"].update(ipc="ten")), "'set.ipc'"),
    "newer": (edited(lambda r: r.update(schema="condense.record/9")), "condense.record/9"),
    "not-a-number": (json.dumps(record()).replace('"seconds": 480.0', '"seconds": NaN'), "NaN is not a number"),
    "endless": (json.dumps(record()).replace('"seconds": 480.0', '"seconds": 1e999'), "'cost.seconds'"),
    "no-json": ("accuracy: 99 %", "not readable as JSON"),
    "a-list": ("[]", "'the record'"),
    "empty": ("", "not readable as JSON"),
    "deep": ("[" * 100000, "not readable as JSON"),
    "half-a-letter": (edited(lambda r: r["set"].update(name="\ud800")), "'set.name' is not valid text"),
    "a-novel": (edited(lambda r: r.update(command="x" * 20000)), "'command' is longer than"),
    "accuracy-of-two": (edited(lambda r: r["results"][0].update(mean=2.0)), "'results.0.mean'"),
    "mean-made-up": (edited(lambda r: r["results"][0].update(mean=0.99)), "'mean' is not that of its accuracies"),
    "only-controls": (edited(lambda r: r.update(results=r["results"][1:])), "no result of the distilled set"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_with_its_fault_and_the_rest_is_built(name, results, built):
    content, fault = BAD[name]
    write(results, "good", record())
    write(results, name, content)
    found, text = built()
    assert [entry.file for entry in found.rejected] == [f"{name}.json"]
    assert fault in found.rejected[0].reason
    assert (found.records, found.rows, shown(text)) == (1, 1, 1)
    assert f"<b>{name}.json</b>" in text and html.escape(fault, quote=False).split("'")[0] in text
    assert str(results) not in text
    assert not (found.index.parent / "records" / f"{name}.json").exists()


def test_a_huge_file_and_a_folder_are_left_out_by_name(results, built):
    write(results, "good", record())
    with (results / "huge.json").open("wb") as file:
        file.truncate(64 * 1024 * 1024)
    (results / "folder.json").mkdir()
    found, _ = built()
    assert {entry.file: entry.reason.split(" ")[0] for entry in found.rejected} == {
        "folder.json": "not",
        "huge.json": "larger",
    }


def test_a_page_of_bad_records_alone_is_still_built(results, built):
    write(results, "bad", "{}")
    found, text = built()
    assert found.rows == 0 and "No record was accepted" in text and found.published > 0


def test_text_of_records_is_never_markup(results, built):
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>"
    content = record(evil, evil, name=evil, command=evil, networks=(evil,), own=evil, protocol=evil, label_kind=evil)
    content["command"] = content["environment"]["torch"] = content["cost"]["device"] = content["data"]["name"] = evil
    content["missing"] = [{"arm": evil, "why": evil}]
    write(results, "<b onclick=alert(1)>&..%2f", content)
    write(results, "harmless", record())
    write(results, "<i>bad", "{}")
    found, text = built()
    assert found.records == 2 and shown(text) == 2
    parsed = Parsed(text)
    tags = parsed.tags
    assert not [name for name in parsed.attributes if name.startswith("on")]
    assert tags.count("script") == 1 and "i" not in tags[tags.index("footer") :]
    names = {path.name for path in (found.index.parent / "records").iterdir()}
    assert names == {"b-onclick-alert-1-2f.json", "b-onclick-alert-1-2f.png", "harmless.json", "harmless.png"}
    assert evil not in text


def test_pictures_are_copied_only_where_they_are_pngs_of_a_sane_size(results, built):
    write(results, "good", record(), picture=True)
    write(results, "none", record(), picture=False)
    write(results, "fake", record())
    (results / "fake.png").write_text("<svg onload=alert(1)>")
    write(results, "bomb", record())
    (results / "bomb.png").write_bytes(png()[:16] + b"\x7f\xff\xff\xff" * 2 + png()[24:])
    found, text = built()
    assert found.records == 4
    assert [entry.file for entry in found.rejected] == ["bomb.png", "fake.png"]
    assert [path.name for path in (found.index.parent / "records").glob("*.png")] == ["good.png"]
    assert len(re.findall(r'<td class="thumb"><span class="none">no picture', text)) == 3


def test_faults_of_the_published_numbers_are_named_by_line(results, built, tmp_path):
    write(results, "good", record())
    table = tmp_path / "published.csv"
    head = ",".join(leaderboard.COLUMNS)
    row = "dm,cifar10,{},net,{},0.6,plainly,paper,quoted"
    lines = [row.format(10, 48.9), row.format("x", 48.9), row.format(10, 480), "dm,cifar10,10"]
    lines.append("dm,cifar10,1,,26,,,,quoted")
    table.write_text("\n".join([head, *lines]) + "\n")
    found, text = built(published=table)
    assert found.published == 1 and text.count("<b>published.csv, line") == 4
    reasons = {entry.file: entry.reason for entry in found.rejected}
    assert "must be numbers" in reasons["published.csv, line 3"]
    assert "per cent" in reasons["published.csv, line 4"]
    assert "9 fields" in reasons["published.csv, line 5"]
    assert "lacks source" in reasons["published.csv, line 6"]
    table.write_text("method,stars\ndm,5\n")
    found, _ = built(published=table)
    assert found.published == 0 and "its columns are not" in found.rejected[0].reason
    found, text = built(published=tmp_path / "none.csv")
    assert found.published == 0 and found.rejected[0].reason == "not readable (No such file or directory)"
    assert "#published" not in Parsed(text).links and str(tmp_path) not in text


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_every_network_is_a_row_with_its_own_numbers(results, built):
    content = record(
        "dm", ipc=10, accuracy=0.489, random=0.26, full=0.848, networks=(OWN, "resnet18-bn"), made=480.0, train=60.0
    )
    write(results, "dm", content)
    found, text = built()
    assert found.rows == 2
    (table,) = tables(text)
    table = " ".join(table.split())
    for expected in ("48.9 ± 1.0", "43.9 ± 1.0", "26.0 ± 1.0", "+22.9", "1.2 MB", "9 min", "own", "unseen", "84.8"):
        assert expected in table
    assert f"{content['scores'][OWN]['LRS']['value']:.3f}" in table
    assert "Dataset Condensation with Distribution Matching" in table


def test_versions_and_data_never_share_a_table(results, built):
    write(results, "one", record(accuracy=0.111))
    write(results, "two", record(accuracy=0.222, protocol="dc-v1", version=2))
    write(results, "other-data", record(accuracy=0.333, fingerprint="11" * 32))
    write(results, "other-name", record(accuracy=0.444, dataset="cifar100"))
    _, text = built()
    found = tables(text)
    assert len(found) == 4
    for accuracy in ("11.1 ±", "22.2 ±", "33.3 ±", "44.4 ±"):
        assert sum(accuracy in " ".join(table.split()) for table in found) == 1
    assert "dc-v1 v2" in text and "data 11111111" in text and "data 00000000" in text


def test_published_numbers_stand_apart(results, built, tmp_path):
    table = tmp_path / "published.csv"
    table.write_text(f"{','.join(leaderboard.COLUMNS)}\npaperonly,cifar10,10,net,77.7,0.6,plainly,A paper,quoted\n")
    write(results, "dm", record("dm"))
    _, text = built(published=table)
    (section,) = re.findall(r'<section id="published">.*?</section>', text, re.S)
    assert "77.7" in section and "A paper" in section and "svg" not in section and "48." not in section
    rest = text.replace(section, "")
    assert "77.7" not in rest and "A paper" not in rest
    assert "paperonly" in rest.split("</form>")[0] and "paperonly" not in rest.split("</form>")[1]


def test_sets_of_other_people_are_marked(results, built):
    published = record()
    published["set"]["origin"] = "published-set"
    write(results, "dm", published)
    write(results, "dsa", record("dsa"))
    assert built()[1].count("set as its authors published it") == 1


def test_balanced_accuracies_are_shown(results, built):
    imbalanced = record(runs=2)
    for entry in imbalanced["results"]:
        entry["balanced_accuracies"] = [0.4, 0.41]
    write(results, "dm", imbalanced)
    assert built()[1].count("balanced 40.5") == 1 + len(imbalanced["results"])


def test_what_is_unknown_is_said_and_not_drawn(results, built):
    write(results, "imported", record("mtt", made=None, seed=None, command=None, runs=1, random=None), picture=False)
    write(results, "known", record("dm"))
    _, text = built()
    row = " ".join(re.sub(r"<[^>]+>", " ", re.search(r'<tbody id="imported.*?</tbody>\n<', text, re.S)[0]).split())
    for expected in ("no picture", "seed unknown", "1 student", "not run", "unknown train", "not recorded"):
        assert expected in row
    size_chart, time_chart = re.findall(r'<svg class="chart".*?</svg>', text, re.S)
    assert "mtt" in size_chart and "mtt" not in time_chart and "1 not drawn" in time_chart


def test_a_record_without_any_known_place_has_no_chart(results, built):
    content = record(made=None, random=None)
    content["set"]["bytes"] = dict.fromkeys(content["set"]["bytes"], 0)
    write(results, "nothing", content)
    found, text = built()
    assert found.rows == 1 and '<svg class="chart"' not in text


def test_the_track_is_that_of_the_labels_learned_from(results, built):
    write(results, "soft", record("sre2l", label_kind="per-view", label_bytes=14_000_000))
    content = record("rded", label_kind="soft")
    for entry in content["results"]:
        entry["labels"] = "hard"
    content["scores"] = compute_scores(content["results"], "soft")
    content["time"] = time_to_accuracy(content["results"], content["cost"])
    write(results, "hard", content)
    _, text = built()
    found = re.findall(r'data-track="([^"]*)" data-method="([^"]*)"', text)
    assert sorted(found) == [("hard", "rded"), ("per-view", "sre2l")]
    assert "labels 14.0 MB" in text


def test_the_same_input_gives_the_same_bytes_and_every_link_leads_somewhere(results, tmp_path):
    sample(results)
    moved = tmp_path / "elsewhere" / "deeper"
    shutil.copytree(results, moved)
    sites = [tmp_path / "one", tmp_path / "two"]
    for source, site in zip((results, moved), sites):
        leaderboard.build_page(source, site)
    one, two = ({str(p.relative_to(site)): p.read_bytes() for p in site.rglob("*") if p.is_file()} for site in sites)
    assert one == two and len(one) > 20
    page = Parsed(one["index.html"].decode())
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        elif not link.startswith("data:") and link not in PAPERS:
            assert link in one
    assert b"http://" not in one["index.html"]
    assert one["index.html"].count(b"https://") == sum(link in PAPERS for link in page.links) > 0
    for name in ("cards/dm.html", "cards/mtt.html"):
        assert all(link in (*PAPERS, "data:,", "../index.html") for link in Parsed(one[name].decode()).links)


PAPERS = {method_facts(name).link for name in METHODS.names()} - {""}


def test_methods_of_a_family_share_a_shape_and_differ_in_colour():
    families = {name: method_facts(name).family for name in METHODS.names()}
    assert set(families.values()) == set(charts.SHAPES), "every family of the repository has a shape of its own"
    assert len(set(charts.SHAPES.values()) | {charts.OTHER_SHAPE}) == len(charts.SHAPES) + 1
    looks = charts.looks(families | {"mine": "other"})
    assert looks["mine"][1] == charts.OTHER_SHAPE
    for family in charts.SHAPES:
        shown = [looks[name] for name in families if families[name] == family]
        assert len({shape for _, shape in shown}) == 1
        assert len(set(shown)) == min(len(shown), charts.COLOURS)


def test_settings_tell_sets_of_a_method_apart():
    quick = "condense distill ftd --data x=PATH --ipc 1 --network a steps=100 lr=1 protocol=quick-v1"
    long = "condense distill ftd --data y=PATH --ipc 1 --network a --minutes 4 lr=1 ema=0.98"
    lightened = "condense distill dm && condense lighten a --labels topk k=2"
    assert differing_settings([quick, None]) == ["network=a, steps=100, lr=1", ""]
    assert differing_settings([quick, long]) == ["steps=100", "minutes=4, ema=0.98"]
    assert differing_settings([quick, quick]) == ["", ""]
    assert differing_settings(["condense distill dm", lightened]) == ["default settings", "labels=topk, k=2"]
    assert differing_settings(["an 'open quote a=1", "a=" + "x" * 1000])[1].endswith("…")


def test_differing_settings_stand_under_the_name_of_the_method(results, built):
    for steps in (10, 20):
        write(results, f"dm-{steps}", record(command=f"condense distill dm --ipc 10 lr=1 steps={steps}"))
    write(results, "dsa", record("dsa", command="condense distill dsa steps=99"))
    text = built()[1]
    assert re.findall(r'<small class="settings">([^<]*)', text) == ["steps=10", "steps=20"]


def test_rankings_are_of_one_cell_by_accuracy(results, built):
    for method, accuracy in (("dm", 0.40), ("dsa", 0.49), ("mtt", 0.48)):
        write(results, method, record(method, accuracy=accuracy, full=0.85))
    write(results, "other-ipc", record("dm", ipc=1))
    write(results, "other-protocol", record("dm", protocol="quick-v1"))
    text = built()[1]
    (cell,) = re.findall(r'<article class="cell".*?</article>', text, re.S)
    plain = " ".join(re.sub(r"<[^>]+>", " ", html.unescape(cell)).split())
    assert "cifar10, IPC 10" in plain and "random real images 26.0, full data 85.0" in plain
    assert [plain.index(name) for name in ("dsa 49.0", "mtt 48.0", "dm 40.0")] == sorted(
        plain.index(name) for name in ("dsa 49.0", "mtt 48.0", "dm 40.0")
    )
    assert re.findall(r'class="near"[^>]*>([^<]*)', cell) == ["", "≈", ""]  # 49.0 and 48.0 ± 2.5, but 40.0


def test_a_set_beside_its_record_is_offered_and_another_one_is_not(results, built, tmp_path):
    ready = Path(distilled_sets.__file__).parent / "digits" / "dm-ipc1.h5"
    mine = record("mine", "digits", 1)
    mine["set"]["sha256"] = condense.load(ready).sha256()
    write(results, "mine", mine)
    shutil.copy(ready, results / "mine.h5")
    write(results, "ready", mine | {"set": {**mine["set"], "method": "dm"}})
    write(results, "wrong", record("wrong"))
    shutil.copy(ready, results / "wrong.h5")
    write(results, "no-set", record("no-set"))
    (results / "no-set.h5").write_bytes(b"nothing")
    found, text = built()
    folder = found.index.parent / "records"
    assert sorted(path.name for path in folder.glob("*.h5")) == ["mine.h5", "ready.h5"]
    assert (folder / "mine.h5").read_bytes() == ready.read_bytes()
    assert [entry.file for entry in found.rejected] == ["no-set.h5", "wrong.h5"]
    assert "SHA-256 differs" in found.rejected[1].reason and str(results) not in text
    assert text.count('href="records/mine.h5"') == 2 and "records/wrong.h5" not in text


def test_ticks_are_few_round_and_inside():
    for ticks, low, high in (
        (charts.byte_ticks, 1e3, 9e3),
        (charts.byte_ticks, 20, 3e12),
        (charts.second_ticks, 0.02, 0.4),
        (charts.second_ticks, 50, 500),
        (charts.second_ticks, 1, 3e7),
    ):
        found = ticks(low, high)
        assert 2 <= len(found) <= 7 and all(low <= value <= high for value, _ in found)
        assert [value for value, _ in found] == sorted(value for value, _ in found)
    assert (1e6, "1 MB") in charts.byte_ticks(1e3, 1e9)
    assert (3600, "1 h") in charts.second_ticks(1, 1e5)


# -- the folder -------------------------------------------------------------------------------------------------------


def test_only_a_site_of_ours_is_replaced(results, built, tmp_path):
    write(results, "dm", record())
    site = tmp_path / "site"
    built()
    built()
    (site / "CNAME").write_text("mine")
    with pytest.raises(CondenseError, match="also holds CNAME"):
        built()
    assert (site / "CNAME").exists()
    built(force=True)
    assert sorted(path.name for path in site.iterdir()) == ["cards", "index.html", "records"]
    (site / "index.html").write_text("<h1>mine</h1>")
    with pytest.raises(CondenseError, match="not a leaderboard"):
        built()
    with pytest.raises(CondenseError, match="folder of its own"):
        leaderboard.build_page(results, results, force=True)
    with pytest.raises(CondenseError, match="is a file"):
        leaderboard.build_page(results, results / "dm.json", force=True)


def test_an_interrupted_build_leaves_the_old_page(results, built, tmp_path, monkeypatch):
    write(results, "dm", record())
    _, before = built()
    write(results, "dsa", record("dsa"))
    monkeypatch.setattr(leaderboard, "_page", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        built()
    assert (tmp_path / "site" / "index.html").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results", "site"]


def test_the_command_says_what_it_did(results, tmp_path, capsys):
    write(results, "dm", record())
    write(results, "bad", "{}")
    done = command_line(f"leaderboard --results {results} --out {tmp_path / 'site'}", capsys)
    assert done.code == 0
    assert "rows 1, records 1" in done.out and "left out 1" in done.out
    assert f"open {tmp_path / 'site' / 'index.html'}" in done.out
    assert done.err.startswith("condense: left out bad.json: lacks ")


def test_no_record_is_one_clear_line(results, tmp_path, capsys):
    for folder, expected in ((results, "no record (*.json) in it"), (tmp_path / "none", "no such folder")):
        done = command_line(f"leaderboard --results {folder} --out {tmp_path / 'site'}", capsys)
        assert done.code == 2 and expected in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "site").exists()


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: the page is not opened in a browser")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.binary_location = programs["chromium"]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # The driver is named, so that selenium looks for none and downloads none.
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs["chromedriver"]))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("leaderboard")
    sample(folder / "results")
    write(folder / "results", "hostile", record("<script>throw 1</script>", name="<img src=x onerror='throw 1'>"))
    write(folder / "results", "bad", "{}")
    long = "convnet-" + "x" * 300
    write(folder / "results", "long", record("m" * 200, dataset="d" * 150, networks=(long,), own=long))
    return leaderboard.build_page(folder / "results", folder / "site").index


@pytest.fixture
def page(browser, site):
    """``page(hash, width)`` opens the page afresh; at the end there must be no error in the browser's log."""
    browser.get_log("browser")

    def open_page(hash="", width=1280, javascript=True):
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not javascript})
        browser.get("about:blank")
        browser.get(site.as_uri() + hash)
        return browser

    yield open_page
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


VISIBLE = "[...document.querySelectorAll('{}')].filter(e => e.getClientRects().length)"


def visible(browser, selector, value="e => e"):
    return browser.execute_script(f"return {VISIBLE.format(selector)}.map({value})")


def choose(browser, name, *values):
    """Ticks options of a filter; ``order`` is a plain list."""
    if name == "order":
        from selenium.webdriver.support.ui import Select

        Select(browser.find_element("css selector", f"select[name={name}]")).select_by_visible_text(values[0])
        return
    choice = browser.find_element("css selector", f".choice[data-name={name}]")
    choice.find_element("tag name", "summary").click()
    for value in values:
        choice.find_element("css selector", f"input[value='{value}']").click()


def everything(browser):
    """Opens folded lists, so that all rows that the filters leave are shown."""
    browser.execute_script("document.querySelectorAll('button.all:not([hidden])').forEach((b) => b.click())")


ROWS = "#sections tbody[id]"
BOARD = '#sections section[data-dataset="cifar10"][data-protocol="dc-v1"]'


@pytest.mark.parametrize("key", ["accuracy", "ipc", "bytes", "random", "time"])
def test_headers_sort_by_number_both_ways(page, key):
    browser = page()
    column = f"return [...document.querySelectorAll('{BOARD} .main')].map(r => r.cells[arguments[0]].dataset.sort)"
    button = browser.find_element("css selector", f"{BOARD} button[data-key={key}]")
    index = browser.execute_script("return arguments[0].closest('th').cellIndex", button)
    seen = []
    for _ in range(2):
        button.send_keys("\n")  # the keyboard's click
        state = browser.execute_script("return arguments[0].closest('th').getAttribute('aria-sort')", button)
        values = browser.execute_script(column, index)
        numbers = [float(value) for value in values if value]
        assert len(numbers) > 5 and values[len(numbers) :] == [""] * (len(values) - len(numbers))  # unknown: last
        assert numbers == sorted(numbers, reverse=state == "descending")
        seen.append(state)
    assert sorted(seen) == ["ascending", "descending"]
    assert f"sort={key}" in browser.current_url


def test_filters_hide_rows_sections_and_marks(page):
    browser = page()
    everything(browser)
    whole = len(visible(browser, ROWS)), len(visible(browser, ".mark[data-rows]"))
    choose(browser, "dataset", "cifar10")
    choose(browser, "ipc", "10")
    choose(browser, "method", "dm")
    facts = visible(browser, ROWS, "e => [e.dataset.dataset, e.dataset.ipc, e.dataset.method]")
    assert facts == [["cifar10", "10", "dm"]] * 2
    assert len(visible(browser, "#sections > section")) == 1
    shown_ids = set(visible(browser, ROWS, "e => e.id"))
    marks = visible(browser, ".mark[data-rows]", "e => e.dataset.rows.split(' ')")
    assert 0 < len(marks) < whole[1] and all(shown_ids & set(rows) for rows in marks)
    assert visible(browser, ".legend [data-method]", "e => e.dataset.method") == ["dm"]
    folded = "return [...document.querySelectorAll('.published tbody')].some((body) => body.checkVisibility())"
    assert not browser.execute_script(folded)  # until asked
    browser.find_element("css selector", "#quoted > summary").click()
    published = visible(browser, ".published tbody", "e => [e.dataset.dataset, e.dataset.ipc, e.dataset.method]")
    quoted, _ = leaderboard.read_published(leaderboard.PUBLISHED_CSV)
    known = [row for row in quoted if (row.dataset, row.ipc, row.method) == ("cifar10", 10, "dm")]
    assert published == [["cifar10", "10", "dm"]] * len(known)
    assert browser.find_element("id", "count").text == f"2 of {whole[0]} rows"
    assert "published" not in browser.find_element("id", "count").text
    browser.find_element("css selector", "input[name=q]").send_keys("no such word")
    assert visible(browser, ROWS) == [] and browser.find_element("id", "nothing").is_displayed()
    browser.find_element("css selector", "button[type=reset]").click()
    assert (len(visible(browser, ROWS)), len(visible(browser, ".mark[data-rows]"))) == whole
    assert "#" not in browser.current_url


def test_the_hash_brings_a_view_back(page):
    browser = page()
    choose(browser, "protocol", "dc-v1")
    choose(browser, "network", OWN)
    choose(browser, "order", "protocol")
    browser.find_element("css selector", "input[name=uses][value='10']").click()
    browser.find_element("css selector", f"{BOARD} button[data-key=accuracy]").click()
    everything(browser)
    ids, hash = visible(browser, ROWS, "e => e.id"), "#" + browser.current_url.split("#")[1]
    assert len(ids) > 5
    browser = page(hash)
    everything(browser)
    assert visible(browser, ROWS, "e => e.id") == ids
    assert browser.execute_script("return document.documentElement.dataset.uses") == "10"
    browser = page("#dataset=nonsense&uses=7&sort=stars:up&foo=bar&ipc=&a=s:none&b=m:")
    everything(browser)
    assert len(visible(browser, ROWS)) > len(ids)


def test_tables_can_be_ordered_by_protocol(page):
    browser = page()
    choose(browser, "order", "protocol")
    names = visible(browser, "#sections > section", "e => e.dataset.protocol")
    assert names == sorted(names) and len(set(names)) > 1


def test_the_number_of_uses_moves_marks_and_times(page):
    browser = page()
    where = f"{BOARD} .chart .mark.c0, {BOARD} .chart .mark.c1, {BOARD} .chart .mark.c2"
    places = "e => e.getBoundingClientRect().x"
    before = visible(browser, where, places), visible(browser, f"{BOARD} .time", "e => e.innerText")
    browser.find_element("css selector", "input[name=uses][value='100']").click()
    deadline = time.monotonic() + 10
    while visible(browser, where, places) == before[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # the marks glide
    after = visible(browser, where, places), visible(browser, f"{BOARD} .time", "e => e.innerText")
    moved = [b - a for a, b in zip(before[0], after[0])]
    assert max(moved) <= 0.5 and min(moved) < -50 and any(abs(shift) < 0.5 for shift in moved)
    assert before[1] != after[1] and len(before[1]) == len(after[1])


def test_every_link_and_picture_is_there(page, site):
    browser = page()
    links = browser.execute_script("return [...document.querySelectorAll('a')].map(a => a.href.baseVal ?? a.href)")
    assert len(links) > 50
    for link in links:
        url = urlparse(link)
        if link in PAPERS:
            continue
        if url.path and not link.startswith("#"):
            assert (site.parent / unquote(url.path)).exists()
        if url.fragment:
            assert browser.find_elements("id", url.fragment)
    loaded = browser.execute_async_script("""
        const done = arguments[0], images = [...document.images];
        images.forEach((image) => (image.loading = "eager"));
        Promise.all(images.map((image) => image.decode())).then(() => done(images.length), (e) => done(String(e)));
    """)
    assert loaded > 10


def test_charts_are_drawn_inside_their_frame(page):
    browser = page()
    boxes = browser.execute_script(f"""return {VISIBLE.format(".chart .mark")}.map((mark) => {{
        const box = mark.querySelector(".shape > *, path:not(.interval)").getBoundingClientRect();
        const frame = mark.ownerSVGElement.getBoundingClientRect();
        const inside = box.left >= frame.left && box.right <= frame.right
            && box.top >= frame.top && box.bottom <= frame.bottom;
        return [box.width, box.height, inside];
    }})""")
    assert len(boxes) > 30
    assert all(width > 3 and height > 2 and inside for width, height, inside in boxes)
    assert len(visible(browser, ".chart circle")) > 1 and len(visible(browser, ".chart .line path")) > 2


@pytest.mark.parametrize("width", [360, 390, 700, 1000, 1280])
def test_nothing_scrolls_sideways(page, width):
    browser = page(width=width)
    browser.execute_script("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    wide, inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert inner == width and wide <= width
    outside = ":not(.cells *, .box *)"  # these boxes scroll by themselves
    parts = f"main {outside}, header *, #filters *"
    over = visible(browser, parts, "e => [e.tagName, e.getBoundingClientRect().right]")
    assert [entry for entry in over if entry[1] > width + 1] == []


@pytest.mark.parametrize("width", [360, 1280])
def test_without_javascript_everything_is_a_plain_table(page, width):
    browser = page("#dataset=cifar100", width=width, javascript=False)
    assert "js" not in browser.find_element("tag name", "html").get_attribute("class").split()
    assert not browser.find_element("id", "filters").is_displayed()
    assert not any(part.is_displayed() for part in browser.find_elements("css selector", ".script"))
    assert browser.find_element("css selector", "#ranking li").is_displayed()
    rows = browser.find_elements("css selector", ROWS)
    assert len(rows) > 15 and all(row.is_displayed() for row in rows)
    assert browser.find_element("css selector", ".chart circle").is_displayed()
    detail = browser.find_element("css selector", f"{ROWS} details")
    detail.find_element("tag name", "summary").click()
    assert detail.find_element("tag name", "pre").is_displayed()


def test_a_mark_leads_to_its_row(page):
    browser = page("#dataset=cifar10")
    link = browser.find_element("css selector", f"{BOARD} .chart a")
    row = link.get_attribute("href").split("#")[1] if "#" in (link.get_attribute("href") or "") else None
    row = row or browser.execute_script("return arguments[0].href.baseVal.slice(1)", link)
    browser.execute_script("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", link)
    deadline = time.monotonic() + 10
    while not browser.execute_script("return document.querySelector(':target')") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert browser.execute_script("return document.querySelector(':target').id") == row
    assert set(visible(browser, ROWS, "e => e.dataset.dataset")) == {"cifar10"}  # the filter stays


def test_a_filter_takes_several_values_and_marks_what_would_leave_nothing(page):
    browser = page()
    choose(browser, "dataset", "cifar100")
    options = browser.execute_script("""
        const wanted = [...document.querySelectorAll(".choice[data-name=method] label")];
        return Object.fromEntries(wanted.map((l) => {
            const input = l.querySelector("input");
            return [input.value, [input.disabled, l.querySelector("small").textContent]];
        }))""")
    assert options["dm"] == [False, "3"] and options["m" * 200] == [True, "0"]
    published = leaderboard.read_published(leaderboard.PUBLISHED_CSV)[0]
    quoted = sum((row.method, row.dataset) == ("ftd", "cifar100") for row in published)
    assert options["ftd"] == [False, f"{quoted} published"]
    choose(browser, "method", "dm", "dsa")
    assert set(visible(browser, ROWS, "e => e.dataset.method")) == {"dm", "dsa"}
    assert browser.current_url.count("method=") == 2
    browser.find_element("css selector", "input[name=q]").send_keys("siamese ipc10")
    assert visible(browser, ROWS, "e => e.dataset.method") == ["dsa"]  # a word of the paper, and of the set's name
    hash = "#" + browser.current_url.split("#")[1]
    browser = page(hash)
    assert visible(browser, ROWS, "e => [e.dataset.method, e.dataset.ipc]") == [["dsa", "10"]]


def test_the_csv_has_the_rows_of_the_view(page, tmp_path):
    browser = page("#dataset=cifar10&protocol=dc-v1&sort=accuracy:desc")
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    browser.find_element("id", "download").click()
    file, deadline = tmp_path / "condense-leaderboard.csv", time.monotonic() + 10
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    everything(browser)
    wanted = visible(browser, f"{BOARD} tbody[id]", "e => e.dataset")
    assert [(row["method"], row["ipc"]) for row in rows] == [(data["method"], data["ipc"]) for data in wanted]
    values = [float(row["accuracy"]) for row in rows]
    assert len(rows) > 8 and values == sorted(values, reverse=True) and values[0] <= 1


def test_text_of_a_record_is_no_formula_in_the_csv(page):
    browser = page("#q=hostile")
    field = browser.execute_script("return document.querySelector('tbody[id^=hostile]').dataset.facts")
    assert json.loads(field)["csv"]["method"] == "<script>throw 1</script>"
    source = (leaderboard.HERE / "page" / "page.js").read_text()
    (function,) = re.findall(r"  (function field\(value\) \{.*?\n  \})", source, re.S)
    answers = browser.execute_script(f"{function}; return ['=1+1', '-2', 'a,\"b', 3, null, -0.5].map(field)")
    assert answers == ["'=1+1", "'-2", '"a,""b"', "3", "", "-0.5"]


def test_rankings_follow_the_filters_and_lists_are_short_until_asked(page):
    browser = page(width=390)
    height = browser.execute_script("return document.documentElement.scrollHeight")
    counts = [len(browser.find_elements("css selector", BOARD + rows)) for rows in (" tbody:not(.beyond)", " tbody")]
    assert 2 < counts[0] < counts[1]
    names = """return [...document.querySelectorAll('#ranking .cell')]
        .find((cell) => cell.innerText.includes("cifar10, IPC 10") && cell.innerText.includes(arguments[0]))
        .innerText.match(/\\b(mtt|dsa|dm|random)\\b(?! real)/g)"""
    assert browser.execute_script(names, f"{OWN}, dc-v1") == ["mtt", "dsa", "dm", "random"]
    everything(browser)
    browser.execute_script("document.querySelectorAll('.fold, .tools').forEach((part) => (part.open = true))")
    assert height < browser.execute_script("return document.documentElement.scrollHeight") / 3
    assert not browser.find_elements("css selector", "tbody.beyond")
    choose(browser, "method", "dm", "dsa")
    assert browser.execute_script(names, f"{OWN}, dc-v1") == ["dsa", "dm"]


def test_no_target_of_a_link_lies_under_the_bar(page):
    browser = page()
    bar = "document.getElementById('filters').getBoundingClientRect().bottom"
    names = "return [...document.querySelectorAll('#ranking li a')].map((a) => a.hash.slice(1))"
    for target in [*browser.execute_script(names)[:3], "published"]:
        browser.execute_script("location.hash = arguments[0]", target)
        deadline = time.monotonic() + 10
        where = f"return [document.getElementById(arguments[0]).getBoundingClientRect().top, {bar}, innerHeight]"
        while True:
            top, below, height = browser.execute_script(where, target)
            if below <= top < height or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        assert below <= top < height and below > 40


@pytest.mark.parametrize("width", [390, 1280])
def test_two_sets_are_compared(page, width):
    browser = page("#dataset=cifar10&protocol=dc-v1", width=width)
    picks = {name: browser.find_element("css selector", f"tbody[id^={name}] .pick") for name in (FIRST, SECOND)}
    for button in picks.values():
        browser.execute_script("arguments[0].click()", button)
    assert [button.get_attribute("aria-pressed") for button in picks.values()] == ["true", "true"]
    pair = browser.find_element("id", "pair")
    assert len(pair.find_elements("css selector", ".pictures img")) == 2
    rows = "return [...arguments[0].querySelectorAll('tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    groups, lines = {}, {}
    for name, *values in browser.execute_script(rows, pair):
        lines = lines if values else groups.setdefault(name, {})
        lines |= {name: values} if values else {}
    assert list(groups) == [f"on {OWN}", "on resnet18-bn", "the set"]
    *accuracies, gap = groups[f"on {OWN}"]["accuracy, %"]
    cells = [f"tbody[id^={name}][data-network='{OWN}'] .accuracy" for name in (FIRST, SECOND)]
    texts = [browser.find_element("css selector", cell).get_attribute("textContent") for cell in cells]
    assert all(text.startswith(accuracy) for text, accuracy in zip(texts, accuracies))
    assert ([accuracy[:4] for accuracy in accuracies], gap) == (["48.9", "65.3"], "+16.4")
    assert groups["on resnet18-bn"]["accuracy, %"][1:] == ["not judged", ""]
    assert groups["the set"]["bytes"] == ["1.2 MB", "1.2 MB", "× 1"]
    assert groups["the set"]["time to make"] == ["7.67 min", "16.7 h", "× 130"]
    assert "a=s" in browser.current_url and "b=s" in browser.current_url
    browser.execute_script("document.getElementById('swap').click()")
    assert "−16.4" in pair.text
    if width < 600:
        return
    browser = page("#" + browser.current_url.split("#")[1], width=width)
    assert "−16.4" in browser.find_element("id", "pair").text
    browser.execute_script("document.querySelector('#compare [type=reset]').click()")
    deadline = time.monotonic() + 10
    while browser.find_element("id", "pair").text and time.monotonic() < deadline:
        time.sleep(0.05)
    assert browser.find_element("id", "pair").text == "" and "a=s" not in browser.current_url


FIRST, SECOND = "cifar10-dm-ipc10", "cifar10-mtt-ipc10"


def test_two_methods_are_compared_where_both_have_a_cell(page):
    browser = page("#a=m:dm&b=m:dsa")
    pair = browser.find_element("id", "pair")
    rows = [row.text for row in pair.find_elements("css selector", "tbody tr")]
    assert len(rows) == 5  # IPC 1, 10, 50 of CIFAR-10 and 1, 10 of CIFAR-100
    assert "ahead of A (dm) in 4 of 5 cells" in pair.text
    gaps = [gap for row in rows for gap in re.findall(r" ([+−]\d\.\d) ", row)]
    assert gaps == ["+3.0", "+3.0", "−2.0", "+3.0", "+3.0"]
    browser = page("#a=m:sre2l&b=m:dsa")
    assert "No cell has both" in browser.find_element("id", "pair").text
    browser = page("#a=s:hostile&b=m:dm")
    assert "<script>throw 1</script>" in browser.find_element("id", "pair").text


@pytest.mark.parametrize("width", [390, 1280])
def test_accessibility_rules_hold(browser, tmp_path, width):
    axe = pytest.importorskip("axe_core_python", reason="axe-core-python is not installed")
    for stem, content in (("dm", record("dm", full=0.85)), ("rded", record("rded", label_kind="teacher"))):
        write(tmp_path / "results", stem, content)
    small = leaderboard.build_page(tmp_path / "results", tmp_path / "site", None)
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    addresses = [f"{small.index.as_uri()}#a=m:dm&b=m:rded", (small.index.parent / "cards" / "dm.html").as_uri()]
    for address in addresses if width < 600 else addresses[:1]:
        browser.get(address)
        browser.execute_script("document.querySelectorAll('details').forEach((part) => (part.open = true))")
        browser.execute_script((Path(axe.__file__).parent / "axe.min.js").read_text())
        found = browser.execute_async_script("axe.run({resultTypes: ['violations']}).then(arguments[0])")
        faults = [(rule["id"], [node["html"][:200] for node in rule["nodes"][:3]]) for rule in found["violations"]]
        assert faults == [] and len(found["passes"]) > 10
