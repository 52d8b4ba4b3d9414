"""How good is speech, judged by models trained elsewhere?

    make judges
    python scripts/evaluate.py talker --ckpt_dir checkpoints/talker_demo --vocoder_ckpt checkpoints/vocoder_demo \\
        --data data/audio/tts.val.csv --limit 40 --save_speech speech
    python scripts/second_opinion.py recordings=speech/recordings vocoded=speech/vocoded codec=speech/codec \\
        talker=speech/talker --page speech.html

Each NAME=DIR is a folder of WAV files with the manifest DIR.csv (columns wav and text; speaker if there are several)
beside it. Prints one table: a row for each NAME, and for each speaker in it, and in parentheses the difference to the
recordings. WER is in percent of the words. DNSMOS rates the sound from 1 to 5. Similarity of voices is a cosine of
each clip with the speaker's recordings of other texts; own voice is the share of clips that no other speaker is nearer
to.
"""

import argparse
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from omni.common.errors import BadRow, UserError, reading_row
from omni.common.files import write_json
from omni.data.open_manifest import load_manifest
from omni.models.ctc import normalise_text
from omni.stages.audio_encoder import COLUMNS
from omni.stages.voices import speaker_of
from omni.train.cli import OneLineErrors, launch, output_file
from scripts.judges import JUDGES, Clip, Judge, References, VoiceJudge, installed
from scripts.listening_page import Version, write_page, write_picture

RECORDINGS = "recordings"  # the source that the others are compared with

# --- what is judged -------------------------------------------------------------------------------------------------


def read_voice(folder: Path) -> list[Clip]:
    """The WAV files of a folder. Each is read once, so that a damaged one is found before the judges begin."""
    clips = [Clip(path, "") for path in sorted(folder.glob("*.wav"))]
    if not clips:
        raise UserError(f"{folder}: expected a folder of WAV files, found {'none' if folder.is_dir() else 'no folder'}")
    for clip in clips:
        clip.waveform()
    return clips


def read_source(folder: Path, limit: int | None) -> list[Clip]:
    """The WAV files of a folder with their texts, in the order of the manifest beside it."""
    found = {clip.path.resolve(): clip.path for clip in read_voice(folder)}
    path, clips = folder.with_name(f"{folder.name}.csv"), []
    with tempfile.TemporaryDirectory(prefix="omni_opinion_") as cache:
        manifest = load_manifest(path, COLUMNS, "text", cache_dir=cache, log=lambda line: None)
        for row in range(len(manifest)):
            try:
                with reading_row():
                    fields = manifest[row]
                    if not normalise_text(fields["text"]):
                        raise BadRow("expected a text with words")
                    speaker = speaker_of(fields)
                    wav = manifest.file(fields, "wav").resolve()
            except BadRow as error:
                raise UserError(f"{manifest.where(row)}: {error}") from error
            if wav not in found:
                raise UserError(f"{manifest.where(row)}: expected a WAV file of {folder}, found {fields['wav']}")
            clips.append(Clip(found.pop(wav), fields["text"], speaker))
    if found:
        raise UserError(f"{next(iter(found.values()))}: expected its text in {path}, found none")
    return clips[:limit]


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What one judge says about one source; or about one speaker's clips of it, then without transcripts."""

    figures: dict[str, float | None]
    transcripts: list[str]


def judge_sources(judge: Judge, name: str, sources: dict[str, list[Clip]]) -> dict[str, Verdict]:
    """Source -> what the judge says about it; "source, speaker" for each speaker of a source that has several."""
    verdicts = {}
    for source, clips in sources.items():
        marks = [judge.mark(clip) for clip in tqdm(clips, f"{name}, {source}", disable=None, leave=False)]
        for label, rows in parts(source, clips).items():
            chosen = [marks[row] for row in rows]
            transcripts = [mark.transcript for mark in chosen if mark.transcript is not None and label == source]
            verdicts[label] = Verdict(judge.figures(chosen), transcripts)
    return verdicts


def parts(source: str, clips: list[Clip]) -> dict[str, list[int]]:
    """The clips of a source; and of each of its speakers, if there are several."""
    speakers = sorted({clip.speaker for clip in clips})
    own = {name: [row for row, clip in enumerate(clips) if clip.speaker == name] for name in speakers}
    by_speaker = {f"{source}, {name or '(no name)'}": rows for name, rows in own.items()} if len(own) > 1 else {}
    return {source: list(range(len(clips)))} | by_speaker


def make_table(sources: dict[str, list[Clip]], verdicts: dict[str, dict[str, Verdict]]) -> list[list[str]]:
    """Rows of cells, the heading first.

    Args:
        verdicts: judge -> source -> what it says.
    """
    columns = [(judge, key) for judge, said in verdicts.items() for key in next(iter(said.values())).figures]
    rows = [["", "clips", *(f"{judge} {key}" for judge, key in columns)]]
    for source, clips in sources.items():
        for label, chosen in parts(source, clips).items():
            rows.append([label, str(len(chosen))])
            for judge, key in columns:
                digits = 1 if key.endswith("%") else 2
                value = verdicts[judge][label].figures[key]
                base = verdicts[judge].get(RECORDINGS + label.removeprefix(source))
                cell = "-" if value is None else f"{value:.{digits}f}"
                if None not in (value, base) and base.figures[key] is not None and source != RECORDINGS:
                    cell += f" ({value - base.figures[key]:+.{digits}f})"
                rows[-1].append(cell)
    return rows


def page_rows(
    sources: dict[str, list[Clip]], verdicts: dict[str, dict[str, Verdict]]
) -> list[tuple[str, list[Version]]]:
    """Each text with its clip in each source, and what the judges transcribe. A text that a source has twice, perhaps
    by two speakers, comes twice."""
    rows: dict[tuple[str, int], list[Version]] = {}
    for source, clips in sources.items():
        times: Counter[str] = Counter()
        for index, clip in enumerate(clips):
            heard = {judge: said[source].transcripts for judge, said in verdicts.items()}
            heard = {judge: transcripts[index] for judge, transcripts in heard.items() if transcripts}
            rows.setdefault((clip.text, times[clip.text]), []).append(Version(source, clip.path, heard, clip.speaker))
            times[clip.text] += 1
    return [(text, versions) for (text, _), versions in rows.items()]


# --- command line ---------------------------------------------------------------------------------------------------


def named_folder(value: str) -> tuple[str, Path]:
    name, equals, folder = value.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"expected NAME=DIR, found {value!r}")
    return name, Path(folder)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=named_folder, metavar="NAME=DIR", help="speech to judge")
    parser.add_argument("--judge", action="append", choices=JUDGES, help="repeat for several (default: all installed)")
    parser.add_argument(
        "--voice", action="append", default=[], type=named_folder, metavar="NAME=DIR",
        help="WAV files of a voice; repeat, and resemblyzer counts which one each clip is nearest to",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="judge the first N clips of each folder only")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write figures and transcripts")
    parser.add_argument("--page", type=output_file, metavar="FILE", help="write an HTML page to listen to the sources")
    parser.add_argument(
        "--picture", type=output_file, metavar="FILE", help="draw spectrograms of three sentences, a PNG"
    )
    args = parser.parse_args(argv)
    names = args.judge or [name for name in JUDGES if installed(JUDGES[name])]
    if not names:
        raise UserError("no judge is installed. Say: make judges")
    for name in names:
        if not installed(JUDGES[name]):
            raise UserError(f"--judge {name}: not installed. Say: make judges")
    for folders in (args.sources, args.voice):
        if len(dict(folders)) < len(folders):
            raise UserError(f"{' '.join(name for name, _ in folders)}: expected a different name for each folder")
    if args.voice and not any(issubclass(JUDGES[name], VoiceJudge) for name in names):
        raise UserError("--voice: has no effect without a judge of voices, such as resemblyzer")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit: expected at least 1, found {args.limit}")
    sources = {name: read_source(folder, args.limit) for name, folder in args.sources}
    references = References(sources.get(RECORDINGS, []), {name: read_voice(folder) for name, folder in args.voice})
    verdicts = {name: judge_sources(JUDGES[name](references), name, sources) for name in names}
    table = make_table(sources, verdicts)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if args.json:
        texts = {name: [clip.text for clip in clips] for name, clips in sources.items()}
        said = {judge: {name: asdict(one) for name, one in some.items()} for judge, some in verdicts.items()}
        write_json(args.json, {"texts": texts, "judges": said}, indent=2)
    if args.page:
        write_page(args.page, page_rows(sources, verdicts), table)
    if args.picture:
        write_picture(args.picture, page_rows(sources, verdicts))


if __name__ == "__main__":
    launch(main)
