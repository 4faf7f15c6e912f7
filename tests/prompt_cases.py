"""The questions whose rendered prompts stand in tests/golden, one file a style.

python tests/prompt_cases.py      writes the files anew; read the diff before it is committed
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

GOLDEN = Path(__file__).resolve().parent / "golden"
ROWS = {
    "options apart from the problem": {
        "problem": "What does she take?",
        "options": ["A. a red ball", "B. a blue ball"],
        "problem_type": "multiple choice",
        "solution": "<answer>B</answer>",
        "video": "/a.mp4",
    },
    "options in the problem": {
        "problem": "Which will not happen?\nA. red hits blue\nB. blue hits red",
        "solution": "<answer>A,B</answer>",
        "video": "a.mp4",
    },
    "options without letters": {
        "question": "What does she take?",
        "options": ["a red ball", "a blue ball"],
        "solution": "<answer>B</answer>",
        "video": "a.mp4",
    },
    "a number": {
        "problem": "How many balls fall?",
        "solution": "<answer> 3 </answer>",
        "video_filename": "./a.mp4",
    },
    "a text": {
        "problem": "What does the sign say?",
        "problem_type": "OCR",
        "options": [],
        "solution": "<answer>Exit</answer>",
        "path": "a.mp4",
    },
}


def rendered(style: str) -> str:
    """Every case in the chat form of Qwen2.5-VL, under a line that names it."""
    import toy
    from data import Prompter
    from records import as_record
    from video import Geometry

    tokenizer = toy.build_tokenizer(["a"])
    types = ("mixed", "single", "multiple") if style == "think" else ("mixed",)
    parts = []
    for kind in types:
        prompter = Prompter(tokenizer, toy.CHAT_TEMPLATE, Geometry(), kind, style=style)
        for name, row in ROWS.items():
            title = name + (f", --question_type {kind}" if len(types) > 1 else "")
            text = prompter.tokenize(as_record(row, "row 1", Path("videos")))[0]
            parts.append(f"===== {title}\n{text}\n")
    return "".join(parts)


if __name__ == "__main__":
    from data import STYLES

    for style in STYLES:
        (GOLDEN / f"{style}.txt").write_text(rendered(style), encoding="utf-8")
