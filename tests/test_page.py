"""The page of token weights, looked at in a real browser: a headless Chromium, if there is one."""

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import run_twgrpo
from page_cases import completion, group_row, words, write_run
from PIL import Image

from tools import weights_page

pytestmark = [pytest.mark.browser, pytest.mark.slow]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "no chromium"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --enable-logging=stderr "
    "--virtual-time-budget=9000 --dump-dom"
).split()
HELPERS = """
  const all = (selector, what) => [...document.querySelectorAll(selector)].map(what);
  const text = (selector) => document.querySelector(selector).textContent;
  const tokens = () => all(".tokens", c => [...c.children].map(t => t.textContent));
  const point = (selector) => {
    const event = new PointerEvent("pointerover", {bubbles: true});
    document.querySelector(selector).dispatchEvent(event);
    return text("#told").split("   ");
  };
"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """browse(page, script): what the script returns in the page, and what the browser complained
    of: errors, and everything that the page's policy forbade it to load."""
    try:  # distributions install a script of this name that only says where to get it
        subprocess.run([CHROMIUM, "--version"], capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no chromium to open the page in: {error}")
    profile = tmp_path_factory.mktemp("profile")

    def run(page: Path, script: str) -> tuple[object, list[str]]:
        asked = page.with_name("asked.html")
        script = f"(async () => {{{HELPERS}{script}}})()"
        script += ".then(value => document.body.textContent = JSON.stringify(value))"
        asked.write_text(f"{page.read_text()}<script>{script}</script>")
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", asked.as_uri()]
        done = subprocess.run(command, capture_output=True, timeout=120)
        dom, log = (part.decode(errors="replace") for part in (done.stdout, done.stderr))
        answer = re.search("<body>(.*)</body>", dom, re.DOTALL)[1]
        return json.loads(html.unescape(answer)), re.findall(r"CONSOLE.*", log)

    return run


@pytest.fixture
def look(browse, tmp_path):
    """look(rows, script, ...): the same in the page of these groups, which must not complain."""

    def write_and_look(rows: list, script: str, max_groups: int = 200, **config):
        run, page = write_run(tmp_path / "run", rows, **config), tmp_path / "weights.html"
        weights_page.write_page(run, page, max_groups)
        answer, complaints = browse(page, script)
        assert complaints == []
        return answer

    return write_and_look


def test_the_page_of_a_real_run_shows_its_numbers_and_frames(world, tmp_path, browse):
    import video

    run = tmp_path / "real"
    result = run_twgrpo(world, run, "--max_steps", "3")
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"{run}/curves.png, {run}/weights.html" in result.stdout
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    script = """
      const read = () => ({
        tokens: tokens(), problem: text("#problem"), solution: text("#solution"),
        headers: all("header", e => e.textContent), told: point('.token[data-i="1"][data-t="5"]'),
      });
      const frames = all("#frames img", e => e.src), groups = [read()];
      while (!later.disabled) { later.click(); groups.push(read()); }
      return {frames, groups};
    """
    shown, complaints = browse(run / "weights.html", script)
    assert complaints == [] and len(shown["groups"]) == len(rows)
    config = json.loads((run / "config.json").read_text())
    clip = video.load_clip(rows[0]["video"], *(config[name] for name in weights_page.CLIP_SETTINGS))
    assert len(shown["frames"]) == len(clip.frames) == 4
    for source, frame_3HW in zip(shown["frames"], clip.frames, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        difference = np.asarray(image).astype(float) - frame_3HW.permute(1, 2, 0).numpy()
        assert abs(difference).mean() < 5  # of 255: JPEG
    for row, group in zip(rows, shown["groups"], strict=True):
        assert (
            group["tokens"] == [c["tokens"] for c in row["completions"]]
            and group["problem"] == row["problem"]
        )
        assert f"<answer>{group['solution']}</answer>" == row["solution"]
        names, values = zip(*(fact.split(" = ") for fact in group["told"][:4]), strict=True)
        expected = [5, row["weights"][5], row["divergence"][5], row["completions"][1]["logps"][5]]
        assert names == ("t", "w", "D", "log p")
        assert list(map(float, values)) == pytest.approx(expected, rel=1e-5)
        for header, c in zip(group["headers"], row["completions"], strict=True):
            assert f"advantage {c['advantage']:.3g}".replace("+", "") in header
            assert all(f"{name} {value:.4g}" in header for name, value in c["rewards"].items())


def test_shade_bars_and_numbers_belong_to_their_positions(look):
    """Weights rise evenly from 1 to alpha; D grows tenfold at each position."""
    row = group_row(1, [words("x", 6), words("y", 4), words("z", 5)])
    script = """
      const shade = (e) => Number(e.style.getPropertyValue("--shade"));
      return {
        told: [point('.position[data-t="1"]'), point('.token[data-i="2"][data-t="3"]')],
        here: all(".here", e => e.dataset.t),
        shades: all(".token", shade), strip: all(".position", shade),
        colours: new Set(all('.token[data-i="0"]', e => getComputedStyle(e).backgroundColor)).size,
        bars: all(".position i", e => e.offsetHeight),
        boundary: all(".boundary", e => [e.dataset.i ?? "strip", e.dataset.t]),
        scale: text("#scale"), nothing: point("h1"),
      };
    """
    shown = look([row], script)
    logp = row["completions"][2]["logps"][3]
    assert shown["told"] == [
        ["t = 1", "w = 1.14", "D = 2"],
        ["t = 3", "w = 1.42", "D = 101", f"log p = {logp}", '" z3"'],
    ]
    assert shown["here"] == ["3"] * 4 and shown["nothing"] == [""]
    expected = [k / 5 for k in range(6)]
    assert shown["strip"] == pytest.approx(expected, abs=1e-4) and shown["colours"] == 6
    each = expected + expected[:4] + expected[:5]
    assert shown["shades"] == pytest.approx(each, abs=1e-4)
    assert shown["bars"] == [0, *sorted(shown["bars"][1:])] and 95 < shown["bars"][-1] < 101
    assert np.diff(shown["bars"][3:]) == pytest.approx(25, abs=1)  # a quarter for a factor of 10
    assert shown["boundary"] == [["strip", "4"], ["0", "4"], ["2", "4"]]
    assert shown["scale"].split() == ["w", "=", "1", "1.7"]


HOSTILE = [
    "</script><script>window.pwned = 1; document.title = 'pwned'</script>",
    "<!-- <script>",
    "--><img src=x onerror='window.pwned = 1'>",
    "]]></style><svg onload=pwned()>",
    *("\u2028\u2029", "\ud800", "a\0b", "\udfff lone", "\x07\x1b[31m", "\u202eback", "\r\n\t"),
    *("&lt;b&gt;", "`${window.pwned = 1}`", "'\"\\", "__proto__", "https://example.com/x.js"),
]


def test_hostile_text_stays_text(look):
    everything = "".join(HOSTILE)
    texts = dict.fromkeys(("id", "problem", "solution", "video"), everything)
    rewards = {everything: 1.0, "__proto__": 2.0}
    row = group_row(1, [completion(HOSTILE, rewards=rewards)], **texts)
    script = """
      point(".token"); later.click();
      const made = all("img, main script, .tokens svg", e => e.tagName);
      return [tokens(), text("#problem"), text("#clip"), made, document.title, typeof window.pwned];
    """
    shown = look([row, row], script, divergence=everything, ended_rows=everything)
    symbols = {127: 0x2421} | {k: 0x2400 + k for k in range(32)} | {10: "\u23ce\n"}
    assert shown[0] == [[text.translate(symbols) for text in HOSTILE]]
    assert shown[1] == everything and shown[2].startswith("clip cannot be shown: ")
    assert shown[3:] == [[], "TW-GRPO token weights", "undefined"]


def test_the_page_may_not_use_the_network(look, browse, tmp_path):
    look([group_row(1, [words("x", 3)])], "return 0")
    script = "return await fetch('https://example.com').then(() => 'went out', () => 'refused')"
    answer, complaints = browse(tmp_path / "weights.html", script)
    assert answer == "refused"
    assert complaints and all("Security Policy" in line for line in complaints)


def test_unusual_values_are_named_and_any_group_can_be_chosen(look):
    """Numbers that are none, an empty completion, weights beyond 1 to alpha; 3 of 9 groups."""
    rows = [group_row(k, [words(f"s{k}_", 2)]) for k in range(1, 10)]
    rows[0] |= dict(weights=["x", math.inf], divergence=[math.nan, -1.0])
    rows[0]["completions"][0] |= dict(advantage=None, logps=[math.nan, -1.0])
    rows[4] = group_row(5, [words("x", 2), words("y", 0)], weights=[0.5, 1.9])
    script = """
      const first = [point(".token"), text("#flags"), text("#count"), earlier.disabled];
      const steps = all("#choice option", e => e.text);
      choice.value = 2; choice.dispatchEvent(new Event("change"));
      const last = [tokens(), later.disabled];
      earlier.click();
      const shades = all(".position", e => e.style.getPropertyValue("--shade"));
      return [first, steps, last, [tokens(), choice.value, shades, text("#scale")]];
    """
    first, steps, last, middle = look(rows, script, max_groups=3)
    told = ["t = 0", *(f"{name} = not a number" for name in ("w", "D", "log p")), '" s1_0"']
    flags = "alpha 1.7 · divergence official · ended_rows uniform"
    assert first == [told, flags, "3 of 9 groups", True]
    assert steps == [f"step {k}, question q{k}" for k in (1, 5, 9)]
    assert last == [[[" s9_0", " s9_1"]], True]
    assert middle == [[[" x0", " x1"], []], "1", ["0", "1"], middle[3]]
    assert middle[3].split() == ["w", "=", "0.5", "1.9"]
