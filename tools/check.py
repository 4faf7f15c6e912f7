"""Lists every fault in a question file: bad rows and unreadable clips.

    python -m tools.check FILE --video_root DIR [--decode]

Exits with 1 if there is a fault. File formats are in records.py.
"""

import argparse

from tqdm import tqdm

from files import one_sentence, printable
from records import read_records
from run.decoder import ClipReader
from video import VideoError, check_file


def check(path: str, video_root: str, decode: bool) -> bool:
    """Prints a summary of a file and every fault in its rows and clips; True if there are none."""
    records, errors = read_records(path, video_root)
    print(f"{path}: {len(records)} records, {len(errors)} bad row(s)")
    clips, bad_rows = dict.fromkeys(str(r.video) for r in records), len(errors)
    with ClipReader() as reader:
        read = reader.load_clip if decode else check_file
        for clip in tqdm(clips, desc="clips", leave=False, disable=None):
            try:
                read(clip)
            except VideoError as error:
                errors.append(str(error))
    state = "decoded" if decode else "looked for, not decoded (--decode does)"
    print(f"  clips: {len(clips)}, {state}; {len(errors) - bad_rows} with a fault")
    for error in errors:
        print(printable(f"  {error}"))
    return bool(records) and not errors


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", help="a JSON list or JSONL")
    parser.add_argument("--video_root", default="", help="directory of the relative video paths")
    parser.add_argument("--decode", action="store_true", help="also decode every clip")
    args = parser.parse_args(arguments)
    with one_sentence():
        raise SystemExit(0 if check(args.file, args.video_root, args.decode) else 1)


if __name__ == "__main__":
    main()
