"""Write the sample texts and the tokenizer from public-domain English text that Debian ships.

    apt-get install bible-kjv bible-kjv-text dict-jargon dict-gcide dict-devil
    python samples/prepare_text.py --training-text DIR

There are four kinds of text, so that the router's skew differs between them:

* ``scripture``: the King James Bible (1611), one document per chapter;
* ``hacker``: the Jargon File 4.4.7, one document per entry;
* ``dictionary``: the entries of Webster's Dictionary of 1913, without the later additions of GCIDE;
* ``satire``: The Devil's Dictionary (1911). It is never used for training, and serves as text of a different kind.

Of the first three, every 40th document is held-out text and every 40th is calibration text; neither is used for training.
"""

import gzip
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

DICTIONARIES = Path("/usr/share/dictd")
VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
SPLIT_EVERY = 40
DICTIONARY_SHARE = 6  # every sixth entry of Webster's is used; all of them would far outweigh the other kinds


def scripture() -> Iterator[str]:
    verses = subprocess.run(
        ["bible", "-f", "gen1:1-rev22:21"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    ).stdout
    chapter = ""
    lines: list[str] = []
    for verse in verses.splitlines():
        match = re.fullmatch(r"(\w+?\d+):\d+ (.*)", verse)
        if match is None:
            continue
        if match[1] != chapter and lines:
            yield "\n".join(lines)
            lines = []
        chapter = match[1]
        lines.append(match[2])
    yield "\n".join(lines)


def dictionary_text(name: str) -> str:
    return gzip.decompress((DICTIONARIES / f"{name}.dict.dz").read_bytes()).decode("utf-8", errors="replace")


def dictionary_entries(name: str) -> Iterator[str]:
    """The entries of one dictd database: a headword at the margin, followed by its text on the same line or indented."""
    for entry in re.split(r"\n(?=\S)", dictionary_text(name)):
        if not entry.startswith("00-database"):
            yield entry.strip()


def hacker() -> Iterator[str]:
    return (
        entry
        for entry in dictionary_entries("jargon")
        if len(entry) > 80 and "dictd" not in entry and "catb.org/~esr/jargon/jargsrc" not in entry
    )


def webster() -> Iterator[str]:
    kept = 0
    for entry in dictionary_entries("gcide"):
        sources = set(re.findall(r"\[[^\]]*(?:Webster|PJC|WordNet|RP|MEC)[^\]]*\]", entry))
        if sources == {"[1913 Webster]"} and "\ufffd" not in entry and len(entry) > 120:
            kept += 1
            if kept % DICTIONARY_SHARE == 0:
                yield re.sub(r"\n?\s*\[1913 Webster\]", "", entry).strip()


def satire() -> Iterator[str]:
    return (entry.strip() for entry in re.split(r"\n\n(?=[A-Z-]+, )", dictionary_text("devil"))[1:])


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


@click.command()
@click.option(
    "--training-text", type=click.Path(path_type=Path), required=True, help="Folder for the training text (10 MB, not committed)."
)
@click.option("--samples", type=click.Path(path_type=Path), default=Path(__file__).parent, help="Folder for texts and tokenizer.")
def main(training_text: Path, samples: Path) -> None:
    """Split each kind into training, calibration and held-out text, and train one tokenizer for all."""
    training_text.mkdir(parents=True, exist_ok=True)
    (samples / "text").mkdir(parents=True, exist_ok=True)
    separator = f"\n{END_OF_TEXT}\n"
    training: list[str] = []
    for kind, documents in {"scripture": scripture(), "hacker": hacker(), "dictionary": webster()}.items():
        split: dict[str, list[str]] = {"training": [], "calibration": [], "heldout": []}
        for index, document in enumerate(documents):
            part = {0: "heldout", SPLIT_EVERY // 2: "calibration"}.get(index % SPLIT_EVERY, "training")
            split[part].append(document)
        training += split["training"]
        (training_text / f"{kind}.txt").write_text(separator.join(split["training"]))
        for part in ("calibration", "heldout"):
            (samples / "text" / f"{kind}.{part}.txt").write_text("\n\n".join(split[part]) + "\n")
        click.echo(
            f"{kind}: "
            + ", ".join(f"{part} {len(split[part])} documents, {sum(map(len, split[part]))} characters" for part in split)
        )
    unseen = [entry for index, entry in enumerate(satire()) if index % 4 == 0]
    (samples / "text" / "satire.heldout.txt").write_text("\n\n".join(unseen) + "\n")
    train_tokenizer(training).save_pretrained(training_text / "tokenizer")


if __name__ == "__main__":
    main()
