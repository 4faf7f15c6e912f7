"""Every fault of a file of questions, by name: rows that cannot be read, and clips.

    python -m tools.check FILE --video_root DIR [--decode]

Exits with 1 if there is a fault. The formats of the files are in records.py.
"""

import argparse
import collections
import os

from tqdm import tqdm

import video
from files import UserError
from records import Record, printable, read_records
from rewards import answer_set
from run.decoder import ClipReader


def question_type_of(record: Record) -> str:
    """ "single" or "multiple" for a choice question, else its kind."""
    if record.kind != "multiple choice":
        return record.kind
    return "multiple" if len(answer_set(record.solution)) > 1 else "single"


def check(path: str, video_root: str, decode: bool, timeout: float) -> bool:
    """Prints what a file holds and every fault of it, rows and clips; True if there is none."""
    records, errors = read_records(path, video_root)
    print(f"{path}: {len(records)} records, {len(errors)} bad row(s)")
    for title, values in {
        "source": [r.source for r in records],
        "question type": [question_type_of(r) for r in records],
        "right answers": [len(answer_set(r.solution)) for r in records if is_choice(r)],
    }.items():
        counts = sorted(collections.Counter(values).items(), key=lambda item: str(item[0]))
        counted = ", ".join(f"{name} {count}" for name, count in counts)
        print(printable(f"  by {title}: {counted}"))
    clip_errors = check_clips(records, decode, timeout)
    clips = len({r.video for r in records})
    state = "decoded" if decode else "looked for, not decoded (--decode does)"
    print(f"  clips: {clips}, {state}; {len(clip_errors)} with a fault")
    for error in errors + clip_errors:
        print(printable(f"  {error}"))
    if not records and not errors:
        print(f"  {path}: holds no records")
    return bool(records) and not errors and not clip_errors


def is_choice(record: Record) -> bool:
    return record.kind == "multiple choice"


def check_clips(records: list[Record], decode: bool, timeout: float) -> list[str]:
    """A sentence for every clip that is missing, unreadable or too short, and for every file that
    the records know under several names (a sign of two clips that collided, or of two roots)."""
    names, errors = collections.defaultdict(set), []
    for record in records:
        names[os.path.realpath(record.video)].add(_given_name(record))
    for path, given in names.items():
        if len(given) > 1:
            errors.append(f"{path}: known under {len(given)} names: {', '.join(sorted(given))}")
    with ClipReader(timeout) as reader:
        paths = list(dict.fromkeys(str(r.video) for r in records))
        for path in tqdm(paths, desc="clips", leave=False, disable=None):
            try:
                if decode:
                    reader.load_clip(path)
                else:
                    video.check_file(path)
            except video.VideoError as error:
                errors.append(str(error))
    return errors


def _given_name(record: Record) -> str:
    keys = ("video", "path", "video_filename")
    return next((record.row[k] for k in keys if isinstance(record.row.get(k), str)), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", help="a JSON list or JSONL")
    parser.add_argument("--video_root", default="", help="directory the video paths start from")
    parser.add_argument("--decode", action="store_true", help="also read every clip")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for a clip, at most")
    args = parser.parse_args()
    try:
        if not 0 < args.timeout <= 86_400:
            raise UserError("--timeout must be above 0 and at most 86,400 seconds")
        is_good = check(args.file, args.video_root, args.decode, args.timeout)
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {printable(str(error))}") from None
    raise SystemExit(0 if is_good else 1)


if __name__ == "__main__":
    main()
