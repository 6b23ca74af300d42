"""Which of two sets of answers does a judge prefer? GPT-4, any OpenAI-compatible server, or the toy language's rules.

    python compare.py -f samples/my_experiment.json -mc 512 -bk chosen -ck policy -r results.jsonl

Which answer is shown as Response 1 is drawn from the seed and the item, or both orders are shown, so that a judge who
likes one place favours nobody. What a judge was paid for is kept in <results>.verdicts.jsonl: a rerun, or a run after a
crash, asks only what is missing. The API key is read from OPENAI_API_KEY and nowhere else. docs/judging.md says what is
computed.
"""

import argparse
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from judging import alpaca_eval_official, answers, protocols, tables
from judging.answers import AnswerFile, Comparison
from judging.judge import (
    PRICES,
    Budget,
    OpenAIJudge,
    Tokens,
    Verdict,
    VerdictLog,
    append_line,
    ask_all,
    judge_key,
    judge_pairs,
    orders,
    shown_as,
    toy_judge,
)
from judging.page import grades_page, verdict_page
from judging.protocols import PROTOCOLS, PromptTemplate, Shown
from sampling.openai_server import Server
from utils import UserError, console, load_class, suggest, write_text

# -------------------------------------------------------------------------------------------------------- what to judge


def comparisons(args: argparse.Namespace) -> list[Comparison]:
    """The pairs of models to judge, each with its items. Raises UserError on files that cannot be compared."""
    if args.judge == "recorded":
        found = [answers.read_recorded(path) for path in args.file]
    else:
        paths = [*args.file, *([args.against] if args.against else [])]
        files = answers.named_apart([read(args, path) for path in paths])
        if args.against:
            other, key = files.pop(), args.baseline_key or args.candidate_key
            found = [answers.against(file, other, args.candidate_key, key) for file in files]
        elif args.round_robin and len(files) > 1:
            found = []
        else:
            found = [answers.within(file, args.candidate_key, args.baseline_key or "chosen") for file in files]
            if len(files) > 1:  # a key names nobody among several files; the run that it was sampled from does
                found = [one._replace(candidate=file.name) for one, file in zip(found, files)]
        if args.round_robin:
            key = args.candidate_key
            found += [answers.against(one, two, key, key) for one, two in itertools.combinations(files, 2)]
    (pair, times), *_ = Counter((one.candidate, one.baseline) for one in found).most_common(1)
    if times > 1:
        raise UserError(f"{times} of the files have verdicts on {pair[0]} against {pair[1]}: give one of them")
    return [limited(comparison, args.max_comparisons) for comparison in found]


def read(args: argparse.Namespace, path: Path) -> AnswerFile:
    return answers.read_answers(
        path, history_key=args.history_key, questions=args.questions, references=args.references
    )


def limited(comparison: Comparison, count: int | None) -> Comparison:
    verdicts = comparison.verdicts
    if verdicts is not None and count is not None:
        verdicts = [verdict for verdict in verdicts if verdict.item < count]
    return comparison._replace(
        items=comparison.items[:count], questions=comparison.questions[:count], verdicts=verdicts
    )


# -------------------------------------------------------------------------------------------------------------- judging


def compare_pairs(args: argparse.Namespace, template: PromptTemplate) -> None:
    """Judge pairs of answers, append a line for each pair of models to the results file, and show the figures."""
    found = comparisons(args)
    if args.official_lc:
        for comparison in found:
            alpaca_eval_official.require_official_set(comparison)
    games = [orders(one.items, args.seed, args.both_orders) for one in found]
    shown = [shown_as(one.items[i], first) for one, these in zip(found, games) for i, first in these]
    judge, budget = judge_for(args, template, shown)
    if args.dry_run:
        return
    verdicts = []
    for one in found:
        recorded = one.verdicts
        if recorded is None:
            recorded = judge_pairs(one.items, judge, args.seed, args.concurrency, args.both_orders)
        verdicts.append(recorded)
    lines = [tables.comparison_figures(args, one, those) for one, those in zip(found, verdicts)]
    board = tables.standings(found, verdicts) if len(found) > 1 else []
    for one, those, line in zip(found, verdicts, lines):
        if args.verbose:
            show_verdicts(one, those)
        line |= {"leaderboard": board} if board else {}
        line |= spent(judge, budget) | {"config": one.config}
        append_line(args.results_file, line)
    write_text(args.page, verdict_page(lines, found, verdicts, board))
    tables.show_pairs(lines, board)
    show_end(args, judge, budget)


def judge_for(
    args: argparse.Namespace, template: PromptTemplate, shown: Sequence[Shown]
) -> tuple[Callable[[Shown], protocols.Answer], Budget]:
    """The judge, after saying what asking it would cost. Raises UserError before anything is asked."""
    prices = args.prices or (None if args.base_url else PRICES.get(args.judge))
    if args.max_cost is not None and prices is None:
        raise UserError(f"--max_cost: no prices are known for {args.judge!r}; give them with --prices INPUT OUTPUT")
    budget = Budget(prices, args.max_cost)
    if args.judge in ("toy", "recorded"):
        if args.dry_run:
            console.print(f"{len(shown):,} verdicts by {args.judge}: nothing is sent")
        return toy_judge, budget
    key = "" if args.dry_run else judge_key(args.judge, args.base_url)
    server = Server(args.base_url, key, timeout=args.timeout, pause=args.sleep_time)
    log = VerdictLog(args.results_file.with_suffix(".verdicts.jsonl"))
    judge = OpenAIJudge(args.judge, template, log, budget, server)
    missing = judge.missing(shown)
    expected = [judge.expected(one) for one in missing]
    total = Tokens(sum(one.input for one in expected), sum(one.output for one in expected))
    cost = f", at most ${total.cost(prices):.2f}" if prices else ""
    console.print(
        f"{len(missing):,} requests to {args.judge} ({len(shown) - len(missing):,} verdicts need none): about "
        f"{total.input:,} tokens in, at most {total.output:,} out{cost}{price_note(args, prices)}",
        markup=False,
    )
    if args.dry_run and missing:
        for message in template.messages(missing[0]):
            console.print(f"[{message['role']}]\n{message['content']}", markup=False)
    return judge, budget


def price_note(args: argparse.Namespace, prices: tuple[float, float] | None) -> str:
    if prices is None:
        return "; no prices known (--prices)"
    source = "given" if args.prices else "of a built-in list that may be out of date; --prices sets them"
    return f" (prices {source}: ${prices[0]:g} in, ${prices[1]:g} out per million tokens)"


def spent(judge: Any, budget: Budget) -> dict[str, Any]:
    """What this run of the command paid for, over all comparisons."""
    if not isinstance(judge, OpenAIJudge):
        return {}
    return {
        "requests": budget.requests,
        "tokens_in": budget.spent.input,
        "tokens_out": budget.spent.output,
        "cost": budget.cost,
        "refused_parameters": judge.server.refuses,
    }


def rate_answers(args: argparse.Namespace, template: PromptTemplate) -> None:
    """Have single answers graded, append a line for each set of answers to the results file, and show the figures."""
    paths = [*args.file, *([args.against] if args.against else [])]
    files = answers.named_apart([read(args, path) for path in paths])
    sets = [(file, args.candidate_key) for file in files]
    if args.baseline_key and not args.against:
        sets += [(file, args.baseline_key) for file in files]
    for file, key in sets:
        answers.check_key(file, key)
    rows = [[row for row in file.rows if answers.answer(row, key) is not None] for file, key in sets]
    rows = [those[: args.max_comparisons] for those in rows]
    shown = [
        [Shown(row.messages, (str(answers.answer(row, key)),), row.reference) for row in those]
        for (_, key), those in zip(sets, rows)
    ]
    judge, budget = judge_for(args, template, [one for these in shown for one in these])
    if args.dry_run:
        return
    lines, grades = [], [ask_all(these, judge, args.concurrency) for these in shown]
    for (file, key), those, these, given in zip(sets, rows, shown, grades):
        name = file.name if len(files) > 1 or set(those[0].answers) == {answers.ONLY} else key
        lines.append(tables.grade_figures(args, file, name, those, these, given))
        for number, grade in enumerate(given if args.verbose else []):
            console.print(f"{number}: {grade.value or grade.status}: {grade.text}", markup=False)
    for line, (file, _) in zip(lines, sets):
        append_line(args.results_file, line | spent(judge, budget) | {"config": file.config})
    write_text(args.page, grades_page(lines, shown, grades))
    tables.show_grades(lines)
    show_end(args, judge, budget)


def show_verdicts(comparison: Comparison, verdicts: list[Verdict]) -> None:
    for verdict in verdicts:
        place = {True: " as Response 1", False: " as Response 2", None: ""}[verdict.candidate_first]
        shown = f"{comparison.candidate}{place}"
        console.print(f"{verdict.item}: {verdict.outcome} ({shown}): {verdict.text}", markup=False)


def show_end(args: argparse.Namespace, judge: Any, budget: Budget) -> None:
    if isinstance(judge, OpenAIJudge):
        cost = "" if budget.cost is None else f", ${budget.cost:.4f}{price_note(args, budget.prices)}"
        tokens = f"{budget.spent.input:,} tokens in, {budget.spent.output:,} out"
        console.print(f"paid for now: {budget.requests:,} requests, {tokens}{cost}", markup=False)
    console.print(f"appended to {args.results_file}; the verdicts to read: {args.page}", markup=False)


# -------------------------------------------------------------------------------------------------------------- command


def compare(args: argparse.Namespace, template: PromptTemplate) -> None:
    """Judge, append the results to the results file, and print them."""
    if template.responses == 1 and args.judge in ("toy", "recorded"):
        raise UserError(f"-j {args.judge} compares two responses; -p {args.protocol} has single ones graded by a model")
    (rate_answers if template.responses == 1 else compare_pairs)(args, template)


def main(arguments: Sequence[str] | None = None) -> None:
    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
        return int(text)

    def truth(text: str) -> bool:
        if text not in ("True", "False"):
            raise argparse.ArgumentTypeError(f"{text!r} is not True or False")
        return text == "True"

    parser = argparse.ArgumentParser(
        description="Judge two sets of answers against each other, or grade single answers.",
        epilog="The API key is OPENAI_API_KEY's. A rerun asks only what <results_file>.verdicts.jsonl does not hold.",
    )
    add = parser.add_argument
    add("-f", "--file", type=Path, nargs="+", required=True, help="answers: samples JSON of eval.py, and other layouts")
    add("--against", type=Path, help="the file of the other side; without it, two keys of the same file are compared")
    add("--round_robin", "--round-robin", action="store_true", help="compare each two of several files")
    add("-ck", "--candidate_key", default="policy", help="key of the answers to judge (policy)")
    add("-bk", "--baseline_key", help="key of the answers to beat (chosen; with --against, the candidate's)")
    add("-hk", "--history_key", default="prompt", help="key of the prompt in a sample without `messages` (prompt)")
    add("--questions", type=Path, help="question.jsonl of the model answers of Arena-Hard v0.1 or MT-Bench")
    add("--references", type=Path, help="JSONL of MT-Bench's reference answers")
    add("-mc", "--max_comparisons", "--max_comp", type=positive, help="judge the first N items only (all)")
    add("-r", "--results_file", type=Path, default=Path("results.jsonl"), help="gets one more line (results.jsonl)")
    add("--page", type=Path, help="HTML page of figures and verdicts (<results_file>.html)")
    add("-j", "--judge", default="gpt-4.1", help="a chat model (gpt-4.1); `toy`: the toy language's rules, offline; "
        "`recorded`: the verdicts that -f holds")  # fmt: skip
    add("-p", "--protocol", default="pairwise", help=f"{', '.join(PROTOCOLS)}, or path/to/file.py:Class (pairwise)")
    add("-l", "--labels", help='names of the two responses, "12": Response 1 and Response 2')
    add("--both_orders", "--both-orders", action=argparse.BooleanOptionalAction, help="show each pair twice, in both "
        "orders (with -p alpacaeval and arenahard, yes; else no)")  # fmt: skip
    add("-s", "--seed", type=int, default=0, help="decides which answer of an item is shown first (0)")
    add("--base_url", "--base-url", help="an OpenAI-compatible server that has the model, http://HOST:PORT/v1")
    add("--concurrency", type=positive, default=8, help="requests at a time (8)")
    add("-st", "--sleep_time", type=float, default=0, help="seconds between the starts of two requests: 0.2 sends at "
        "most 300 a minute (0)")  # fmt: skip
    add("--timeout", type=float, help="seconds to wait for a reply (60, and 0.1 for each of --max_tokens)")
    add("--max_tokens", "--max-tokens", type=positive, help="bound of a reply (256; alpacaeval 1, arenahard 4096, "
        "mtbench 2048)")  # fmt: skip
    add("--prices", type=float, nargs=2, metavar=("IN", "OUT"), help="US dollars per million tokens")
    add("--max_cost", "--max-cost", type=float, help="stop before more US dollars than this are spent")
    add("--dry_run", "--dry-run", action="store_true", help="say what would be asked and its cost; ask nothing")
    add("--official_lc", "--official-lc", action="store_true", help="AlpacaEval's own length-controlled win rate too; "
        "needs the extra `alpaca-eval`, its data from the Hub and all 805 answers")  # fmt: skip
    add("-v", "--verbose", nargs="?", type=truth, const=True, default=False, metavar="True", help="print every verdict")
    args = parser.parse_args(arguments)
    try:
        template = template_of(args)
        args.protocol = "recorded" if args.judge == "recorded" else args.protocol
        args.alpaca_eval = args.judge == "recorded" or isinstance(template, protocols.AlpacaEval)
        if args.official_lc and not args.alpaca_eval:
            raise UserError("--official_lc is for AlpacaEval's preferences: -p alpacaeval, or -j recorded")
        args.both_orders = template.both_orders if args.both_orders is None else args.both_orders
        args.timeout = args.timeout or 60 + template.max_tokens / 10
        args.prices = tuple(args.prices) if args.prices else None
        args.page = args.page or args.results_file.with_suffix(".html")
        compare(args, template)
    except (UserError, OSError) as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; every reply so far is kept, and the same command goes on\n")


def template_of(args: argparse.Namespace) -> PromptTemplate:
    """The protocol, with the command line's changes. Raises UserError."""
    found = PROTOCOLS.get(args.protocol)
    if found is None and ":" not in args.protocol:
        raise UserError(f"-p {args.protocol}: not one of {', '.join(PROTOCOLS)}{suggest(args.protocol, PROTOCOLS)}")
    template = (found or load_class(args.protocol, protocols, "-p"))()
    if not isinstance(template, PromptTemplate):
        raise UserError(f"-p {args.protocol}: not a subclass of protocols.PromptTemplate")
    if args.labels is not None:
        if len(set(args.labels)) != 2 or len(args.labels) != 2 or not args.labels.isalnum():
            raise UserError(f"-l {args.labels!r}: has to be two different letters or digits, as in 12 or AB")
        template.labels = args.labels
    template.max_tokens = args.max_tokens or template.max_tokens
    return template


if __name__ == "__main__":
    main()
