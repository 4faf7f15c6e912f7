"""The second toy, `python twgrpo.py --toy events`: questions about the order of events.

A clip shows a white and a black ball in four moments; in each, one of them hits a coloured shape.
A question is, for example, "Which does black hit after red?". An answer goes through the moments
one to three times and decides for each whether it is part of the answer:

    <think>I want black after red. First white no, blue before no: no. Second black yes, red now no:
    no. Third black yes, green after yes: B. Last white no, purple after yes: no.</think>
    <answer>B</answer>

So an answer has 54 to 147 tokens, most of them certain and a few decisive: "no" or a letter in the
last pass. The order of the frames matters; each video token covers one moment.
"""

import re
from fractions import Fraction

import numpy as np

COLOURS = dict(
    red=(220, 40, 40),
    green=(40, 170, 60),
    blue=(50, 80, 230),
    yellow=(235, 215, 50),
    purple=(150, 60, 190),
)
BALLS = dict(white=(245, 245, 245), black=(0, 0, 0))
LETTERS = dict(zip(COLOURS, "ABCDE", strict=True))
MOMENTS = ("First", "Second", "Third", "Last")
SIDE, FRAMES_PER_MOMENT = 28, 2  # pixels; together exactly one video token of Qwen2.5-VL
LOOKS = 3  # at most
# Frames per second. A moment lasts 5 s, so video positions advance by 10 per moment: as many as the
# tokens an answer spends on it.
RATE = Fraction(2, 5)

DEFAULTS = dict(  # in addition to those of both toys (toy.BOTH)
    max_frames=8,
    min_pixels=SIDE * SIDE,
    max_pixels=SIDE * SIDE,
    per_device_train_batch_size=8,
    max_completion_length=150,
    learning_rate=2e-4,
    max_steps=80,
    save_steps=40,
)


def draw(events: list[tuple[str, str, str]], rng: np.random.Generator) -> np.ndarray:
    """Draws a ball running into a shape at each moment: (F, H, W, 3) uint8."""
    count = len(events) * FRAMES_PER_MOMENT
    frames = np.full((count, SIDE, SIDE, 3), rng.integers(70, 110), dtype=np.uint8)
    y, x = np.mgrid[:SIDE, :SIDE]
    for moment, (ball, colour, _) in enumerate(events):
        centre, angle = SIDE / 2 + rng.uniform(-2, 2, 2), rng.uniform(0, 2 * np.pi)
        is_disc = rng.random() < 0.5
        dy, dx = np.abs(y - centre[0]), np.abs(x - centre[1])
        shape = np.hypot(dy, dx) < 8 if is_disc else np.maximum(dy, dx) < 7
        for k, distance in enumerate((11, 8)):
            frame = frames[moment * FRAMES_PER_MOMENT + k]
            at = centre + distance * np.array([np.sin(angle), np.cos(angle)])
            frame[shape] = COLOURS[colour]
            frame[np.hypot(y - at[0], x - at[1]) < 5] = BALLS[ball]
    return frames


def scene(rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """A clip, and a question row about it with at least one right answer. The row's `events` are
    (ball, colour, when); `when` is "before", "now" or "after" the hit that the question names."""
    right = []
    while not right:
        colours = rng.choice(list(COLOURS), len(MOMENTS), replace=False).tolist()
        balls = rng.choice(list(BALLS), len(MOMENTS)).tolist()
        ball, when = str(rng.choice(list(BALLS))), str(rng.choice(["before", "after"]))
        named = int(rng.integers(len(MOMENTS)))
        whens = ["before"] * named + ["now"] + ["after"] * (len(MOMENTS) - named - 1)
        events = list(zip(balls, colours, whens, strict=True))
        right = [LETTERS[colour] for b, colour, w in events if (b, w) == (ball, when)]
    question = f"Which does {ball} hit {when} {colours[named]}?"
    options = [f"{letter}. {colour}" for colour, letter in LETTERS.items()]
    row = dict(
        problem="\n".join([question, *options]),
        solution=f"<answer>{','.join(sorted(right))}</answer>",
        asked=[ball, when, colours[named]],
        events=events,
    )
    return draw(events, rng), row


def imperfect_target(row: dict, rng: np.random.Generator) -> str:
    """An answer in perfect format, with one to three passes over the moments. The last one decides
    and names at least one colour."""
    looks = [look(row, rng)]
    while len(looks) < LOOKS and rng.random() < 0.5:
        looks.append(look(row, rng))
    chosen = re.findall(": ([A-E])", looks[-1])
    if not chosen:
        return imperfect_target(row, rng)
    wanted, text = " ".join(row["asked"]), " Let me look again. ".join(looks)
    return f"<think>I want {wanted}. {text}</think><answer>{','.join(chosen)}</answer>"


def look(row: dict, rng: np.random.Generator) -> str:
    """One pass over the moments. It describes everything correctly, but picks a right colour with
    p = 0.7 and a wrong one with p = 0.2."""
    yes, sentences = {True: "yes", False: "no"}, []
    for moment, (ball, colour, when) in zip(MOMENTS, row["events"], strict=True):
        is_ball, is_when = ball == row["asked"][0], when == row["asked"][1]
        chosen = rng.random() < (0.7 if is_ball and is_when else 0.2)
        decision = LETTERS[colour] if chosen else "no"
        sentences.append(
            f"{moment} {ball} {yes[is_ball]}, {colour} {when} {yes[is_when]}: {decision}."
        )
    return " ".join(sentences)
