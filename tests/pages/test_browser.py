"""Every kind of page in a real browser, opened from a file: what it shows, and that it asks for nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.audit.made_reports import dropping
from tests.pages import test_comparison as compared
from tests.pages.browser import chromium, until, visit
from tests.pages.made_pages import evaluation_page, run_folder
from thence.compare.result import read_results
from thence.compare.statistics import statistics
from thence.pages.audit.page import write_page as write_audit
from thence.pages.comparison.page import render_page
from thence.pages.overlay.page import write_page as write_overlay
from thence.pages.run.page import write_page as write_run

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium: install one, or name it in THENCE_BROWSER")
STUDY = Path(__file__).parents[2] / "studies" / "embedded-world"
KINDS = ("run", "overlay", "evaluation", "comparison", "audit")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page of every kind."""
    place = tmp_path_factory.mktemp("pages")
    runs = [run_folder(place / name, rl) for name, rl in (("first", 0.5), ("second", 0.6))]
    costs = {name: {"base": 0.0}.get(name, 1e12) for name in compared.EFFECTS}
    sections = tuple(s for s in compared.SECTIONS if s["kind"] in ("methods", "score-against-flops", "dynamics"))
    made = compared.make_comparison(compared.EFFECTS, arms=compared.ARMS, bases=("rich", "poor"), seeds=2, flops=costs)
    (place / "comparison.html").write_text(render_page(statistics(replace(made, sections=sections), 50)))
    write_audit(dropping(), place / "audit.html")
    return {
        "run": write_run(runs[0]),
        "overlay": write_overlay(runs, place / "overlay.html", "thence report first second"),
        "evaluation": evaluation_page(place / "evaluation"),
        "comparison": place / "comparison.html",
        "audit": place / "audit.html",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_says_nothing_wrong_and_asks_for_nothing_but_itself(browser: Any, pages: dict[str, Path], kind: str):
    with visit(browser, pages[kind]) as found:
        assert found.said == []
        assert found.requests == [pages[kind].resolve().as_uri()]
        charts = found.page.locator(".chart").count()
        assert found.page.locator(".chart svg").count() == charts and (charts > 0) == (kind != "audit")
    assert pages[kind].stat().st_size < 4_000_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_fits_a_phone(browser: Any, pages: dict[str, Path], kind: str):
    with visit(browser, pages[kind], **PHONE) as found:
        assert found.page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "score"), [("run", 1), ("overlay", 1), ("evaluation", 1), ("comparison", 1)])
def test_the_first_score_is_not_cut_on_a_phone(browser: Any, pages: dict[str, Path], kind: str, score: int):
    with visit(browser, pages[kind], **PHONE) as found:
        cell = found.page.locator("table tbody tr:not(.group)").first.locator("th, td").nth(score)
        box = cell.bounding_box()
        assert re.search(r"\d\.\d", cell.inner_text()) and box and box["x"] + box["width"] <= 390


@pytest.mark.slow
def test_pointing_at_a_curve_reads_it(browser: Any, pages: dict[str, Path]):
    with visit(browser, pages["run"]) as found:
        found.page.locator(".chart").first.scroll_into_view_if_needed()
        box = found.page.locator(".chart").first.bounding_box()
        found.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        found.page.wait_for_selector("#vg-tooltip-element.visible")
        said = found.text("#vg-tooltip-element")
        assert "step" in said and "nats a trained token" in said


def ticks(found: Any) -> list[str]:
    """The labels of the first chart's axes."""
    return found.page.locator(".chart").first.locator(".role-axis-label text").all_inner_texts()


@pytest.mark.slow
def test_buttons_and_the_wheel_zoom_and_show_all_again(browser: Any, pages: dict[str, Path]):
    with visit(browser, pages["run"]) as found:
        whole = ticks(found)
        panel = found.page.locator(".panel").first
        panel.hover()
        panel.get_by_role("button", name="Zoom in").click()
        until(lambda: ticks(found) != whole)
        panel.get_by_role("button", name="Show all").click()
        until(lambda: ticks(found) == whole)
        box = panel.locator(".chart").bounding_box()
        found.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        found.page.keyboard.down("Control")
        found.page.mouse.wheel(0, -400)
        found.page.keyboard.up("Control")
        until(lambda: ticks(found) != whole)


def lines(found: Any) -> int:
    """Lines with points in the first chart."""
    paths = found.page.locator(".chart").first.locator(".mark-line path")
    return sum(bool(path.get_attribute("d")) for path in paths.all())


@pytest.mark.slow
def test_a_run_is_switched_off_and_on_and_shown_alone(browser: Any, pages: dict[str, Path]):
    with visit(browser, pages["overlay"]) as found:
        keys = found.page.locator("figure.charts").first.locator(".keys button")
        assert keys.all_inner_texts() == ["first", "second"] and lines(found) == 2
        keys.first.click()
        until(lambda: lines(found) == 1 and keys.first.get_attribute("aria-pressed") == "false")
        keys.first.click(modifiers=["Shift"])
        until(lambda: lines(found) == 1 and keys.nth(1).get_attribute("aria-pressed") == "false")
        keys.first.click(modifiers=["Shift"])
        until(lambda: lines(found) == 2)


@pytest.mark.slow
def test_a_table_is_sorted_within_its_groups_and_put_back(browser: Any, pages: dict[str, Path]):
    with visit(browser, pages["comparison"]) as found:
        table = found.page.locator("section.methods .of-base:not([hidden]) table").first

        def scores() -> list[tuple[str, float | None]]:
            rows = table.locator("tbody tr").evaluate_all("rows => rows.map(r => [r.className, r.cells[1]?.innerText])")
            return [(name, None if text is None else float(text.split()[0])) for name, text in rows]

        def groups(rows: list[tuple[str, float | None]]) -> list[list[float]]:
            parts: list[list[float]] = []
            for name, score in rows:
                if name == "group":
                    parts.append([])
                elif score is not None:
                    parts[-1].append(score)
            return parts

        before = scores()
        head = table.get_by_role("columnheader").nth(1)
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == "descending"
        assert groups(scores()) == [sorted(part, reverse=True) for part in groups(before)] != groups(before)
        head.get_by_role("button").click()
        assert groups(scores()) == [sorted(part) for part in groups(before)]
        head.get_by_role("button").click()
        assert scores() == before


@pytest.mark.slow
def test_one_base_is_shown_at_a_time(browser: Any, pages: dict[str, Path]):
    with visit(browser, pages["comparison"]) as found:
        shown = found.page.locator("section.methods h3:visible")
        assert shown.all_inner_texts() == ["rich"]
        found.page.locator(".switch button", has_text="poor").click()
        assert shown.all_inner_texts() == ["poor"]
        chart = found.page.locator("section.dynamics .of-base:not([hidden]) .chart svg").first
        until(lambda: (chart.bounding_box() or {"width": 0})["width"] > 200)
        found.page.locator(".switch button", has_text="all").click()
        assert shown.all_inner_texts() == ["rich", "poor"]


@pytest.mark.slow
def test_every_question_of_the_study_fits_a_screen_and_prints_whole(browser: Any, tmp_path: Path):
    page = tmp_path / "study.html"
    page.write_text(render_page(statistics(read_results(STUDY), 50)))
    with visit(browser, page, viewport={"width": 1280, "height": 800}) as found:
        room = 800 - found.page.locator(".switch").bounding_box()["height"]
        sections = found.page.locator("section")
        assert sections.count() > 10
        heights = {part.locator("h2").first.inner_text(): part.bounding_box()["height"] for part in sections.all()}
        assert {name: height for name, height in heights.items() if height > room} == {}
        folded = found.page.locator("details:not([open])")
        before = folded.count()
        found.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert before > 10 and folded.count() == 0
        found.page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert folded.count() == before and found.said == []


def test_samples_are_filtered_sorted_and_paged_through(browser: Any, pages: dict[str, Path]):
    with visit(browser, pages["run"]) as found:
        page, count = found.page, "#held-samples [role=status]"
        assert found.text(count) == "1–20 of 93"
        page.get_by_role("button", name="Next").click()
        assert found.text(count) == "21–40 of 93"
        page.locator("[name=verdict]").select_option("wrong")
        assert found.text(count) == "1–20 of 31"
        page.locator("[name=group]").select_option("eval-rl, test, T = 0.6")
        assert found.text(count) == "1–10 of 10"
        page.get_by_label("Length from").fill("20")
        assert found.text(count) == "1–5 of 5"
        page.locator("[name=order]").select_option("length-down")
        lengths = [int(text.split()[0]) for text in page.locator(".sample summary small").all_inner_texts()]
        assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 1
        page.get_by_role("button", name="Reset").click()
        page.wait_for_selector("#held-samples [role=status]:text('of 93')")
        page.get_by_label("Step from").fill("2")
        assert found.text(count) == "1–2 of 2"
        page.get_by_label("Reward to").fill("0")
        assert found.text(count) == "1–1 of 1"


def test_samples_are_filtered_and_sorted_by_a_component_of_their_reward(browser: Any, pages: dict[str, Path]):
    with visit(browser, pages["evaluation"]) as found:
        page, count = found.page, "#held-samples [role=status]"
        assert found.text(count) == "1–18 of 18"
        page.get_by_label("Reward: <b>form to").fill("0.3")
        assert found.text(count) == "1–3 of 3"
        page.locator(".sample summary").first.click()
        assert "Reward: <b>form\t0.25" in page.locator(".sample table").first.inner_text()
        page.get_by_role("button", name="Reset").click()
        page.wait_for_selector("#held-samples [role=status]:text('of 18')")
        page.locator("[name=order]").select_option(label="highest right first")
        assert page.locator(".sample summary b").all_inner_texts() == ["right"] * 6 + ["wrong"] * 12
        assert found.said == []


def test_a_link_leads_to_one_sample_and_hostile_text_stays_text(browser: Any, pages: dict[str, Path]):
    with visit(browser, pages["run"], "sample-eval-rl-25") as found:
        item = found.page.locator("#sample-eval-rl-25")
        assert item.get_attribute("open") is not None
        assert "</pre><script>alert(1)</script>{{ 7 * 7 }}" in item.locator("pre").nth(1).inner_text()
        assert item.locator("script").count() == 0
        found.page.locator("[name=verdict]").select_option("right")
        found.page.evaluate("location.hash = '#sample-eval-base-2'")
        found.page.wait_for_selector("#sample-eval-base-2[open]")
        assert found.said == []


@pytest.mark.slow
def test_the_tokens_of_a_sample_are_coloured_by_what_training_made_of_them(browser: Any, pages: dict[str, Path]):
    with visit(browser, pages["run"]) as found:
        found.page.locator("[name=weighed]").select_option("kept")
        found.page.locator(".sample summary").first.click()
        tokens = found.page.locator(".told span")
        until(lambda: tokens.all_inner_texts() == ["a=", "<b>", "12"])
        shares = tokens.evaluate_all("spans => spans.map(s => s.style.getPropertyValue('--share'))")
        assert shares == ["35%", "70%", "0%"]
        tones = tokens.evaluate_all("spans => spans.map(s => getComputedStyle(s).backgroundColor)")
        assert len(set(tones)) == 3
        found.page.get_by_role("button", name="log-probability").click()
        assert tokens.first.get_attribute("title") == '"a=": log-probability -0.5'


@pytest.mark.slow
def test_the_contents_lead_to_every_section(browser: Any, pages: dict[str, Path]):
    with visit(browser, pages["run"]) as found:
        links = found.page.locator(".contents a")
        assert links.all_inner_texts() == ["Results", "Training", "Samples", "Reproduce it"]
        for link in links.all():
            assert found.page.locator(link.get_attribute("href")).count() == 1


def background(found: Any) -> str:
    return found.page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.slow
def test_light_dark_and_print(browser: Any, pages: dict[str, Path]):
    with visit(browser, pages["run"]) as light, visit(browser, pages["run"], color_scheme="dark") as dark:
        assert background(light) == "rgb(253, 253, 251)" and background(dark) == "rgb(22, 24, 26)"
        line = "getComputedStyle(document.querySelector('.chart .mark-line path')).stroke"
        assert light.page.evaluate(line) == "rgb(31, 95, 153)" and dark.page.evaluate(line) == "rgb(116, 176, 232)"
        dark.page.emulate_media(media="print", color_scheme="dark")
        assert background(dark) == "rgb(253, 253, 251)"
        assert dark.page.locator(".zoom:visible, .filters:visible").count() == 0


@pytest.mark.slow
def test_a_page_is_read_without_scripts(browser: Any, pages: dict[str, Path]):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["run"].resolve().as_uri())
    assert "JavaScript draws this chart" in page.locator(".chart").first.inner_text()
    assert page.locator("#held-samples details").count() > 20
    context.close()


@pytest.mark.slow
def test_what_is_drawn_is_what_was_measured(browser: Any, pages: dict[str, Path]):
    with visit(browser, pages["run"]) as found:
        spec = json.loads(found.page.locator("script.spec").first.text_content())
        assert [row["y"] for row in spec["data"]["values"] if row["name"] == "loss"] == [1 / s for s in range(1, 6)]
