"""The page of token weights, looked at in a real browser."""

import base64
import io
import json
import math
import random

import browser
import numpy as np
import pytest
from conftest import run_twgrpo
from page_cases import completion, group_row, words, write_run
from PIL import Image

from tools import weights_page

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if reason := browser.unusable():
        pytest.skip(f"no chromium to open the page in: {reason}")
    with browser.browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def opened(chromium, tmp_path):
    """opened(rows, **config): the page of these groups, 900 pixels wide and light. Afterwards no
    page has complained, or asked for anything but itself and the frames within it."""

    def open_page(rows: list, max_groups: int = 200, **config):
        page = tmp_path / "weights.html"
        weights_page.write_page(write_run(tmp_path / "run", rows, **config), page, max_groups)
        chromium.size(900, 1000)
        chromium.open(page)
        return chromium

    yield open_page
    assert_quiet(chromium)


def assert_quiet(page):
    assert page.problems == []
    others = [url for url in page.requests if not url.startswith("data:image/jpeg;base64,")]
    assert len(others) == 1 and others[0].startswith("file:"), others


def token(i: int, t: int) -> str:
    return f'document.querySelector(\'.token[data-i="{i}"][data-t="{t}"]\')'


def each(page, selector: str, what: str) -> list:
    """`what`, an expression about `e`, for each element."""
    return page.js(f"[...document.querySelectorAll('{selector}')].map(e => {what})")


def text_of(page, selector: str) -> str:
    """Exactly the text, lone surrogates included."""
    return json.loads(page.js(f"JSON.stringify(document.querySelector('{selector}').textContent)"))


def tokens_of(page) -> list[list[str]]:
    """The tokens shown, of each completion."""
    inner = "[...c.querySelectorAll('.token')].map(t => t.textContent)"
    every = f"[...document.querySelectorAll('.tokens')].map(c => {inner})"
    return json.loads(page.js(f"JSON.stringify({every})"))


def logged_tokens(row: dict) -> list[list[str]]:
    return [c["tokens"] for c in row["completions"]]


def told(page) -> dict:
    """The numbers of the tooltip, by name; {} while it is hidden."""
    if page.js("document.getElementById('tip').hidden"):
        return {}
    parts = each(page, "#tip span", "e.textContent")
    return {name: float(value) for name, value in (part.split(" = ") for part in parts)}


def numbers_of(row: dict, t: int, i: int | None = None) -> dict:
    """What the tooltip should tell about position t, in the strip or in completion i."""
    facts = dict(t=t, w=row["weights"][t], D=row["divergence"][t])
    if i is not None:
        facts["log p"] = row["completions"][i]["logps"][t]
    return {name: pytest.approx(value, abs=5e-5, rel=1e-5) for name, value in facts.items()}


def heights(page) -> list[float]:
    return each(page, ".bar", "e.height.baseVal.value")


# ------------------------------------------------------------------------------------- a real run


def test_the_page_of_a_real_run_shows_its_numbers_and_frames(world, tmp_path, chromium):
    import video

    run = tmp_path / "real"
    result = run_twgrpo(world, run, "--max_steps", "3")
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"{run}/curves.png, {run}/weights.html" in result.stdout
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    config = json.loads((run / "config.json").read_text())
    chromium.size(900, 1000)
    chromium.open(run / "weights.html")
    shown = each(chromium, "#frames img", "e.src")
    clip = video.load_clip(rows[0]["video"], *(config[name] for name in weights_page.CLIP_SETTINGS))
    assert len(shown) == len(clip.frames) == 4
    for source, frame_3HW in zip(shown, clip.frames, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        difference = np.asarray(image).astype(float) - frame_3HW.permute(1, 2, 0).numpy()
        assert abs(difference).mean() < 5  # of 255: JPEG
    for row in rows:
        assert tokens_of(chromium) == logged_tokens(row)
        assert text_of(chromium, "#problem") == row["problem"]
        assert f"<answer>{text_of(chromium, '#solution')}</answer>" == row["solution"]
        alive = min(map(len, logged_tokens(row)))
        for i, t in ((0, 0), (1, 5), (2, alive - 1), (3, len(logged_tokens(row)[3]) - 1)):
            chromium.hover(token(i, t))
            assert told(chromium) == numbers_of(row, t, i)
            assert json.loads(text_of(chromium, "#tip b")) == row["completions"][i]["tokens"][t]
        headers = each(chromium, "header", "e.textContent")
        for header, c in zip(headers, row["completions"], strict=True):
            advantage = f"{c['advantage']:+.3f}".replace("+0.000", "0.000").replace("-", "\u2212")
            assert f"advantage {advantage}" in header
            assert all(f"{name} {value:.4g}" in header for name, value in c["rewards"].items())
        chromium.key("ArrowRight")
    assert_quiet(chromium)


# ----------------------------------------------------------------------------------- made-up runs


def test_choosing_a_group(opened):
    """Steps 1, 2, 2, 3; question q1 comes up again in step 3."""
    rows = [
        group_row(1, [words("one", 3)]),
        group_row(2, [words("two", 3)]),
        group_row(2, [words("also", 3)], id="q2b"),
        group_row(3, [words("three", 3)], id="q1"),
    ]
    page = opened(rows)
    one, two, also, three = (logged_tokens(row) for row in rows)

    def choose(name, text):
        page.js(
            f"(() => {{ const s = document.getElementById('{name}');"
            f"s.value = [...s.options].find(o => o.text === '{text}').value;"
            "s.dispatchEvent(new Event('change')); })()"
        )
        return tokens_of(page)

    assert tokens_of(page) == one and page.js("document.getElementById('earlier').disabled")
    for key, shift, tokens, names in (
        ("ArrowLeft", False, one, ["1", "q1"]),
        ("ArrowRight", False, two, ["2", "q2"]),
        ("ArrowRight", False, also, ["2", "q2b"]),
        ("ArrowRight", False, three, ["3", "q1"]),
        ("ArrowRight", False, three, ["3", "q1"]),
        ("ArrowLeft", True, one, ["1", "q1"]),
        ("ArrowRight", True, three, ["3", "q1"]),
        ("ArrowLeft", False, also, ["2", "q2b"]),
    ):
        page.key(key, shift)
        chosen = each(page, "#step, #question", "e.selectedOptions[0].text")
        assert tokens_of(page) == tokens and chosen == names
    assert choose("step", "2") == two and choose("question", "q2b") == also
    assert choose("question", "q1") == one
    for button, tokens in (("later", two), ("earlier", one)):
        page.click(f"document.getElementById('{button}')")
        assert tokens_of(page) == tokens


def test_walking_over_tokens_by_key_and_tap(opened):
    row = group_row(1, [words("x", 6), words("y", 3), words("z", 4)])
    page = opened([row, group_row(2, [words("other", 2)])])
    page.click(token(0, 4))
    for key, i, t in (
        ("ArrowRight", 0, 5),
        ("ArrowRight", 0, 5),
        ("ArrowDown", 1, 2),  # the last token of a shorter one
        ("ArrowDown", 2, 2),
        ("ArrowLeft", 2, 1),
        ("ArrowUp", 1, 1),
    ):
        page.key(key)
        focused = page.js("(({i, t}) => [Number(i), Number(t)])(document.activeElement.dataset)")
        assert focused == [i, t] and told(page) == numbers_of(row, t, i)
        alive = sum(t < len(c["tokens"]) for c in row["completions"])
        assert each(page, ".here", "e.dataset.t") == [str(t)] * alive
    page.key("Escape")
    assert told(page) == {}
    page.key("ArrowRight")  # outside the tokens: the next step
    assert text_of(page, "#problem") == "What, in step 2?"


def test_the_shade_is_the_weight(opened):
    page = opened([group_row(1, [words("x", 8)])])
    expected = [k / 7 for k in range(8)]  # weights rise evenly from 1 to alpha
    shade = "Number(e.style.getPropertyValue('--n'))"
    assert each(page, ".token", shade) == pytest.approx(expected, abs=1e-4)
    assert len(set(each(page, ".token", "getComputedStyle(e).backgroundColor"))) == 8
    assert text_of(page, "#ticks") == "w = 11.351.7"
    page.click("document.getElementById('root')")
    assert each(page, ".token", shade) == pytest.approx([n**0.5 for n in expected], abs=1e-4)
    assert text_of(page, "#ticks") == "w = 11.1751.7"


def test_normalized_weights_are_shaded_between_those_of_the_group(opened):
    row = group_row(1, [words("x", 3)], weights=[0.5, 1.5, 1.0])
    page = opened([row], normalize_token_weights=True)
    shades = each(page, ".token", "Number(e.style.getPropertyValue('--n'))")
    assert shades == [0, 1, 0.5] and text_of(page, "#ticks") == "w = 0.511.5"


def test_the_strip_and_the_table_show_the_same_positions(opened):
    row = group_row(1, [words("x", 9), words("y", 6), words("z", 4)])
    page = opened([row])
    for t in (1, 4, 8):
        page.hover(f"document.querySelectorAll('.bar')[{t}]")
        assert told(page) == numbers_of(row, t)
    bars = heights(page)
    assert len(bars) == 9 and bars[0] == 0 and bars == sorted(bars)
    steps = np.diff(bars[3:])  # D grows tenfold at each position: even steps on a log scale
    assert steps.max() - steps.min() < 1 and "log scale" in text_of(page, "#strip")
    # All are alive up to t = 3: the mark stands left of position 4, in the strip and in the text.
    bar = each(page, ".bar", "e.x.baseVal.value")[4]
    assert each(page, ".alive", "e.x1.baseVal.value") == [pytest.approx(bar)]
    ends = each(page, ".life", "e.x2.baseVal.value")
    assert ends == sorted(ends, reverse=True) and ends[2] == pytest.approx(bar)
    marks = "[e.previousSibling.dataset.i, e.nextSibling.dataset.t]"
    assert each(page, ".boundary", marks) == [["0", "4"], ["1", "4"]]
    assert "all 3 completions are alive up to t = 3" in text_of(page, "#boundary")

    page.click("document.querySelector('summary')")
    cells = each(page, "tbody tr", "[...e.cells].map(c => c.textContent)")
    assert len(cells) == 9 and cells[8][5:] == [""] * 4
    for t, (position, w, d, word, logp, *_) in enumerate(cells):
        assert dict(t=int(position), w=float(w), D=float(d)) == numbers_of(row, t)
        assert (json.loads(word), float(logp)) == (f" x{t}", row["completions"][0]["logps"][t])


HOSTILE = [
    "</script><script>window.pwned = 1; document.title = 'pwned'</script>",
    "<!-- <script>",
    "--><img src=x onerror='window.pwned = 1'>",
    "]]></style><svg onload=pwned()>",
    *("\u2028\u2029", "\ud800", "a\0b", "\udfff lone", "\x07\x1b[31m", "\u202eback", "\r\n\t"),
    *("&lt;b&gt;", "`${window.pwned = 1}`", "'\"\\", "__proto__", "https://example.com/x.js"),
]


def test_hostile_text_stays_text(opened):
    everything = "".join(HOSTILE)
    texts = dict.fromkeys(("id", "problem", "solution", "video"), everything)
    rewards = {everything: 1.0, "__proto__": 2.0}
    row = group_row(1, [completion(HOSTILE, rewards=rewards)], **texts)
    page = opened([row, row], divergence=everything, ended_rows=everything)
    assert tokens_of(page) == [HOSTILE]
    assert text_of(page, "#problem") == everything
    assert text_of(page, "#clip").startswith(f"clip not found: {everything}")
    page.hover(token(0, 0))
    assert json.loads(text_of(page, "#tip b")) == HOSTILE[0]
    page.click("document.querySelector('summary')")
    page.key("ArrowRight")
    assert page.js("document.title") == "TW-GRPO token weights"
    assert page.js("typeof window.pwned") == "undefined"
    assert page.js("document.querySelectorAll('img, main script, .tokens svg').length") == 0


def test_the_page_may_not_use_the_network(chromium, opened):
    page = opened([group_row(1, [words("x", 3)])])
    asked = "fetch('https://example.com').then(() => 'went out', () => 'refused')"
    assert page.js(asked) == "refused"
    assert page.problems and all("Policy" in json.dumps(p) for p in page.problems)
    chromium.problems.clear()  # the refusal is the only one


def test_unusual_values_are_named(opened):
    """Numbers that are none, divergences below 0, an empty completion; flags of any type."""
    odd = group_row(1, [completion([" a", " b"], advantage=True, logps=[math.nan, -1.0])])
    odd |= dict(weights=[True, math.inf], divergence=[math.nan, True])
    below = group_row(2, [words("x", 3)], divergence=[-1.0, 2.0, 4.0])
    empty = group_row(3, [words("x", 3), words("y", 0)])
    page = opened([odd, below, empty], divergence=math.nan, ended_rows=[None], alpha=1.0)
    assert "divergence nan · ended_rows [None]" in text_of(page, "#flags")
    assert text_of(page, "#count") == "3 groups"
    page.hover(token(0, 0))
    assert text_of(page, "#tip").count("not a number") == 3
    page.key("ArrowRight")
    assert heights(page)[0] == 0 < heights(page)[1] < heights(page)[2]
    page.key("ArrowRight")
    assert text_of(page, "#boundary").startswith("A completion is empty, so at no position are all")
    assert tokens_of(page) == [[" x0", " x1", " x2"], []]


def test_the_groups_are_thinned_evenly_and_the_page_says_so(opened):
    rows = [group_row(k, [words(f"s{k}_", 3)]) for k in range(1, 10)]
    page = opened(rows, max_groups=3)
    assert text_of(page, "#count") == "showing 3 of 9 groups"
    assert each(page, "#step option", "e.text") == ["1", "5", "9"]
    page.key("ArrowRight")
    assert tokens_of(page) == logged_tokens(rows[4])


def test_it_is_readable_in_light_and_dark_and_narrow(opened):
    page = opened([group_row(1, [words("x", 40), words("y", 25), words("long" * 30, 3)])])
    for width in (900, 400):
        for dark in (False, True):
            page.size(width, 1000, dark)
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            assert sum(count > 20 for count, _ in picture.getcolors(1 << 24)) > 30
            brightness = np.asarray(picture.convert("L")).mean()
            assert brightness < 60 if dark else brightness > 200
            assert page.js("document.documentElement.scrollWidth <= innerWidth")


def test_a_large_page_stays_usable(opened, tmp_path):
    """About 20 MB, 8 completions of 170 tokens a group: loads, and switches, within seconds."""
    rng = random.Random(0)
    group = [words(f"completion{k}_", 170) for k in range(8)]
    rows = []
    for step in range(1, 441):
        logps = [round(-rng.random(), 6) for _ in range(170)]
        completions = [{**c, "logps": logps} for c in group]
        rows.append(group_row(step, completions, divergence=logps, weights=logps))
    page = opened(rows, max_groups=1000)
    assert (tmp_path / "weights.html").stat().st_size > 15e6
    # Far below these bounds on an idle machine; tests run two at a time on busy cores.
    assert page.open(tmp_path / "weights.html") < 8
    assert page.timed(lambda: page.key("ArrowRight")) < 2
    assert text_of(page, "#problem") == "What, in step 2?"
    assert page.js("document.querySelectorAll('.token').length") == 8 * 170  # only what is shown
