"""Compare two sets of answers with a judge: a chat model, or the rules of the toy language.

    python compare.py -f samples/my_experiment.json -mc 512 -bk chosen -ck policy -r results.jsonl
    python compare.py -f samples/fpo.json --against samples/dpo.json --dry_run
    python compare.py -f samples/fpo.json samples/dpo.json samples/kto.json --round_robin --both_orders
    python compare.py -f samples/fpo.json -j my-model --base_url http://localhost:8000/v1
    python compare.py -f samples/fpo.json --both_orders --write_pairs pairs.jsonl

Which answer the judge sees first is drawn for each pair; --both_orders judges each pair in both orders. docs/judging.md
explains the protocols and the results.
"""

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from judging import alpaca_eval_official, answers, labels, tables
from judging.answers import AnswerFile, AnswerSet, Comparison
from judging.cost import Budget, TokenUsage, find_prices, price_note
from judging.judge import (
    Judge,
    OpenAIJudge,
    Verdict,
    VerdictLog,
    draw_orders,
    judge_api_key,
    judge_pairs,
    run_judge,
    to_judge_input,
    toy_judge,
)
from judging.options import OFFLINE_JUDGES, build_parser, check_places, complete_settings, load_template
from judging.page import grades_page, verdict_page
from judging.protocols import JudgeInput, JudgeOutput, PromptTemplate
from sampling.openai_server import Server
from utils import UserError, append_json_line, console, error_console, file_digest, write_text

T = TypeVar("T")
V = TypeVar("V")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser(__doc__)
    args = parser.parse_args(arguments)
    try:
        template = load_template(args)
        complete_settings(args, template)
        compare(args, template)
    except (UserError, OSError) as error:
        error_console.print(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        error_console.print("stopped; every reply so far is saved: run the same command again to continue")
        sys.exit(130)


def compare(args: argparse.Namespace, template: PromptTemplate) -> None:
    """Judge the answers, append the results to the results file, write the page, and print the results."""
    check_places(args)
    if template.responses == 1:
        grade_answers(args, template)
    else:
        compare_pairs(args, template)


def compare_pairs(args: argparse.Namespace, template: PromptTemplate) -> None:
    comparisons = load_comparisons(args)
    with opened_judge(args, template, pairs_to_judge(args, comparisons)) as judge:
        if args.dry_run:
            return
        judged = [(comparison, judge_comparison(args, comparison, judge)) for comparison in comparisons]
        results, judged, problems = lines_of(partial(comparison_line, args), judged)
        comparisons, verdicts = map(list, zip(*judged))
        leaderboard, unranked = tables.leaderboard_rows(comparisons, verdicts) if len(comparisons) > 1 else ([], "")
        shared = {"leaderboard": leaderboard} if leaderboard else {}
        added = [append_result(args, judge, own | shared, one.config) for own, one in zip(results, comparisons)]
        write_text(args.page, verdict_page(results, comparisons, verdicts, leaderboard))
        if args.verbose:
            print_verdicts(comparisons, verdicts)
        tables.print_comparisons(results, leaderboard)
        if unranked:
            console.print(f"no leaderboard: {unranked}")
        if args.write_pairs:
            problems += write_labels(args, args.write_pairs, labels.pairs_of_verdicts(comparisons, verdicts))
        print_end(args, judge, problems, sum(added))


def grade_answers(args: argparse.Namespace, template: PromptTemplate) -> None:
    answer_sets = load_answer_sets(args)
    all_inputs = [judge_input for answer_set in answer_sets for judge_input in answer_set.judge_inputs()]
    with opened_judge(args, template, all_inputs) as judge:
        if args.dry_run:
            return
        graded = [(answers, run_judge(answers.judge_inputs(), judge, args.concurrency)) for answers in answer_sets]
        settings = {"judge": args.judge, "protocol": args.protocol}
        results, graded, problems = lines_of(partial(tables.grade_results, **settings), graded)
        answer_sets, grades = map(list, zip(*graded))
        added = [append_result(args, judge, own, one.file.config) for own, one in zip(results, answer_sets)]
        write_text(args.page, grades_page(results, [one.judge_inputs() for one in answer_sets], grades))
        if args.verbose:
            print_all_grades(grades)
        tables.print_grades(results)
        if args.write_binary:
            labelled = labels.labels_of_grades(list(zip(answer_sets, grades)), args.threshold)
            problems += write_labels(args, args.write_binary, labelled)
        print_end(args, judge, problems, sum(added))


def lines_of(
    line: Callable[..., dict[str, Any]], judged: Sequence[tuple[T, list[V]]]
) -> tuple[list[dict[str, Any]], list[tuple[T, list[V]]], list[str]]:
    """Lines of the results file, what they are on, and what is wrong with the rest of what was judged.

    Raises UserError if there is no line.
    """
    lines, kept, problems = [], [], []
    for one in judged:
        try:
            lines.append(line(*one))
            kept.append(one)
        except UserError as error:
            problems.append(str(error))
    if not lines:
        raise UserError("\n".join(problems))
    return lines, kept, problems


# -------------------------------------------------------------------------------------------------------------- answers


def load_comparisons(args: argparse.Namespace) -> list[Comparison]:
    """The pairs of models to compare, with their items. Raises UserError if the files cannot be compared."""
    if args.judge == "recorded":
        comparisons = [answers.read_recorded(path) for path in args.file]
    else:
        comparisons = pair_models(args, load_files(args))
    (pair, times), *_ = Counter((one.candidate, one.baseline) for one in comparisons).most_common(1)
    if times > 1:
        raise UserError(f"{times} of the files hold verdicts on {pair[0]} against {pair[1]}: name only one of them")
    comparisons = [answers.first_items(comparison, args.max_comparisons) for comparison in comparisons]
    if args.official_lc:
        for comparison in comparisons:
            alpaca_eval_official.require_official_set(comparison)
    elif args.alpaca_eval and any(map(alpaca_eval_official.is_official_set, comparisons)):
        console.print("these are AlpacaEval's 805 instructions: --official_lc adds its own length-controlled rate")
    return comparisons


def load_files(args: argparse.Namespace) -> list[AnswerFile]:
    """The files of -f, followed by the file of --against."""
    paths = [*args.file, *([args.against] if args.against else [])]
    options = {"history_key": args.history_key, "questions": args.questions, "references": args.references}
    return answers.with_unique_names([answers.read_answers(path, **options) for path in paths])


def pair_models(args: argparse.Namespace, files: list[AnswerFile]) -> list[Comparison]:
    """Each file against --against, or its candidate against its baseline, or, with --round_robin, every two files."""
    candidate, baseline = args.candidate_key, args.baseline_key
    comparisons = []
    if args.against:
        *files, other = files
        comparisons = [answers.pair_files(file, other, candidate, baseline or candidate) for file in files]
    elif not args.round_robin or len(files) == 1:
        comparisons = [answers.pair_keys(file, candidate, baseline or "chosen") for file in files]
        if len(files) > 1:  # all candidates have the same key, so their runs name them
            comparisons = [one._replace(candidate=file.name) for one, file in zip(comparisons, files)]
    if args.round_robin:
        comparisons += [answers.pair_files(*two, candidate, candidate) for two in itertools.combinations(files, 2)]
    return comparisons


def load_answer_sets(args: argparse.Namespace) -> list[AnswerSet]:
    """The answers to grade: the candidate's of each file, and the baseline's if -bk names a key of these files."""
    keys = [args.candidate_key, *([args.baseline_key] if args.baseline_key and not args.against else [])]
    return answers.answer_sets(load_files(args), keys, args.max_comparisons)


# -------------------------------------------------------------------------------------------------------------- judging


def pairs_to_judge(args: argparse.Namespace, comparisons: list[Comparison]) -> list[JudgeInput]:
    return [
        to_judge_input(comparison.items[index], candidate_first)
        for comparison in comparisons
        for index, candidate_first in draw_orders(comparison.items, args.seed, args.both_orders)
    ]


@contextmanager
def opened_judge(args: argparse.Namespace, template: PromptTemplate, judge_inputs: list[JudgeInput]) -> Iterator[Judge]:
    """The judge, after printing what it would cost. Raises UserError before any request is sent."""
    prices = find_prices(args.judge, args.prices, args.base_url)
    if args.max_cost is not None and prices is None:
        raise UserError(f"--max_cost: no prices are known for {args.judge!r}; set them with --prices INPUT OUTPUT")
    if args.judge in OFFLINE_JUDGES:
        if args.dry_run:
            console.print(f"{len(judge_inputs):,} verdicts by {args.judge}: no requests")
        yield toy_judge
        return
    key = "" if args.dry_run else judge_api_key(args.judge, args.base_url)
    server = Server(args.base_url, key, timeout=args.timeout, pause=args.sleep_time)
    with VerdictLog(args.verdicts_file.resolve(), writes=not args.dry_run) as log:
        judge = OpenAIJudge(args.judge, template, log, Budget(prices, args.max_cost), server)
        print_estimate(args, judge, judge_inputs)
        yield judge


def judge_comparison(args: argparse.Namespace, comparison: Comparison, judge: Judge) -> list[Verdict]:
    if comparison.verdicts is not None:
        return comparison.verdicts
    return judge_pairs(comparison.items, judge, args.seed, args.concurrency, args.both_orders)


# -------------------------------------------------------------------------------------------------------------- results


def comparison_line(args: argparse.Namespace, comparison: Comparison, verdicts: list[Verdict]) -> dict[str, Any]:
    """One line of the results file."""
    settings = {"judge": args.judge, "protocol": args.protocol, "seed": args.seed}
    result = tables.comparison_results(comparison, verdicts, **settings)
    if args.alpaca_eval:
        result |= tables.alpaca_eval_results(comparison, verdicts, args.official_lc)
    return result


def append_result(args: argparse.Namespace, judge: Judge, result: dict[str, Any], config: dict[str, Any]) -> bool:
    """Add a line to the results file, unless it is there already, as after a command that was killed later. Whether it
    was added."""
    usage = judge.usage_fields() if isinstance(judge, OpenAIJudge) else {}
    added = append_json_line(args.results_file, result | usage | {"config": config}, but_for=("date", *usage))
    if not added:
        console.print(f"{args.results_file} has this line on {result['exp_name']} already")
    return added


def write_labels(args: argparse.Namespace, path: Path, found: labels.Labels) -> list[str]:
    """Write training data and print its figures; if there is none, why."""
    keys = ("judge", "protocol", "labels", "both_orders", "seed", "threshold", "candidate_key", "baseline_key")
    read = [*args.file, *filter(None, (args.against,))]
    how = {key: getattr(args, key) for key in keys} | {"files": {str(file): file_digest(file) for file in read}}
    try:
        labels.publish(path, found, how)
    except UserError as error:
        return [str(error)]
    return []


def print_estimate(args: argparse.Namespace, judge: OpenAIJudge, judge_inputs: list[JudgeInput]) -> None:
    """Print the number of requests and their cost; with --dry_run, the first request too."""
    to_send = judge.inputs_to_send(judge_inputs)
    estimates = [judge.estimate(judge_input) for judge_input in to_send]
    total = TokenUsage(sum(one.input for one in estimates), sum(one.output for one in estimates))
    prices = judge.budget.prices
    cost = f", at most ${total.cost(prices):.2f}" if prices else ""
    console.print(
        f"{len(to_send):,} requests to {args.judge} ({len(judge_inputs) - len(to_send):,} verdicts need none): about "
        f"{total.input:,} tokens in, at most {total.output:,} out{cost}{price_note(prices, bool(args.prices))}"
    )
    if args.dry_run and to_send:
        for message in judge.template.messages(to_send[0]):
            console.print(f"[{message['role']}]\n{message['content']}")


def print_verdicts(comparisons: list[Comparison], verdicts: list[list[Verdict]]) -> None:
    places = {True: " as Response 1", False: " as Response 2", None: ""}
    for comparison, group in zip(comparisons, verdicts):
        for verdict in group:
            candidate = f"{comparison.candidate}{places[verdict.candidate_first]}"
            console.print(f"{verdict.item}: {verdict.outcome} ({candidate}): {verdict.text}")


def print_all_grades(grades: list[list[JudgeOutput]]) -> None:
    for group in grades:
        for index, grade in enumerate(group):
            console.print(f"{index}: {grade.value or grade.status}: {grade.text}")


def print_end(args: argparse.Namespace, judge: Judge, problems: list[str], added: int) -> None:
    """Say what was `added` to the results file, and where the rest is. Raises UserError for the problems."""
    if isinstance(judge, OpenAIJudge):
        budget = judge.budget
        note = price_note(budget.prices, bool(args.prices))
        cost = "" if budget.cost is None else f", ${budget.cost:.4f}{note}"
        tokens = f"{budget.used.input:,} tokens in, {budget.used.output:,} out"
        console.print(f"this run: {budget.requests:,} requests, {tokens}{cost}")
    where = f"results appended to {args.results_file}" if added else f"{args.results_file} is as it was"
    console.print(f"{where}; verdicts to read in {args.page}")
    if problems:
        raise UserError("\n".join(problems))


if __name__ == "__main__":
    main()
