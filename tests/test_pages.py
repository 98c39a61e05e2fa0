"""What README.md and docs/ say holds: examples run, commands and options are there, links lead somewhere."""

import functools
import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch

from fedss_kernels.federated.algorithms import METHODS, Given
from fedss_kernels.federated.cli import COMMANDS, _command, _name, _parse
from fedss_kernels.federated.config import Config
from fedss_kernels.federated.plan import LISTS, Plan, read_preset
from fedss_kernels.federated.reports.parts_in_words import place

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
}
IN_OTHER_LIBRARIES = {
    "docs/integrations.md",
    "docs/sentence_transformers.md",
    "docs/transformers.md",
}  # tests of their own
EXAMPLES = {page: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for page, text in PAGES.items()}
COMMAND_LINES = [
    (page, line.split("  #")[0])
    for page, text in PAGES.items()
    for block in re.findall(r"```\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("fedss ")
]
SPOKEN_OF = [
    (page, words) for page, text in PAGES.items() for words in re.findall(r"`fedss ([a-z][^`]*)`", text)
]


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # saving from one process
@pytest.mark.parametrize(
    "page", [page for page in PAGES if EXAMPLES[page] and page not in IN_OTHER_LIBRARIES]
)
def test_examples_run_as_they_stand_but_for_the_number_of_rounds(page, tmp_path, monkeypatch, capsys):
    if page == "docs/federate.md":
        pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedss-kernels[flower]'")
    monkeypatch.chdir(tmp_path)
    methods = dict(METHODS)
    names: dict = {}
    try:
        for example in EXAMPLES[page]:
            exec(example.replace("rounds=20", "rounds=1, cohort=2"), names)
    finally:
        METHODS.clear()
        METHODS.update(methods)
    if "best" in names:
        assert names["best"].indices.shape == (4, 5) and names["loss"].isfinite()
    if page == "docs/simulate.md":
        assert (tmp_path / "net.pt").exists()
        first, own_data, *own_methods = capsys.readouterr().out.splitlines()
        assert len(first.split()) == 3
        assert re.fullmatch(
            r"<FederatedData mine, classification: 4 classes, 40 training and 8 test images, 4 clients> "
            r"<Result of fedss on mine after round 2: top-1 \d+\.\d%>",
            own_data,
        )
        for method, line in zip(
            ("fedprox", "decoys", "fedlc", "last_block", "fedpart"), own_methods, strict=True
        ):
            assert re.fullmatch(rf"<Result of {method} on glyphs after round 2: top-1 \d+\.\d%>", line)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore::FutureWarning")
def test_a_distributed_checkpoint_goes_on_with_the_counts_of_rows(tmp_path, monkeypatch):
    """As the page has it: a model made anew has after loading, and after more steps, the one's numbers."""
    monkeypatch.chdir(tmp_path)
    save, load = (example for example in EXAMPLES["docs/train.md"] if "dcp." in example)
    names: dict = {}
    exec(save, names)
    saved = names["model"], names["optimizer"]
    exec(load, names)
    loaded = names["model"], names["optimizer"]
    assert loaded[0] is not saved[0]
    for each in (saved, loaded):
        torch.manual_seed(0)
        for _ in range(3):
            names["train"](*each, torch.randn(32, 512), torch.randint(1000, (32,)))
    for mine, its in zip(saved[0].parameters(), loaded[0].parameters(), strict=True):
        assert torch.equal(mine, its)
        state, found = (optimizer.state[p] for (_, optimizer), p in ((saved, mine), (loaded, its)))
        assert state.keys() == found.keys() and all(torch.equal(state[name], found[name]) for name in state)


def test_the_preset_of_the_tutorial_is_one(tmp_path):
    (written,) = re.findall(r"```json\n(.*?)```", PAGES["docs/simulate.md"], re.DOTALL)
    (tmp_path / "own.json").write_text(written)
    found = read_preset(str(tmp_path / "own.json"))
    config = Config.from_dict(found["config"])
    plan = Plan(config, **{name: found[name] for name in LISTS if name in found}, own=found["own"])
    assert [case.label for case in plan.cases] == ["FedSS", "PosOnly", "FedSS, sticky"]
    assert plan.config_of(plan.cases[-1]).negatives == "sticky" and config.rounds == 100


def test_the_decoys_of_the_tutorial_leave_the_denominator_as_it_is_on_average():
    """Over all the draws of 2 from the 5 classes that are not the client's: exactly."""
    (example,) = (text for text in EXAMPLES["docs/simulate.md"] if "def request(" in text)
    names: dict = {}
    exec(example[: example.index("\nregister(")], names)
    logits, positives = torch.linspace(-1.0, 2.0, 7, dtype=torch.float64), torch.tensor([1, 4])
    sums = []
    for drawn in itertools.combinations([0, 2, 3, 5, 6], 2):
        found = names["request"](7, positives, torch.tensor(drawn), "negatives", decoys=3)
        sums.append((logits[found.class_ids] - found.log_expected_count).exp().sum())
    torch.testing.assert_close(torch.stack(sums).mean(), logits.exp().sum())


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_fedlc_of_the_tutorial_is_the_plain_softmax_where_all_counts_are_equal(similarity):
    (example,) = (text for text in EXAMPLES["docs/simulate.md"] if "def loss(" in text)
    names: dict = {}
    exec(example[: example.index("\nregister(")], names)
    random = torch.Generator().manual_seed(0)
    x, rows = (torch.randn(n, d, generator=random) for n, d in ((5, 4), (7, 4 + (similarity == "dot"))))
    target = torch.tensor([0, 6, 3, 3, 1])
    request = METHODS["full_softmax"].request(7, target.unique(), target[:0], "none")
    results = []
    for counts in (torch.full((7,), 3), torch.tensor([1, 1, 0, 9, 0, 0, 2])):
        given = Given(request, counts, 5.0, similarity)
        for loss in (given.sampled_softmax, functools.partial(names["loss"], given=given, tau=1.0)):
            trained = x.clone().requires_grad_(), rows.clone().requires_grad_()
            mean = loss(*trained, target)
            results.append((mean.detach(), *torch.autograd.grad(mean, trained)))
    plain, equal, _, unequal = results
    torch.testing.assert_close(equal, plain, rtol=1e-4, atol=1e-6)
    assert unequal[2][[2, 4, 5]].abs().max() < 1e-12  # nothing pulls at classes that it has no images of


@pytest.mark.parametrize("page, line", COMMAND_LINES)
def test_command_lines_are_understood(page, line):
    argv = shlex.split(line)[1:]
    assert _parse(_name(argv), _command(argv), argv[1:])


@pytest.mark.parametrize("page, words", SPOKEN_OF)
def test_commands_that_are_spoken_of_are_there_with_their_options(page, words, capsys):
    name = words.split()[0]
    assert name in COMMANDS
    with pytest.raises(SystemExit):
        _parse(f"fedss {name}", COMMANDS[name], ["--help"])
    shown = capsys.readouterr().out
    assert not [option for option in re.findall(r"--[a-z][a-z-]+", words) if option not in shown]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_that_are_there(page):
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", PAGES[page])
    here = (ROOT / page).parent
    assert not [link for link in links if "://" not in link and not (here / link).is_file()]


def test_the_table_of_methods_has_them_all_and_says_of_each_where_its_net_is():
    (table,) = re.findall(
        r"\| method \| the net \| class rows \|.*\n\| ---.*\n((?:\|.*\n)+)", PAGES["docs/simulate.md"]
    )
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    nets = {name: net for which, net, *_ in rows for name in re.findall(r"`([a-z_]+)`", which)}
    assert nets == {method.name: place(method).net for method in METHODS.values()}


def test_the_readme_is_short():
    assert PAGES["README.md"].count("\n") <= 150
