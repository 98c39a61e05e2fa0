"""Costs of layer-wise learning stage by stage, of a net whose blocks can be counted by hand."""

import csv

import pytest
import torch
from torch import nn

from fedss_kernels.federated import Config, cli
from fedss_kernels.federated.algorithms import METHODS
from fedss_kernels.federated.figures.costs import by_block, of_model, plot
from fedss_kernels.federated.models import build_model
from fedss_kernels.federated.models.blocks import named_blocks
from fedss_kernels.federated.probes import costs, stage_costs

B, WIDTH, L = 64, 32, 4
MADE = B * WIDTH * 4  # bytes of what a layer makes


def _linear() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(WIDTH, WIDTH), nn.ReLU()


class Flat(nn.Module):
    """A stem of 16 pixels to WIDTH, then L blocks Linear, ReLU, Linear, ReLU."""

    def __init__(self, blocks: int = L) -> None:
        super().__init__()
        self.blocks = named_blocks(
            stem=nn.Sequential(nn.Flatten(), nn.Linear(16, WIDTH)),
            **{f"block{i}": nn.Sequential(*_linear(), *_linear()) for i in range(1, blocks + 1)},
        )
        self.pool = nn.Identity()


IMAGES = torch.rand(B, 1, 4, 4)
STEM, BLOCK = (16 + 1) * WIDTH * 4, 2 * (WIDTH + 1) * WIDTH * 4  # bytes of parameters


def measure(net, images=IMAGES, budget=None):
    return stage_costs.measure(net, images, by_block(len(net.blocks) - 1, budget))


def test_a_stage_saves_what_its_block_makes():
    lines = measure(Flat())
    assert [line.stage for line in lines] == [1, 2, 3, 4]
    # What each ReLU makes, and what comes from before as the first layer's input.
    assert [line.costs.saved for line in lines] == [3 * MADE] * L
    assert [line.held for line in lines] == [STEM + stage * BLOCK for stage in range(1, L + 1)]
    assert [line.trained for line in lines] == [STEM + BLOCK, BLOCK, BLOCK, BLOCK]


def test_a_budget_holds_so_many_blocks():
    lines = measure(Flat(), budget=2)
    assert [line.held for line in lines] == [STEM + BLOCK, *[STEM + 2 * BLOCK] * 3]
    of_all = measure(Flat())
    assert [line.costs.multiply_adds for line in lines[1:]] == [of_all[1].costs.multiply_adds] * 3


def test_multiply_adds_by_stage_are_the_papers_but_for_the_stem():
    """Of many blocks the stem is little."""
    net, blocks = Flat(12), 12
    whole = stage_costs.end_to_end(net, IMAGES).costs.multiply_adds
    for line in measure(net):
        share = line.costs.multiply_adds / whole
        assert share == pytest.approx(costs.compute_share(line.stage, blocks), abs=0.02)
    one = B * WIDTH * WIDTH
    assert whole == 12 * 2 * 3 * one + 2 * B * 16 * WIDTH
    last = measure(net)[-1].costs.multiply_adds
    assert last == (11 * 2 + 5) * one + B * 16 * WIDTH  # none to what comes from before


def test_end_to_end_saves_all_and_with_checkpoints_what_goes_into_blocks():
    plain = stage_costs.end_to_end(Flat(), IMAGES)
    again = stage_costs.end_to_end(Flat(), IMAGES, checkpointed=True)
    assert plain.costs.saved == (2 * L + 1) * MADE and again.costs.saved == (L + 1) * MADE
    assert plain.held == plain.trained == STEM + L * BLOCK
    assert again.costs.peak < plain.costs.peak and again.costs.multiply_adds > plain.costs.multiply_adds


def test_the_net_is_left_as_it_is():
    net = Flat().requires_grad_(False).eval()
    before = [p.clone() for p in net.parameters()]
    measure(net), stage_costs.end_to_end(net, IMAGES)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, net.parameters(), strict=True))
    assert not net.training and not any(p.requires_grad for p in net.parameters())


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("model", "embedding_dim"),
    [("vit:patch=4", 96), ("vit:patch=8", 96), ("isotropic", 192), ("isotropic:depth=16", 192)],
)
def test_nets_of_equal_blocks_take_a_fifth_of_the_memory_in_the_worst_stage(model, embedding_dim):
    """With a budget of half the blocks, and of many even without. Of 25 images in two views.

    Multiply-adds and traffic are nearly those of the paper; checkpoints give much of the memory too.
    """
    net, images = build_model(model, embedding_dim, 0), torch.rand(50, 3, 32, 32)
    layers = len(net.blocks) - 1
    budget = layers // 2
    cases, whole = of_model(net, images, budget)
    of_all, again = whole["end to end"], whole["end to end, with checkpoints"]
    for name, held in (("layer-wise", None), (f"layer-wise, budget {budget}", budget)):
        lines = cases[name]
        assert 5 * max(line.costs.saved for line in lines) <= of_all.costs.saved
        if held or model != "isotropic":
            assert 5 * max(line.memory for line in lines) <= of_all.memory
        assert max(line.memory for line in lines) < again.memory < of_all.memory / 2
        for line in lines:
            compute = costs.compute_share(line.stage, layers, held)
            traffic = costs.traffic_share(line.stage, layers, held)
            assert line.costs.multiply_adds / of_all.costs.multiply_adds == pytest.approx(compute, abs=0.02)
            assert line.traffic / of_all.traffic == pytest.approx(traffic, abs=0.02)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="depth_budget: expected an integer of at least 2, got 1"):
        measure(Flat(), budget=1)
    with pytest.raises(ValueError, match="model: expected a net of several blocks, got 0 of them"):
        stage_costs.measure(nn.Linear(2, 2), IMAGES, [])


def test_blocks_that_go_on_being_trained_and_several_at_a_time_cost_what_they_are():
    """Two stages of two blocks; without freezing the second trains all four."""
    stages = {}
    for freeze in ("yes", "no"):
        config = Config(data="own", method="layerwise", rounds=7, stages=2, freeze=freeze)
        schedule = METHODS["layerwise"].schedule(config, L + 2)
        parts = stage_costs.parts_of_stages(schedule, config.rounds)
        stages[freeze] = stage_costs.measure(Flat(), IMAGES, parts)
    whole = stage_costs.end_to_end(Flat(), IMAGES)
    (first, second), (_, growing) = stages["yes"], stages["no"]
    assert first.held == first.trained == STEM + 2 * BLOCK
    assert second.held == whole.held and second.trained == 2 * BLOCK
    assert first.costs.saved == second.costs.saved == 5 * MADE
    assert (growing.trained, growing.costs.saved) == (whole.trained, whole.costs.saved)


def test_the_command_writes_table_and_plot(tmp_path, capsys):
    out = tmp_path / "out"
    asked = ["--model=isotropic:depth=4", "--embedding-dim=32", "--images=4", "--side=8", "--depth-budget=2"]
    assert cli.main(["costs", *asked, f"--out={out}"]) == 0
    with (out / "costs.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    cases = ["end to end", "end to end, with checkpoints", *["layer-wise"] * 4, *["layer-wise, budget 2"] * 4]
    assert [line["case"] for line in lines] == cases
    assert [int(line["stage"]) for line in lines] == [4, 4, 1, 2, 3, 4, 1, 2, 3, 4]
    of_all, again, *of_stages = ((line["blocks_multiply_adds"], line["blocks_traffic"]) for line in lines)
    assert again == ("", "")
    for stage, (found, moved) in enumerate(of_stages[:4], 1):
        assert 12 * int(found) == (stage + 2) * int(of_all[0]) and 8 * int(moved) == (stage + 1) * int(
            of_all[1]
        )
    table = (out / "costs.md").read_text()
    assert table in capsys.readouterr().out and "| layer-wise, budget 2 |" in table
    assert "50.0%" in table and "62.5%" in table  # (4 + 2) / 12 and (4 + 1) / 8
    assert "| 0.00 |" not in table  # so small a net has figures too
    assert (out / "costs.png").read_bytes().startswith(b"\x89PNG")
    assert "a model of one client" in (out / "report.html").read_text()


def test_a_mistake_of_the_command_is_one_line(tmp_path, capsys):
    for asked, words in (
        ("--model=conv4", "model: expected an attribute pool"),
        ("--depth-budget=1", "expected an integer of at least 2, got '1'"),
    ):
        assert cli.main(["costs", asked, f"--out={tmp_path / 'out'}"]) == 2, asked
        assert words in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_the_plot_has_shares_of_end_to_end():
    net = Flat()
    cases = {"layer-wise": measure(net), "2 blocks": measure(net, budget=2)}
    whole, again = (stage_costs.end_to_end(net, IMAGES, checkpointed=yes) for yes in (False, True))
    figure = plot(cases, {"end to end": whole, "with checkpoints": again})
    most = 100 * again.costs.multiply_adds / whole.costs.multiply_adds
    assert most > 110 and all(axes.get_ylim()[1] > most for axes in figure.axes)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["memory", "saved for backward", "multiply-adds", "traffic"]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[3].lines}
    share = 100 * (STEM + BLOCK) / whole.held
    assert drawn["layer-wise"][0] == [1, pytest.approx(share)]


@pytest.mark.parametrize("budget", [None, 2, 5])
def test_of_blocks_alone_multiply_adds_and_traffic_are_the_papers_formulas_exactly(budget):
    """Equal blocks, without stem and head: to the digit, in each stage."""
    blocks = 6
    stages, whole = stage_costs.blocks_alone(Flat(blocks), IMAGES, by_block(blocks, budget))
    for stage, found in enumerate(stages, 1):
        compute = costs.compute_share(stage, blocks, budget)
        assert found.multiply_adds == round(compute * whole.multiply_adds)
        assert found.multiply_adds / whole.multiply_adds == pytest.approx(compute, rel=1e-15)
        assert found.traffic / whole.traffic == pytest.approx(
            costs.traffic_share(stage, blocks, budget), rel=1e-15
        )


def test_of_blocks_alone_the_nets_have_the_papers_shares():
    net, images, L = build_model("isotropic:depth=4", 32, 0), torch.rand(4, 3, 16, 16), 4
    stages, whole = stage_costs.blocks_alone(net, images, by_block(L))
    for stage, found in enumerate(stages, 1):
        assert found.multiply_adds * 3 * L == (stage + 2) * whole.multiply_adds
        assert found.traffic * 2 * L == (stage + 1) * whole.traffic
