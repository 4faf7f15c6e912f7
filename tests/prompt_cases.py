"""The questions whose rendered prompts are in tests/golden, one file a style.

python -m tests.prompt_cases      writes the files anew; read the diff before it is committed
"""

from pathlib import Path

import toy
from data import STYLES, Prompter
from records import as_record
from video import Geometry

GOLDEN = Path(__file__).resolve().parent / "golden"
ASKED = dict(problem="What does she take?", solution="<answer>B</answer>", video="a.mp4")
ROWS = {
    "options apart from the problem": {
        **ASKED,
        "options": ["A. a red ball", "B. a blue ball"],
        "problem_type": "multiple choice",
    },
    "options in the problem": {
        "problem": "Which will not happen?\nA. red hits blue\nB. blue hits red",
        "solution": "<answer>A,B</answer>",
        "video": "a.mp4",
    },
    "options without letters": {**ASKED, "options": ["a red ball", "a blue ball"]},
    "a number": {**ASKED, "problem": "How many balls fall?", "solution": "<answer> 3 </answer>"},
    "a text": {**ASKED, "problem": "What does the sign say?", "problem_type": "OCR", "options": []},
}
TOKENIZER = toy.build_tokenizer(["a"])


def rendered(style: str) -> dict[str, tuple[str, list[int]]]:
    """Title of each case -> its prompt in the chat form of Qwen2.5-VL, and its ids."""
    types = ("mixed", "single", "multiple") if style == "think" else ("mixed",)
    prompts = {}
    for kind in types:
        prompter = Prompter(TOKENIZER, toy.CHAT_TEMPLATE, Geometry(), kind, style=style)
        for name, row in ROWS.items():
            title = name + (f", --question_type {kind}" if len(types) > 1 else "")
            prompts[title] = prompter.tokenize(as_record(row, "row 1", Path("videos")))
    return prompts


def as_file(prompts: dict[str, tuple[str, list[int]]]) -> str:
    return "".join(f"===== {title}\n{prompt}\n" for title, (prompt, _) in prompts.items())


if __name__ == "__main__":
    for style in STYLES:
        (GOLDEN / f"{style}.txt").write_text(as_file(rendered(style)), encoding="utf-8")
