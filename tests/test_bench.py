"""The harness of the benchmarks: its figures, its files, its page. No engine is started."""

import json
import sys
import types
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from benchmarks import client, command, plots, report, side_by_side, working_set
from benchmarks.gguf_files import write_adapter, write_model
from benchmarks.harness import Plan, Record, carried_out, in_turn
from benchmarks.results import LEAST_PAIRS, RESULTS, Figure, Pair, Run, Spread, Target, told
from benchmarks.suites import SUITES, Suite
from r3mes_vllm.cli.main import app
from r3mes_vllm.errors import ConfigError
from tests import echo_worker, tiny
from tests.backend.stand_ins import serving
from tests.peers import installed

SUITE = Suite("made-up", "What is made up.", "tests.made_up_suite", model=False)


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Its `run` is the test's."""
    module = types.ModuleType(SUITE.module)
    monkeypatch.setitem(sys.modules, SUITE.module, module)
    monkeypatch.setitem(SUITES, SUITE.name, SUITE)
    return module


def two_figures(plan: Plan, record: Record) -> None:
    record.describe("greedy", rank=8)
    for turn in range(plan.rounds):
        for side in (1, 2):
            record.pair(
                f"{side} adapters",
                "tokens/s",
                ours=90.0 + turn,
                peer=100.0,
                sides=("ours", "stock"),
                target=Target(at_least=0.91),
                chart="Kept",
                x=side,
            )


def stops_in_the_third(plan: Plan, record: Record) -> None:
    two_figures(Plan(2), record)
    raise KeyboardInterrupt


def fails_in_the_third(plan: Plan, record: Record) -> None:
    two_figures(Plan(2), record)
    raise RuntimeError("/a/path/of/this/machine")


def quiet(text: str) -> None:
    pass


def ran(module: types.ModuleType, what: object, rounds: int = 5) -> Run:
    module.run = what  # type: ignore[attr-defined]
    return carried_out(SUITE, Plan(rounds), quiet)[0]


def test_the_ratio_is_of_each_pair_and_its_median_of_those() -> None:
    pairs = [Pair(ours=1, peer=2), Pair(ours=9, peer=3), Pair(ours=4, peer=4)]
    figure = Figure(name="a", unit="s", sides=("x", "y"), better="lower", pairs=pairs)
    assert figure.ratio == Spread(median=1.0, least=0.5, most=3.0)
    assert figure.ours == Spread(median=4, least=1, most=9)
    assert figure.added == Spread(median=0, least=-1, most=6)


def test_a_side_that_never_got_so_far_has_no_ratio() -> None:
    pairs = [Pair(ours=1, peer=None), Pair(ours=1, peer=0)]
    target = Target(at_least=0)
    figure = Figure(
        name="a", unit="s", sides=("x", "y"), better="lower", pairs=pairs, target=target
    )
    assert figure.ratio is None
    assert figure.met is None
    assert Spread.of([]) is None


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (Target(at_least=0.5), True),
        (Target(at_least=0.51), False),
        (Target(at_most=0.5), True),
        (Target(at_most=0.49), False),
        (Target(of="ours", at_most=1), True),
        (Target(of="ours", at_most=0.9), False),
        (Target(of="added", at_most=-1), True),
        (Target(of="added", at_most=-1.1), False),
        (None, None),
    ],
)
def test_a_target_is_held_against_its_median(target: Target | None, met: bool | None) -> None:
    figure = Figure(
        name="a",
        unit="s",
        sides=("x", "y"),
        better="lower",
        target=target,
        pairs=[Pair(ours=1, peer=2)],
    )
    assert figure.met is met


def test_who_is_first_alternates() -> None:
    assert [in_turn(turn, "ab") for turn in range(4)] == ["ab", "ba", "ab", "ba"]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.0412, "0.0412"), (1.5, "1.5"), (12345.6, "12,346")]
)
def test_numbers_have_no_exponent(value: float, text: str) -> None:
    assert told(value) == text


def test_a_run_says_what_decided_it(suite: types.ModuleType) -> None:
    run = ran(suite, two_figures)
    assert run.ended == "complete"
    assert (run.seed, run.rounds, run.sampler, run.settings) == (0, 5, "greedy", {"rank": 8})
    assert {"python", "torch", "r3mes-vllm"} <= set(run.versions)
    assert any(name.startswith("vllm") for name in run.versions)
    assert run.machine.cores >= 1
    assert run.machine.processor
    assert [len(figure.pairs) for figure in run.figures] == [5, 5]
    assert [figure.met for figure in run.figures] == [True, True]


def test_what_is_written_is_read_again(suite: types.ModuleType, tmp_path: Path) -> None:
    run = ran(suite, two_figures)
    path = run.write(tmp_path)
    assert path.name.startswith("made-up-")
    assert Run.read(path) == run
    (figure, _) = json.loads(path.read_text())["figures"]
    assert figure["ratio"]["median"] == 0.92
    assert figure["pairs"][0] == {"ours": 90.0, "peer": 100.0, "added": -10.0, "ratio": 0.9}


@pytest.mark.parametrize("edit", ['"median": 0.92|"median": 0.99', '"ours": 90.0|"ours": 99.0'])
def test_a_file_edited_by_hand_is_refused(
    edit: str, suite: types.ModuleType, tmp_path: Path
) -> None:
    path = ran(suite, two_figures).write(tmp_path)
    before, after = edit.split("|")
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))
    with pytest.raises(ValueError, match="edited by hand"):
        Run.read(path)


def test_what_is_no_run_is_refused_with_its_field(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"suite": "kept"}')
    with pytest.raises(ValueError, match=r"x\.json: about"):
        report.read(tmp_path)


def test_ctrl_c_keeps_the_pairs_measured_so_far(
    suite: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite.run = stops_in_the_third  # type: ignore[attr-defined]
    assert command.bench(SUITE.name, out=tmp_path) == 130
    (run,) = report.read(tmp_path)
    assert run.ended == "interrupted"
    assert [len(figure.pairs) for figure in run.figures] == [2, 2]
    page = (tmp_path / report.PAGE).read_text()
    assert "Not complete: interrupted" in page
    assert f"fewer than {LEAST_PAIRS} pairs" in page
    assert "2/5 1 adapters, tokens/s: ours 91" in capsys.readouterr().err


def test_a_suite_that_fails_keeps_its_pairs_and_no_path(
    suite: types.ModuleType, tmp_path: Path
) -> None:
    suite.run = fails_in_the_third  # type: ignore[attr-defined]
    assert command.bench(SUITE.name, out=tmp_path) == 1
    (path,) = tmp_path.glob("*.json")
    assert Run.read(path).ended == "failed: RuntimeError"
    assert "/a/path" not in path.read_text()


def test_a_program_that_is_missing_does_not_lose_the_pairs(suite: types.ModuleType) -> None:
    def wants_npm(plan: Plan, record: Record) -> None:
        two_figures(Plan(2), record)
        installed.npm("no-such-package")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.which", lambda name: None)
        run = ran(suite, wants_npm)
    assert run.ended == "failed: RuntimeError"
    assert [len(figure.pairs) for figure in run.figures] == [2, 2]


def test_a_run_of_some_cases_says_so_and_hides_no_whole_one(suite: types.ModuleType) -> None:
    suite.run = two_figures  # type: ignore[attr-defined]
    part, _ = carried_out(SUITE, Plan(5, only="1 adapters"), quiet)
    assert part.settings["only"] == "1 adapters"
    whole = ran(suite, two_figures)
    late, early = (
        part.model_copy(update={"started": part.started.replace(year=year)})
        for year in (9000, 1000)
    )
    assert report.shown([whole, late]) == [whole, late]
    assert report.shown([whole, early]) == [whole]
    assert report.shown([late]) == [late]
    less = whole.model_copy(
        update={"started": whole.started.replace(year=9000), "settings": {"left_out": "daemon"}}
    )
    assert report.shown([whole, less])[0] == whole
    block = "<!-- results: made-up -->\n<!-- end -->\n"
    assert "1000" not in report.explained(block, [whole, early])
    few = whole.model_copy(update={"rounds": 1, "started": late.started})
    assert report.shown([whole, few])[0] == whole
    assert "**only 1 adapters**" in report.explained(block, [late])

    rest = whole.model_copy(update={"settings": {"only": "2 adapters"}})
    assert report.shown([late, part, rest]) == [rest, late]
    both = report.explained(block, [late, part, rest])
    assert both.count("**only 2 adapters**") == both.count("**only 1 adapters**") == 1


@pytest.mark.parametrize(
    ("part", "value"), [(0.5, 5), (0.51, 6), (0.9, 9), (0.95, 10), (0.99, 10), (1.0, 10)]
)
def test_a_quantile_is_the_least_that_so_many_do_not_exceed(part: float, value: int) -> None:
    assert client.at([*range(10, 0, -1)], part) == value


PIECE = 'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'
LAST = 'data: {"choices": [{"text": "b", "finish_reason": "length"}]}\n\n'
USAGE = 'data: {"choices": [], "usage": {"completion_tokens": 7}}\n\n'


@pytest.mark.parametrize(
    ("sent", "error", "tokens"),
    [
        (PIECE + LAST + USAGE + "data: [DONE]\n\n", "", 7),
        (PIECE + PIECE, "it ended by nothing after 0 tokens", 0),
        (PIECE + LAST.replace("length", "abort") + USAGE, "it ended by abort after 7", 7),
        (PIECE + LAST + USAGE.replace("7", "6"), "it ended by length after 6", 6),
        (PIECE + 'data: {"error": {"message": "the node died"}}\n\n', "the node died", 0),
        (PIECE + "data: {broken\n\n", "JSONDecodeError", 0),
        ("data: [DONE]\n\n", "it ended by nothing", 0),
    ],
)
async def test_an_answer_is_whole_or_an_error(sent: str, error: str, tokens: int) -> None:
    app = Starlette(
        routes=[Route("/v1/completions", lambda _: PlainTextResponse(sent), methods=["POST"])]
    )
    async with serving(app) as url, client.session() as http:
        answer = await client.ask(http, url, client.Asked("legal", 4, 7))
    assert error in answer.error
    assert bool(error) == bool(answer.error)
    assert answer.tokens == tokens


def test_the_page_shows_the_newest_run_of_each_group(suite: types.ModuleType) -> None:
    older = ran(suite, two_figures)
    newer = older.model_copy(update={"started": older.started.replace(year=9000), "seed": 77})
    other = older.model_copy(
        update={"machine": older.machine.model_copy(update={"gpu": "NVIDIA X"})}
    )
    page = report.page_of([newer, other, older])
    assert page.count("seed 77") == 1
    assert page.count("seed 0") == 1
    assert "| NVIDIA X | made-up |" in page
    row = "| 1 adapters: ours / stock | tokens/s, higher is better | 92 (90 to 94) | 100 |"
    assert f"{row} 0.92 (0.9 to 0.94) | \u2265 0.91 | yes | 5 |" in page


def test_a_quick_run_has_no_targets_and_is_written_nowhere(
    suite: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    suite.run = two_figures  # type: ignore[attr-defined]
    assert command.bench(SUITE.name, quick=True) == 0
    assert not (tmp_path / "results").exists()
    assert command.bench(SUITE.name, quick=True, out=tmp_path) == 0
    (run,) = report.read(tmp_path)
    assert [figure.target for figure in run.figures] == [None, None]
    assert "says nothing about speed" in (tmp_path / report.PAGE).read_text()


def test_the_page_of_results_is_what_its_files_give() -> None:
    runs = report.read(RESULTS)
    assert (RESULTS / report.PAGE).read_text() == report.page_of(runs)
    page = report.EXPLAINED.read_text()
    assert page == report.explained(page, runs)
    assert all(f"<!-- results: {suite} -->" in page for suite in SUITES)


def test_the_page_that_explains_has_the_newest_complete_run(suite: types.ModuleType) -> None:
    run = ran(suite, two_figures)
    late = run.started.replace(year=9000)
    others = {"quick": True}, {"ended": "interrupted"}
    runs = [run, *(run.model_copy(update={"started": late, **it}) for it in others)]
    page = report.explained("a\n<!-- results: made-up -->\nold\n<!-- end -->\nb\n", runs)
    assert page.startswith("a\n<!-- results: made-up -->\n")
    assert "old" not in page
    assert page.endswith("<!-- end -->\nb\n")
    assert page.count("| 1 adapters: ours / stock |") == 1
    assert "9000" not in page
    assert report.explained(page, runs) == page


def test_plots_are_drawn(suite: types.ModuleType, tmp_path: Path) -> None:
    run = ran(suite, two_figures)
    files = plots.drawn(run, tmp_path)
    if not plots.available():
        assert files == []
        return
    assert sorted(path.suffix for path in files) == [".png", ".svg"]
    assert all(path.name in report.section(run) for path in files)
    before = [path.read_bytes() for path in files]
    assert [path.read_bytes() for path in plots.drawn(run, tmp_path)] == before


def test_llama_cpp_gets_the_same_weights(tmp_path: Path) -> None:
    """Transformers reads its format too, and orders a head's values as llama.cpp computes them."""
    model = tiny.make_model(tmp_path / "model")
    write_model(model, tmp_path / "model.gguf", torch.float32)
    tokens = torch.arange(20, 60).reshape(1, -1)
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)(tokens).logits
        for folder, options in ((model, {}), (tmp_path, {"gguf_file": "model.gguf"}))
    ]
    assert torch.equal(*logits)

    adapter = tiny.make_adapter(tmp_path / "adapter", seed=1)
    write_adapter(adapter, model, tmp_path / "adapter.gguf", torch.float32)
    written = {it.name: it.data for it in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    given = load_file(adapter / "adapter_model.safetensors")
    assert len(written) == len(given)
    prefix = "base_model.model.model.layers.1.self_attn"
    assert np.array_equal(
        written["blk.1.attn_output.weight.lora_b"], given[f"{prefix}.o_proj.lora_B.weight"]
    )


def test_every_suite_is_there() -> None:
    for suite in SUITES.values():
        path = Path(command.__file__).parent / f"{suite.module.rpartition('.')[2]}.py"
        assert "\ndef run(plan: Plan, record: Record) -> None:\n" in path.read_text(), suite.name
        assert suite.rounds >= LEAST_PAIRS


def test_the_command_lists_and_refuses(capfd: pytest.CaptureFixture[str]) -> None:
    listed = CliRunner().invoke(app, ["bench", "list"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in SUITES)
    refused = CliRunner().invoke(app, ["bench", "nothing"])
    assert refused.exit_code == 2
    assert "r3mes-vllm bench list" in refused.output
    with pytest.raises(ConfigError):
        command.bench("kept", model="nothing")


def test_outside_a_checkout_it_says_where_to_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from r3mes_vllm.cli import bench

    monkeypatch.setattr(bench, "_ROOT", tmp_path)
    refused = CliRunner().invoke(app, ["bench", "list"])
    assert refused.exit_code == 2
    assert "checkout" in refused.output


@pytest.mark.parametrize("shape", working_set.SHAPES)
def test_a_workload_is_the_same_for_a_seed_and_names_what_there_is(shape: str) -> None:
    chosen = working_set.chosen(shape, 10, 1000, 7)
    assert chosen == working_set.chosen(shape, 10, 1000, 7)
    assert len(chosen) == 1000
    assert set(chosen) <= set(range(10))


def test_the_mixes_are_punicas_and_zipfs() -> None:
    assert set(working_set.chosen("identical", 10, 100, 0)) == {0}
    assert working_set.chosen("distinct", 10, 20, 0) == [*range(10), *range(10)]
    zipf = working_set.chosen("zipf", 10, 20_000, 0)
    assert zipf.count(0) / zipf.count(1) == pytest.approx(2, rel=0.1)
    skewed = working_set.chosen("skewed", 10, 20_000, 0)
    assert skewed.count(0) / skewed.count(1) == pytest.approx(1.5, rel=0.1)


def test_the_next_side_is_asked_when_the_last_one_has_left_its_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("benchmarks.side_by_side.time.sleep", slept.append)
    workers = [side_by_side.Worker(echo_worker.__name__, None, "none") for _ in range(2)]
    one, other = workers
    try:
        for it in (one, one, other, one):
            it.ask("hello")
    finally:
        for it in workers:
            it.__exit__(None)
    assert slept == [side_by_side.SETTLES_S] * 2


def test_a_folder_that_takes_no_result_is_said_before_anything_is_measured(
    suite: types.ModuleType, tmp_path: Path
) -> None:
    def measured(plan: Plan, record: Record) -> None:
        raise AssertionError("hours were spent")

    suite.run = measured  # type: ignore[attr-defined]
    (file := tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="no result can be written"):
        command.bench(SUITE.name, out=file / "results")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_result_that_cannot_be_kept_is_said(
    as_json: bool,
    suite: types.ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(run: Run, folder: Path) -> Path:
        raise OSError(28, "No space left on device")

    suite.run = two_figures  # type: ignore[attr-defined]
    monkeypatch.setattr(Run, "write", full)
    assert command.bench(SUITE.name, out=tmp_path, as_json=as_json) == 1
    told = capsys.readouterr()
    assert "No space left" in told.err
    assert told.out.count('"suite": "made-up"') == 1


def test_a_commit_that_comes_while_a_suite_runs_is_not_what_ran(
    suite: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = iter(["a", "a", "b", "b"])
    monkeypatch.setattr(
        "benchmarks.harness._git", lambda *it: "" if it[0] == "status" else next(commits)
    )
    run = ran(suite, two_figures)
    assert (run.commit, run.clean) == ("a", False)
