"""The viewer in a real browser, over a real store and a real server: each view, keys, live, hostile text, axe."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from agentloop.chat import load_tokenizer
from tests.agentloop.viewer import browsed
from tests.chromium import Page, chromium, find_program

pytestmark = pytest.mark.browser

RUN = "sums"


@dataclass
class Served:
    """A server over a folder of runs."""

    url: str
    folder: Path
    long: str

    def view(self, path: str, **query: object) -> str:
        asked = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in query.items())
        return f"{self.url}#/{path}{'?' + asked if asked else ''}"

    def episode(self, step: int, group: int, sample: int, **query: object) -> str:
        return self.view(f"run/{RUN}/episode", key=f"train/{step}/g{group}/{sample}/0", **query)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, quickstart_model: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("runs")
    long = browsed.make_browsed_run(folder / RUN, quickstart_model)
    browsed.make_browsed_run(folder / "other", quickstart_model)
    command = [sys.executable, "-m", "agentloop", "trace", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("viewer: "), line
        yield Served(line.split()[1], folder, long)
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(find_program(), tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def views(served: Served) -> dict[str, tuple[str, str]]:
    """Each view: its address, and an element that is there when it is drawn."""
    group = {"step": 6, "split": "train", "group_id": "g0"}
    return {
        "runs": (served.url, ".plot path.line"),
        "run": (served.view(f"run/{RUN}"), ".verdict + .verdict"),
        "episodes": (served.view(f"run/{RUN}/episodes"), "tr[data-index='5'] td"),
        "episode": (served.episode(6, 0, 0), ".turn.role-assistant .call .result"),
        "image": (served.episode(6, 0, 1), ".images img"),
        "tokens": (served.episode(6, 1, 1, view="tokens"), ".token-text > i.m-trained"),
        "spans": (served.episode(6, 1, 1, view="spans"), ".wide-waterfall .kind-generate"),
        "record": (served.episode(6, 1, 1, view="record"), ".record .values"),
        "group": (served.view(f"run/{RUN}/group", **group), ".pair article ins"),
        "task": (served.view(f"run/{RUN}/task", task_id="task-1"), ".task-steps .siblings a"),
        "failures": (served.view(f"run/{RUN}/failures"), ".failures td.reason"),
        "signals": (served.view(f"run/{RUN}/signals"), ".rules dt"),
        "calls": (served.view("calls"), ".table-note pre"),
        "missing": (served.view("run/none"), ".wrong"),
    }


VIEWS = list(views(Served("", Path(), "")))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_each_view_runs_without_errors_and_axe_finds_nothing_serious(
    page: Page, served: Served, view: str, scheme: str
) -> None:
    address, drawn = views(served)[view]
    page.events.clear()
    page.open(address, width=1440, scheme=scheme)
    page.wait(f"document.querySelector({json.dumps(drawn)})", f"{view} was not drawn")
    page.wait("!document.querySelector('main').hasAttribute('aria-busy')")
    assert page.run("document.documentElement.dataset.theme") == scheme
    assert page.run("document.documentElement.scrollWidth") <= 1440
    assert page.run("document.title").endswith("agentloop")
    if view != "missing":  # the browser itself reports the 404
        assert page.problems() == []
    asked = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith((served.url, "about:", "data:"))] == []
    page.run((files("axe_core_python") / "axe.min.js").read_text() + ";0")
    rules = "{runOnly: ['color-contrast']}" if scheme == "dark" else "{}"  # colours are all that differs
    found = json.loads(page.run(f"axe.run({rules}).then(result => JSON.stringify(result.violations))"))
    serious = [
        (one["id"], [node["html"][:200] for node in one["nodes"][:3]])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert serious == []


@pytest.mark.parametrize("view", [view for view in VIEWS if view != "missing"])
def test_no_view_scrolls_sideways_when_it_is_magnified_to_200_percent(page: Page, served: Served, view: str) -> None:
    address, drawn = views(served)[view]
    page.open(address, width=1440, zoom=2)
    page.wait(f"document.querySelector({json.dumps(drawn)})", f"{view} was not drawn")
    assert page.run("document.documentElement.scrollWidth") <= 720


@pytest.mark.parametrize("view", ["conversation", "tokens", "record"])
def test_hostile_text_is_shown_and_does_nothing(page: Page, served: Served, view: str) -> None:
    page.events.clear()
    page.open(served.episode(6, 0, 0, view=view))
    page.wait("document.querySelector('.panel')?.textContent.length > 100")
    shown = page.run("document.querySelector('main').textContent")
    if view != "tokens":  # its tokens are those of the prompt and the turns
        assert "<script>window.hacked = 1</script>" in shown
        for symbol in ("⟨ESC⟩[31m", "⟨BEL⟩", "⟨U+202E⟩", "⟨U+2066⟩"):
            assert symbol in shown
    assert not set(shown) & set("\x1b\x07\u202e\u2066")
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run("document.querySelectorAll('main script, main img').length") == 0
    assert page.problems() == []


def test_hostile_text_in_tables_filters_and_comparisons_does_nothing(page: Page, served: Served) -> None:
    for view in ("episodes", "group", "failures", "run", "runs"):
        address, drawn = views(served)[view]
        page.open(address)
        page.wait(f"document.querySelector({json.dumps(drawn)})")
        assert page.run("typeof window.hacked") == "undefined"
        assert not set(page.run("document.querySelector('main').textContent")) & set("\x1b\x07\u202e\u2066")
    page.open(served.view(f"run/{RUN}/episodes", q="<img src=x onerror=alert(1)>", task_id="\u202eevil"))
    assert "⟨U+202E⟩" in page.text(".chip")
    assert page.run("document.querySelectorAll('main img, main script').length") == 0


def test_a_failed_episode_says_what_raised_where_and_its_key(page: Page, served: Served) -> None:
    page.open(served.episode(6, 2, 3))
    page.wait("document.querySelector('.error-line .fault')")
    said = page.text(".error-line")
    assert "the agent planner raised KeyError: ⟨ESC⟩[31mboom at /mine/agent.py:3" in said and "line 3, in run" in said
    assert page.text(".episode-key") == "train/6/g2/3/0" and page.text(".copy-key") == "copy"
    assert " · sample 3" in page.text("h1") and "Calls" in page.text(".run-tabs")


def test_titles_hold_no_hidden_characters(page: Page, served: Served) -> None:
    page.open(served.view("run/\u202ex/failures"))
    page.wait("document.title.startsWith('Failures')")
    assert page.run("document.title") == "Failures · ⟨U+202E⟩x · agentloop"


def test_rows_are_sorted_filtered_and_searched_and_the_address_says_so(page: Page, served: Served) -> None:
    page.open(served.view(f"run/{RUN}/episodes"))
    total = browsed.STEPS * browsed.GROUPS * browsed.SAMPLES + 1
    page.wait(f"document.querySelector('.total')?.textContent === '{total}'")
    page.run("[...document.querySelectorAll('th button')].find(one => one.textContent.startsWith('Reward')).click()")
    page.wait("document.querySelector('th[aria-sort=descending]')?.textContent.startsWith('Reward')")
    page.wait("document.querySelector('tr[data-index=\"0\"] .points')?.textContent === '1.000'")
    assert "sort=-reward" in page.run("location.hash")
    page.run("document.querySelector('[data-facet=\"status=failed\"]').click()")
    page.wait(f"document.querySelector('.total').textContent === '{browsed.STEPS}'")
    assert "status=failed" in page.run("location.hash")
    address = page.run("location.href")
    page.open(address)  # shared with somebody else
    page.wait(f"document.querySelector('.total')?.textContent === '{browsed.STEPS}'")
    assert page.run("document.querySelector('[data-facet=\"status=failed\"]').checked")
    page.press("/")
    assert page.run("document.activeElement.id") == "search"
    page.call("Input.insertText", text="red")
    page.press("Enter")
    page.wait("location.hash.includes('q=red')")
    page.press("Escape")
    page.run("document.querySelector('.facet-fold > button').click()")
    page.wait(f"document.querySelector('.total').textContent === '{total}'")


def test_keys_walk_through_the_table_into_an_episode_and_along_the_list(page: Page, served: Served) -> None:
    page.open(served.view(f"run/{RUN}/episodes", status="ok", split="train"))
    page.wait("document.querySelector('tr[data-index=\"3\"] a')")
    page.press("j", "j", "j", "k")
    assert page.run("document.activeElement.closest('tr').dataset.index") == "1"
    page.press("Enter")
    page.wait("document.querySelector('.turn')")
    place = page.wait("document.querySelector('.place').textContent")
    assert place.startswith("2 of ")
    page.press("j")
    page.wait("document.querySelector('.place')?.textContent.startsWith('3 of ')")
    page.press("k")
    page.wait("document.querySelector('.place')?.textContent.startsWith('2 of ')")
    page.press("t")
    page.wait("document.querySelector('[role=tab][aria-selected=true]').textContent === 'Tokens'")
    page.press("u")
    page.wait("document.querySelector('.rows')")
    assert "status=ok" in page.run("location.hash")
    page.press("?")
    assert "next row" in page.text("dialog[open]")
    page.press("Escape")
    page.wait("!document.querySelector('dialog')")
    page.press("g", "o")
    page.wait("document.querySelector('.verdicts')")


def test_the_way_back_from_a_group_and_a_task_keeps_the_filters_of_the_list(page: Page, served: Served) -> None:
    for key, view in (("e", "group"), ("task", "task")):
        page.open(served.episode(6, 1, 1, split="train", sort="-reward"))
        page.wait("document.querySelector('.episode-head a[href*=task]')")
        if key == "e":
            page.press(key)
        else:
            page.run("document.querySelector('.episode-head a[href*=task]').click()")
        page.wait(f"location.hash.startsWith('#/run/{RUN}/{view}?') && document.querySelector('.pair article')")
        page.press("u")
        page.wait("document.querySelector('tr[data-index=\"0\"] td')")
        assert page.run("location.hash") == f"#/run/{RUN}/episodes?split=train&sort=-reward"


def test_the_count_for_screen_readers_is_that_of_the_page(page: Page, served: Served) -> None:
    page.open(served.view(f"run/{RUN}/episodes", status="failed"))
    page.wait(f"document.querySelector('#say').textContent === '{browsed.STEPS} episodes'")
    page.run("document.querySelector('.run-tabs a[href$=failures]').click()")
    page.wait("document.querySelector('.failures')")
    assert page.run("document.querySelector('#say').textContent") == ""
    page.run("location.hash = '#/run/sums/episodes?q=nothinglikeit'")
    page.wait("document.querySelector('#say').textContent === '0 episodes'")


def test_episodes_with_tool_errors_can_be_chosen(page: Page, served: Served) -> None:
    page.open(served.view(f"run/{RUN}/failures"))
    page.wait("document.querySelector('.page-head a')")
    page.run("document.querySelector('.page-head a').click()")
    page.wait("document.querySelector('input[aria-label=\"Tool errors, from\"]')?.value === '1'")
    page.wait(f"document.querySelector('.total').textContent === '{browsed.STEPS * browsed.GROUPS}'")


def test_a_tool_result_stands_at_its_call_and_a_reward_at_its_turn(page: Page, served: Served) -> None:
    page.open(served.episode(6, 1, 1))
    assert "calculator" in page.text(".call-name")
    assert page.text(".call .values dd") == "1+1"
    assert page.text(".call .result .text") == "2"
    assert "used the tool +0.100" in page.text(".role-assistant > .who .parts")
    assert page.run("document.querySelectorAll('.conversation > .role-tool').length") == 0
    page.open(served.episode(6, 0, 2))
    assert "the JSON ends too soon" in page.text(".call.failed")
    page.open(served.episode(6, 2, 3))
    assert "replica 0 is gone" in page.text(".error-line")


def test_a_span_shows_its_error_and_its_attributes(page: Page, served: Served) -> None:
    page.open(served.episode(6, 1, browsed.BROKEN, view="spans"))
    page.wait("document.querySelector('.wide-waterfall li')")
    rows = page.run("[...document.querySelectorAll('.wide-waterfall summary')].map(one => one.textContent)")
    (tool,) = [row for row in rows if row.startswith("tool")]
    assert tool.startswith("toolcalculator · RuntimeError: minus is ⟨ESC⟩[31mbroken")
    (lookup,) = [row for row in rows if row.startswith("lookup")]
    assert lookup.startswith("lookuptable=orders · depth=2")
    page.run("for (const one of document.querySelectorAll('.wide-waterfall summary')) one.click()")
    shown = page.run("[...document.querySelectorAll('.span-detail')].map(one => one.innerText).join('\\n')")
    assert "RuntimeError: minus is ⟨ESC⟩[31mbroken" in shown and "call_id\nc0" in shown and "depth\n2" in shown
    page.open(served.episode(6, 1, browsed.BROKEN, view="record"))
    page.wait("document.querySelector('.record')")
    assert "orders" in page.text(".record")


def test_an_image_is_shown(page: Page, served: Served) -> None:
    page.open(served.episode(6, 0, 1))
    page.wait("document.querySelector('.images img')?.naturalWidth === 2")
    assert "The picture is red" in page.text(".reasoning")


def test_a_token_tells_its_facts_under_the_pointer_and_under_the_keyboard(page: Page, served: Served) -> None:
    page.open(served.episode(6, 1, 1, view="tokens"))
    page.wait("document.querySelector('.token-text > i.m-trained')")
    page.point_at(".token-text > i.m-trained")
    tip = page.text("#tip")
    for fact in ("sampled and trained", "token id", "probability", "trainer's logprob", "advantage", "policy version5"):
        assert fact in tip
    page.run("document.querySelector('.tokens').focus()")
    page.press("]", "ArrowRight")
    said = page.wait("document.querySelector('#say').textContent.includes('position') && say.textContent")
    assert "logprob" in said
    assert page.run("document.querySelectorAll('.lit').length") == 1
    page.press("2")
    page.wait("document.querySelector('[aria-pressed=true]').dataset.mode === 'logprob'")
    assert "mode=logprob" in page.run("location.hash")
    assert page.run("document.querySelectorAll('.token-text > i.p1, .token-text > i.p2').length") > 0
    for mode in ("3", "4", "5"):
        page.press(mode)
        page.wait("document.querySelector('.scale').childElementCount > 0")
        assert page.run("document.querySelectorAll('.scale .warn').length") == 0


def test_an_episode_of_64000_tokens_opens_without_drawing_all_of_them(page: Page, served: Served) -> None:
    page.open(served.view(f"run/{RUN}/episode", key=served.long, view="tokens"))
    page.wait("document.querySelector('.token-text > i')")
    page.wait("document.querySelector('.token-bar .quiet').textContent === '64,000 tokens'")
    assert page.run("document.querySelectorAll('.token-text > i').length") < 10_000
    page.run("document.querySelector('.tokens').focus()")
    page.press("End")
    page.wait("location.hash.includes('at=63999')")
    page.wait("document.querySelector('.lit').getBoundingClientRect().bottom < innerHeight", "it is not in sight")


def test_curves_can_be_read_by_pointer_and_keys_and_lead_to_the_episodes(page: Page, served: Served) -> None:
    page.open(served.view(f"run/{RUN}"))
    page.wait("document.querySelector('.plot path.line')")
    page.run("document.querySelector('.area').focus()")
    page.press("ArrowRight", "ArrowRight")
    assert page.text("#tip .head") == "step 2"
    assert "0.400" in page.text("#tip")
    page.press("Enter")
    page.wait("location.hash.includes('episodes?step=2')")
    page.wait(f"document.querySelector('.total')?.textContent === '{browsed.GROUPS * browsed.SAMPLES}'")


def test_runs_are_laid_over_each_other(page: Page, served: Served) -> None:
    page.open(served.url)
    page.wait("document.querySelectorAll('.plot:first-child path.line').length === 2")
    page.run("document.querySelector('.runs input[type=checkbox]').click()")
    page.wait("document.querySelectorAll('.plot:first-child path.line').length === 1")
    assert "run=" in page.run("location.hash")


def test_runs_of_one_name_show_their_folders_and_a_run_that_was_stopped_says_so(page: Page, served: Served) -> None:
    twin = served.folder / "twin"
    shutil.copytree(served.folder / "other", twin, ignore=shutil.ignore_patterns("index.sqlite*"))
    (twin / "finished.json").write_text("{}")
    page.open(served.url)
    page.wait("document.querySelectorAll('.plot:first-child path.line').length === 3")
    rows = page.run("[...document.querySelectorAll('.run-name')].map(one => one.textContent)")
    assert sorted(rows) == ["other twin", "othernot finished", "sumsnot finished"]
    legend = page.run("[...document.querySelector('.legend').querySelectorAll('a')].map(one => one.textContent)")
    assert sorted(legend) == ["other", "other (twin)", "sums"]
    page.open(served.view("run/other"))
    page.wait("document.querySelector('h1')")
    assert page.text("h1") == "othernot finished"
    page.open(served.view("run/twin"))
    page.wait("document.querySelector('h1')?.textContent === 'other'")
    shutil.rmtree(twin)


def test_a_received_call_opens_at_the_address_that_weave_prints(page: Page, served: Served) -> None:
    begin = 1_790_000_000 * browsed.SECOND
    span = {"traceId": "a" * 32, "spanId": "b" * 16, "name": "plan", "startTimeUnixNano": str(begin)}
    child = {**span, "spanId": "c" * 16, "parentSpanId": "b" * 16, "name": "search"}
    prompt = {"key": "input.value", "value": {"stringValue": browsed.HOSTILE}}
    spans = [
        {**span, "endTimeUnixNano": str(begin + 2 * browsed.SECOND), "attributes": [prompt]},
        {**child, "endTimeUnixNano": str(begin + browsed.SECOND), "status": {"code": 2, "message": "no index"}},
    ]
    service = {"attributes": [{"key": "service.name", "value": {"stringValue": "agent"}}]}
    body = {"resourceSpans": [{"resource": service, "scopeSpans": [{"spans": spans}]}]}
    httpx.post(f"{served.url}v1/traces", json=body, trust_env=False).raise_for_status()
    page.open(f"{served.url}otlp/agent/r/call/{'a' * 32}-{'b' * 16}")
    assert page.text("h1") == "planerror inside"
    assert "⟨ESC⟩[31m" in page.text(".episode-main")
    assert page.run("typeof window.hacked") == "undefined"
    page.press("j")
    page.wait("document.querySelector('h1')?.textContent.startsWith('search')")
    assert "no index" in page.text(".error-line")
    page.press("u")
    page.wait("document.querySelector('tr[data-index=\"0\"] a')?.textContent === 'plan'")


def test_a_received_call_links_to_the_episode_of_its_own_run(page: Page, served: Served) -> None:
    begin = str(1_790_000_000 * browsed.SECOND)
    service = {"attributes": [{"key": "service.name", "value": {"stringValue": "twins"}}]}
    key = {"key": "gen_ai.conversation.id", "value": {"stringValue": "train/6/g1/1"}}
    calls = []
    for number, run in enumerate((RUN, "other")):
        trace = browsed.trace_id(run, 6, "g1", 1)
        weave_id = str(uuid.UUID(trace))
        span = {"traceId": trace, "spanId": f"{number + 1:016x}", "name": "invoke_agent", "startTimeUnixNano": begin}
        body = {"resourceSpans": [{"resource": service, "scopeSpans": [{"spans": [{**span, "attributes": [key]}]}]}]}
        httpx.post(f"{served.url}v1/traces", json=body, trust_env=False).raise_for_status()
        one = {
            "project_id": "lab/twins", "id": f"call-{run}", "trace_id": weave_id, "op_name": "episode", "inputs": {},
            "attributes": {"key": "train/6/g1/1", "experiment_name": "twins"}, "started_at": "2026-01-02T03:04:05Z",
        }  # fmt: skip
        httpx.post(f"{served.url}call/start", json={"start": one}, trust_env=False).raise_for_status()
        calls += [(run, f"call-{run}"), (run, f"{trace}-{number + 1:016x}")]
    for run, call in calls:
        page.open(served.view(f"call/{call}"))
        page.wait("document.querySelector('.page-head a[href*=episode]')")
        assert page.text(".page-head a[href*=episode]") == f"episode train/6/g1/1/0 of {run}"
        href = page.run("document.querySelector('.page-head a[href*=episode]').getAttribute('href')")
        assert href == f"/#/run/{run}/episode?key={quote('train/6/g1/1/0', safe='')}"
    page.open(served.view("call/call-other", x=1))
    page.wait("document.querySelector('.page-head a[href*=episode]')")
    page.run("document.querySelector('.page-head a[href*=episode]').click()")
    page.wait("document.querySelector('.episode-key')?.textContent === 'train/6/g1/1/0'")
    one = {**one, "id": "elsewhere", "trace_id": "e" * 32}
    httpx.post(f"{served.url}call/start", json={"start": one}, trust_env=False).raise_for_status()
    page.open(served.view("call/elsewhere"))
    page.wait(f"performance.getEntriesByName('{served.url}api/traces/{one['trace_id']}').length")
    page.wait("document.querySelector('h1')?.textContent.startsWith('episode')")
    assert page.run("document.querySelectorAll('.page-head a[href*=episode]').length") == 0


def test_browsers_refuse_to_parse_text_as_html(page: Page, served: Served) -> None:
    page.open(served.url)
    page.text("h1")
    page.run("try { document.body.innerHTML = '<img id=made>' } catch (error) { window.refused = error.name }")
    assert page.run("window.refused") == "TypeError"
    assert page.run("document.getElementById('made')") is None


def test_a_difference_holds_both_texts_however_much_they_differ(page: Page, served: Served) -> None:
    page.open(served.url)
    script = """
        import('/static/js/core/diff.js').then(({diff}) => {
            let seed = 1;
            const random = (below) => (seed = (seed * 48271) % 2147483647) % below;
            const word = (of) => 'w' + random(of);
            const text = (words, of) => Array.from({length: words}, () => word(of)).join(random(9) ? ' ' : '\\n');
            const side = (parts, kind) => parts.filter(one => one.kind !== kind).map(one => one.text).join('');
            const cases = [['', ''], ['a', ''], ['', 'b'], ['one two', 'one 2 two'], ['\\u202ex', 'x']];
            for (let i = 0; i < 200; i++) cases.push([text(random(30), 5), text(random(30), 5)]);
            cases.push([text(20000, 100000), text(20000, 100000)]);
            const wrong = cases.filter(([a, b]) => side(diff(a, b), 'new') !== a || side(diff(a, b), 'old') !== b);
            const small = diff('the answer is 42 .', 'the answer is 43 .').filter(one => one.kind !== 'same');
            return JSON.stringify([wrong.length, small.map(one => one.kind + one.text)]);
        })"""
    assert json.loads(page.run(script)) == [0, ["old42", "new43"]]


def test_new_steps_appear_without_moving_what_is_read(page: Page, served: Served, quickstart_model: Path) -> None:
    run = served.folder / "growing"
    shutil.copytree(served.folder / "other", run, ignore=shutil.ignore_patterns("index.sqlite*"))
    page.open(served.view("run/growing/episodes"))
    page.wait("document.querySelector('tr[data-index=\"3\"] a')")
    before = int(page.text(".total"))
    page.press("j", "j", "j")
    reads = "document.activeElement.getAttribute('href')"
    href = page.run(reads)
    browsed.write_step(run, browsed.STEPS + 1, load_tokenizer(str(quickstart_model)))
    page.wait("!document.querySelector('.fresh').hidden", "the new episodes were not announced")
    assert page.text(".fresh") == f"Show {browsed.GROUPS * browsed.SAMPLES} new episodes"
    assert page.run(reads) == href and int(page.text(".total")) == before
    page.press("r")
    page.wait(f"document.querySelector('.total').textContent === '{before + browsed.GROUPS * browsed.SAMPLES}'")
    page.open(served.view("run/growing"))
    page.wait("document.querySelector('.legend b')?.textContent === '0.900'")
    browsed.write_step(run, browsed.STEPS + 2, load_tokenizer(str(quickstart_model)))
    page.wait("document.querySelector('.legend b').textContent === '1'", "the curve did not grow")
    shutil.rmtree(run)
