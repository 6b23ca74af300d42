"""The command line of compare.py: its flags, and the settings that follow from them."""

import argparse
import math
from pathlib import Path
from typing import Any

from judging import protocols
from judging.labels import require_place
from judging.protocols import PROTOCOLS, PromptTemplate
from sampling.openai_server import TIMEOUT
from utils import MOST, UserError, load_class, require_different_files, require_writable, suggest, user_path

OFFLINE_JUDGES = ("toy", "recorded")  # they send no requests


def file_path(text: str) -> Path:
    if not (path := user_path(text)).name:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a file")
    return path


A_FILE: dict[str, Any] = {"type": file_path, "metavar": "FILE"}


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of compare.py. `description`: the first lines of --help."""
    parser = argparse.ArgumentParser(
        usage="compare.py -f FILE [FILE ...] [flags]", description=description, formatter_class=HelpFormatter
    )
    add_file_flags(parser)
    add_judge_flags(parser)
    add_protocol_flags(parser)
    add_cost_flags(parser)
    add_output_flags(parser)
    return parser


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Prints the help of a flag on the line below its names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=6)


def add_file_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("files and answers").add_argument
    add(
        "-f",
        "--file",
        **A_FILE,
        nargs="+",
        required=True,
        help="answers: eval.py's samples or another layout (required)",
    )
    add("--against", **A_FILE, help="the file of the baseline's answers (default: the same file)")
    add("--round_robin", "--round-robin", action="store_true", help="compare every two of the files (default: off)")
    add(
        "-ck",
        "--candidate_key",
        metavar="KEY",
        default="policy",
        help="key of the candidate's answers (default: policy)",
    )
    add(
        "-bk",
        "--baseline_key",
        metavar="KEY",
        help="key of the baseline's answers (default: chosen; -ck with --against)",
    )
    add(
        "-hk",
        "--history_key",
        metavar="KEY",
        default="prompt",
        help="key of the prompt if there are no `messages` (default: prompt)",
    )
    add("--questions", **A_FILE, help="question.jsonl of Arena-Hard v0.1 or MT-Bench (default: none)")
    add("--references", **A_FILE, help="JSONL file of MT-Bench's reference answers (default: none)")
    add(
        "-mc",
        "--max_comparisons",
        "--max_comp",
        metavar="N",
        type=positive,
        help="judge the first N items (default: all)",
    )


def add_judge_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "the judge",
        "`-j toy` applies the rules of the toy language, and `-j recorded` reads the\n"
        "verdicts that the files hold: both work offline. Any other name is a chat\n"
        "model, and the API key comes from OPENAI_API_KEY.",
    ).add_argument
    bounds = ", ".join(f"{name} {protocol.max_tokens}" for name, protocol in PROTOCOLS.items() if name != "pairwise")
    add("-j", "--judge", default="gpt-4.1", help="toy, recorded or a chat model (default: %(default)s)")
    add("--base_url", "--base-url", metavar="URL", help="server, as in http://HOST:PORT/v1 (default: OpenAI's own)")
    add(
        "--max_tokens",
        "--max-tokens",
        metavar="N",
        type=positive,
        help=f"longest reply (default: {PromptTemplate.max_tokens}; {bounds})",
    )
    add(
        "--timeout",
        metavar="SECONDS",
        type=above_0,
        default=TIMEOUT,
        help="longest wait for a reply (default: %(default)g)",
    )


def add_protocol_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "the protocol",
        f"PROTOCOL is {', '.join(PROTOCOLS)} or path/to/file.py:Class.\n"
        "mtbench grades single answers; the other three compare two.",
    ).add_argument
    twice = ", ".join(name for name, protocol in PROTOCOLS.items() if protocol.both_orders)
    add("-p", "--protocol", default="pairwise", help="the judge's prompt and verdicts (default: %(default)s)")
    add("-l", "--labels", help="names of the two responses, such as AB (default: 12)")
    add(
        "--both_orders",
        "--both-orders",
        action=argparse.BooleanOptionalAction,
        help=f"judge each pair in both orders (default: on for {twice})",
    )
    add("-s", "--seed", metavar="N", type=int, default=0, help="draws which answer comes first (default: %(default)s)")


def add_cost_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "cost and speed",
        "Every reply is saved in <results>.verdicts.jsonl: a rerun sends only the\nmissing requests.",
    ).add_argument
    add(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="print the requests and their cost, send none (default: off)",
    )
    add(
        "--prices",
        type=from_0,
        nargs=2,
        metavar=("IN", "OUT"),
        help="dollars per million tokens (default: a short list)",
    )
    add(
        "--max_cost",
        "--max-cost",
        metavar="DOLLARS",
        type=from_0,
        help="stop before the cost exceeds this (default: no limit)",
    )
    add("--concurrency", metavar="N", type=positive, default=8, help="requests at a time (default: %(default)s)")
    add(
        "-st",
        "--sleep_time",
        metavar="SECONDS",
        type=from_0,
        default=0,
        help="time between the starts of two requests (default: %(default)s)",
    )


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "output",
        "The flag --official_lc needs the extra `alpaca-eval`, data from the Hub, and\n"
        "answers to all 805 instructions.",
    ).add_argument
    results = Path("results.jsonl")
    add(
        "-r",
        "--results_file",
        **A_FILE,
        default=results,
        help="JSONL file to append the results to (default: %(default)s)",
    )
    add("--page", **A_FILE, help="HTML page of results and verdicts (default: <results>.html)")
    add(
        "--write_pairs",
        "--write-pairs",
        **A_FILE,
        help="training pairs from the verdicts, *.jsonl (default: none)",
    )
    add(
        "--write_binary",
        "--write-binary",
        **A_FILE,
        help="labels from the grades, *.jsonl (default: none)",
    )
    add(
        "--threshold",
        metavar="GRADE",
        type=number,
        help="grades above it are good, below it bad (default: their mean)",
    )
    add(
        "--official_lc",
        "--official-lc",
        action="store_true",
        help="add AlpacaEval's own length-controlled win rate (default: off)",
    )
    add(
        "-v",
        "--verbose",
        nargs="?",
        type=true_or_false,
        const=True,
        default=False,
        metavar="True",
        help="print every verdict (default: off)",
    )


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or beyond {MOST:g}")
    return value


def from_0(text: str) -> float:
    if number(text) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is below 0")
    return number(text)


def above_0(text: str) -> float:
    if number(text) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return number(text)


def true_or_false(text: str) -> bool:
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"{text!r} is not True or False")
    return text == "True"


# ------------------------------------------------------------------------------------------------------------- settings


def load_template(args: argparse.Namespace) -> PromptTemplate:
    """The protocol of -p, changed by --labels and --max_tokens. Raises UserError."""
    found = PROTOCOLS.get(args.protocol)
    if found is None and ":" not in args.protocol:
        raise UserError(f"-p {args.protocol}: not one of {', '.join(PROTOCOLS)}{suggest(args.protocol, PROTOCOLS)}")
    template = (found or load_class(args.protocol, protocols, "-p"))()
    if not isinstance(template, PromptTemplate):
        raise UserError(f"-p {args.protocol}: not a subclass of judging.protocols.PromptTemplate")
    if args.labels is not None:
        if len(set(args.labels)) != 2 or len(args.labels) != 2 or not args.labels.isalnum():
            raise UserError(f"-l {args.labels!r}: must be two different letters or digits, such as 12 or AB")
        template.labels = args.labels
    template.max_tokens = args.max_tokens or template.max_tokens
    return template


def complete_settings(args: argparse.Namespace, template: PromptTemplate) -> None:
    """Fill in the defaults that depend on other flags. Raises UserError for flags that contradict each other."""
    if template.responses == 1 and args.judge in OFFLINE_JUDGES:
        raise UserError(
            f"-j {args.judge} compares two responses, but -p {args.protocol} grades single ones: -j needs a chat model"
        )
    if args.judge not in OFFLINE_JUDGES and not args.base_url and (meant := suggest(args.judge, OFFLINE_JUDGES)):
        raise UserError(f"-j {args.judge}: no judge here{meant}; a chat model of that name needs --base_url")
    args.alpaca_eval = args.judge == "recorded" or isinstance(template, protocols.AlpacaEval)
    if args.official_lc and not args.alpaca_eval:
        raise UserError("--official_lc needs AlpacaEval's preferences: -p alpacaeval, or -j recorded")
    if args.write_pairs and template.responses == 1:
        raise UserError(f"--write_pairs takes verdicts on two answers, but -p {args.protocol} grades: --write_binary")
    if args.write_binary and template.responses == 2:
        raise UserError(f"--write_binary takes grades, but -p {args.protocol} compares two answers: --write_pairs")
    if args.threshold is not None and not args.write_binary:
        raise UserError("--threshold is for --write_binary")
    args.protocol = "recorded" if args.judge == "recorded" else args.protocol
    args.both_orders = template.both_orders if args.both_orders is None else args.both_orders
    args.prices = tuple(args.prices) if args.prices else None
    stem = args.results_file.name.removesuffix(".jsonl")
    args.page = args.page or args.results_file.with_name(f"{stem}.html")
    args.verdicts_file = args.results_file.with_name(f"{stem}.verdicts.jsonl")


def check_places(args: argparse.Namespace) -> None:
    """Raises UserError for files that would overwrite each other, or cannot be written."""
    require_different_files(args.file, "-f")
    name = args.results_file.name
    twin = args.results_file.with_name(name.removesuffix(".jsonl") if name.endswith(".jsonl") else f"{name}.jsonl")
    if twin.is_file():
        raise UserError(f"-r {args.results_file} would share its page and its verdicts with {twin}; name another file")
    inputs = [*args.file, *filter(None, (args.against, args.questions, args.references))]
    outputs = {"-r": args.results_file, "--page": args.page, "its verdicts": args.verdicts_file}
    seen = {path.resolve(): f"the file of answers {path}" for path in inputs}
    for flag, path in outputs.items():
        if other := seen.get(path.resolve()):
            raise UserError(f"{flag} {path} would overwrite {other}; name another file")
        seen[path.resolve()] = f"{flag} {path}"
    for flag, path in (("--write_pairs ", args.write_pairs), ("--write_binary ", args.write_binary)):
        if path is not None:
            require_place(path, flag, [*inputs, *outputs.values()], writes=not args.dry_run)
    if not args.dry_run:
        require_writable(*outputs.values())
