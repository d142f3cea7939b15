"""A table of what works with each model type of transformers, from the rows of a census.

    python benchmarks/census.py --rows census.jsonl [more.jsonl ...] > benchmarks/results/census.md
    python benchmarks/census.py --rows census.jsonl --limits    # what does not pass, by reason: for docs/limits.md

A census builds one tiny random model of every type that an auto class knows, and asks it for everything below through
the public API. A row is one line of JSON, {"class": "causal", "type": "llama", check: "ok" | "left out" | "FAIL why"},
where "forward" says whether the dense model could be built and run. Rows of later files, and later rows of one file,
take the place of earlier ones of the same class and type.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CLASSES = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seqcls": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image": "AutoModelForImageClassification",
    "itt": "AutoModelForImageTextToText",
    "speech": "AutoModelForSpeechSeq2Seq",
    "ctc": "AutoModelForCTC",
    "audiocls": "AutoModelForAudioClassification",
}
CHECKS = {
    "select": "`select_layers` chooses half of the layers (at most one has no score) and leaves the model as it was",
    "lora": "`CKALoraConfig` puts adapters into the layers it chooses, and the model runs",
    "depth": "one layer is removed; the output equals that of the dense model with the layer bypassed",
    "width": "units are removed, a twentieth of all parameters, and the model runs",
    "heads": "heads, KV groups, or whatever the mixer has many of are removed, a hundredth, and the model runs",
    "sublayer": "one branch of one layer is removed, and the model runs",
    "reload": "each of these is saved and loaded by its auto class: same parameters, nothing missing, same output",
    "generate": "what was reloaded generates the same with and without a cache, where the dense model does",
}
PASSES = ("ok", "left out")
PACKAGES = ("transformers", "torch", "peft")
LONGEST = 140
# What a message says, shortened: (pattern, what stands for it).
SHORTER = (
    (r"^(?:FAIL )?(?:[A-Za-z]\w*(?:Error|Exception|Warning|Interrupt): )?", ""),
    (r"^no input fits: FAIL (?:\w+: )?", "no input fits: "),
    (r"/tmp/\S*", ""),
    (r"^Nothing can be removed: of \d+ layers, \d+ are protected\. ", ""),
    (r"^(?:The plan|Layer|The \w+ of layer) ?\d* cannot be removed: (.*?)\.? (?:Layer|The \w+ of layer) \d.*$", r"\1"),
    (r"^(?:Layer|The \w+ of layer) \d+ cannot be removed: ", ""),
    (r"^(No stack of layers was found) in \w+ \(model_type '[^']*'\)", r"\1"),
    (
        r"^Cannot remove [\d,]+ parameters \(structures='\w+'\).* \(([\d.]+%) of all\) can go.*$",
        r"all that can go is less than the share that is asked for (\1)",
    ),
    (r"^No width can become smaller \(.*?\): the layers have neither.*$", "no such width was found in its layers"),
    (
        r"^No width can become smaller \(.*?\): the \w+ of layer \d+ stay \((.*?)(?: \(.*|\).*)?$",
        r"no width can become smaller: \1",
    ),
    (r"^(\d+ s)$", r"takes more than \1"),
    (r"^'[^']*' of \w+ (does not run on a batch with .*?): it needs.*$", r"the default stack \1"),
    (r"^\d+ of \d+ layers of '[^']*' (ran .*?)\. A tower.*$", r"no layer of the default stack \1"),
    (r"(Unrecognized configuration class) <class '(?:\w+\.)*(\w+)'>.*$", r"\1 \2"),
    (r"\s+", " "),
)  # fmt: skip
OF_WHAT = re.compile(r" \((depth|width|heads|sublayer)\)$")
NOT_PRUNED = "not pruned"  # why nothing was reloaded: it follows from the other checks

Row = dict[str, str]


def read(files: Iterable[Path]) -> list[Row]:
    """Return the rows of some files, the last one of each class and type, in the order of the classes."""
    found: dict[tuple[str, str], Row] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.strip():
                row = json.loads(line)
                found[row["class"], row["type"]] = row
    order = {name: i for i, name in enumerate(CLASSES)}
    return sorted(found.values(), key=lambda r: (order.get(r["class"], len(order)), r["class"], r["type"]))


def short(message: str) -> str:
    """Return why a check failed, on one line, without the type of the error, paths, and what need not be said.

    Example:
        >>> short("FAIL RuntimeError: shape '[8, 12]' is invalid for input of size 23 (heads)")
        "heads: shape '[8, 12]' is invalid for input of size 23"
    """
    which = OF_WHAT.search(message)
    text = message[: which.start()] if which else message
    for pattern, replacement in SHORTER:
        text = re.sub(pattern, replacement, text)
    text = f"{which[1]}: {text.strip()}" if which else text.strip()
    if len(text) > LONGEST:
        text = text[:LONGEST].rpartition(" ")[0].rstrip(" ,;:.") + " …"
    return text.rstrip(". ")


def in_markdown(text: str) -> str:
    """The same text with nothing in it that a table or a parser of HTML would take for its own."""
    return re.sub(r"([|<>*\[\]]|__)", r"\\\1", text.replace("`", "'"))


def failures(row: Row) -> dict[str, list[str]]:
    """Reason -> the checks that failed for it; a check that was not reached shares the reason of the one before."""
    found: dict[str, list[str]] = {}
    last = "not run"
    for check in CHECKS:
        if row.get(check) in PASSES:
            continue
        last = short(row[check]) if check in row else last
        found.setdefault(last, []).append(check)
    if len(found) > 1:
        found.pop(NOT_PRUNED, None)
    return found


def passes(row: Row) -> bool:
    """Whether everything that exists for a type works."""
    return all(row.get(check) in PASSES for check in CHECKS)


def runs(row: Row) -> bool:
    """Whether the dense model could be built and run: only such types are counted."""
    return row.get("forward") == "ok"


def by_class(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Class -> its rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["class"], []).append(row)
    return groups


def header() -> Iterator[str]:
    """What was done, and what each column means."""
    yield "# Every model type of transformers\n"
    yield "`python benchmarks/census.py --rows census.jsonl`\n"
    yield (
        "One tiny random model of every type that an auto class knows, built from the defaults of its config with "
        "small sizes, and everything below asked of it through the public API. It shows what works, and not what "
        f"quality is left: for that see the results on real weights. {', '.join(versions())}.\n"
    )
    yield "| column | what passes |\n|---|---|"
    yield "| types | the dense model itself can be built and run; the others are listed at the end and not counted |"
    for check, meaning in CHECKS.items():
        yield f"| {check} | {meaning} |"
    yield "| all | everything that exists for the type |\n"


def versions() -> list[str]:
    """Name and version of the packages that matter, of those that are installed."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


def summary(groups: dict[str, list[Row]]) -> Iterator[str]:
    """One line per class: types that run, types that pass each check, types that pass everything."""
    yield f"| class | types | {' | '.join(CHECKS)} | all |\n|---|{'---:|' * (len(CHECKS) + 2)}"
    every = [row for rows in groups.values() for row in rows if runs(row)]
    lines = {f"{name} ({CLASSES[name]})" if name in CLASSES else name: rows for name, rows in groups.items()}
    for title, rows in {**lines, "**together**": every}.items():
        group = [row for row in rows if runs(row)]
        cells = []
        for check in CHECKS:
            asked = [row for row in group if row.get(check) != "left out"]
            good = sum(row.get(check) == "ok" for row in asked)
            cells.append(f"{good}" if len(asked) == len(group) else f"{good} of {len(asked)}" if asked else "–")
        yield f"| {title} | {len(group)} | {' | '.join(cells)} | {sum(map(passes, group))} |"


def report(rows: list[Row]) -> str:
    """Return the whole page."""
    groups = by_class(rows)
    lines = [*header(), *summary(groups), "\n## What passes everything\n"]
    for name, group in groups.items():
        names = [row["type"] for row in group if runs(row) and passes(row)]
        lines.append(f"**{name}** ({len(names)}): {in_markdown(', '.join(names)) or 'none'}\n")
    lines += ["## What does not pass\n", "| class | type | fails | because |\n|---|---|---|---|"]
    for row in rows:
        if runs(row) and not passes(row):
            for reason, checks in failures(row).items():
                cells = (row["class"], in_markdown(row["type"]), ", ".join(checks), in_markdown(reason))
                lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "\nWhere nothing could be pruned, `reload` is not listed beside what kept it from that.",
        "\n## Not counted\n",
        "Types that the census could not build at a tiny size, or has no input for; this says nothing about them.\n",
    ]
    for name, group in groups.items():
        names = [row["type"] for row in group if not runs(row)]
        if names:
            lines.append(f"**{name}** ({len(names)}): {in_markdown(', '.join(names))}\n")
    return "\n".join(lines).rstrip() + "\n"


def limits(rows: list[Row]) -> str:
    """Return what does not pass as bullets, one a reason, the most frequent first."""
    reasons: dict[str, dict[str, dict[str, list[str]]]] = {}  # reason -> type -> checks -> classes
    for row in rows:
        if not runs(row) or passes(row):
            continue
        alike: dict[str, list[str]] = {}
        for reason, checks in failures(row).items():
            told = re.sub(r" \([\d.]+%\)$", "", reason)
            alike.setdefault(re.sub(r"(?<![\w.])\d+(?:[,.]\d+)*(?![\w.])", "N", told), []).extend(checks)
        for reason, checks in alike.items():
            types = reasons.setdefault(reason, {})
            types.setdefault(row["type"], {}).setdefault(", ".join(checks), []).append(row["class"])
    lines = []
    for reason, names in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
        listed = []
        for name, where in sorted(names.items()):
            failed = "; ".join(f"{', '.join(classes)}: {checks}" for checks, classes in where.items())
            listed.append(f"{in_markdown(name)} ({failed})")
        lines.append(f"- {in_markdown(reason)}: {', '.join(listed)}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, nargs="+", required=True, metavar="FILE", help="jsonl; later rows win")
    parser.add_argument("--limits", action="store_true", help="print only what does not pass, grouped by reason")
    options = parser.parse_args()
    rows = read(options.rows)
    print(limits(rows) if options.limits else report(rows), end="")


if __name__ == "__main__":
    main()
