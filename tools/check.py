"""Lists every fault of a question file: rows that cannot be read, and clips.

    python -m tools.check FILE --video_root DIR [--decode]

Exits with 1 if there is a fault. The formats of the files are in records.py.
"""

import argparse
from collections import Counter

from tqdm import tqdm

import video
from files import UserError
from records import Record, printable, read_records
from rewards import answer_set
from run.decoder import ClipReader


def check(path: str, video_root: str, decode: bool, timeout: float) -> bool:
    """Prints what a file holds and every fault of it, rows and clips; True if there is none."""
    records, errors = read_records(path, video_root)
    print(f"{path}: {len(records)} records, {len(errors)} bad row(s)")
    choices = [r for r in records if r.kind == "multiple choice"]
    for title, values in {
        "source": [r.source for r in records],
        "question type": [r.kind for r in records],
        "right answers": [len(answer_set(r.solution)) for r in choices],
    }.items():
        counts = sorted(Counter(values).items())
        print(printable(f"  by {title}: " + ", ".join(f"{name} {n}" for name, n in counts)))
    clip_errors = check_clips(records, decode, timeout)
    state = "decoded" if decode else "looked for, not decoded (--decode does)"
    print(f"  clips: {len({r.video for r in records})}, {state}; {len(clip_errors)} with a fault")
    errors += clip_errors
    if not records and not errors:
        errors.append(f"{path}: holds no records")
    for error in errors:
        print(printable(f"  {error}"))
    return not errors


def check_clips(records: list[Record], decode: bool, timeout: float) -> list[str]:
    """A sentence for every clip that is missing, unreadable or too short."""
    errors = []
    with ClipReader(timeout) as reader:
        read = reader.load_clip if decode else video.check_file
        paths = dict.fromkeys(str(r.video) for r in records)
        for path in tqdm(paths, desc="clips", leave=False, disable=None):
            try:
                read(path)
            except video.VideoError as error:
                errors.append(str(error))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", help="a JSON list or JSONL")
    parser.add_argument("--video_root", default="", help="directory the video paths start from")
    parser.add_argument("--decode", action="store_true", help="also decode every clip")
    parser.add_argument("--timeout", type=float, default=60, help="limit for a clip, in seconds")
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
