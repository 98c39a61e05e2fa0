"""Confusion among a client's own classes, by hand and from finished runs."""

import csv

import pytest
import torch
from tiny_federation import CLASSES_HELD, DIM, NUM_CLASSES, tiny_config, tiny_data, tiny_model
from torch.nn.functional import normalize

from fedss_kernels import federated
from fedss_kernels.federated import cli
from fedss_kernels.federated.clients.extractor import Extractor
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.figures import confusion
from fedss_kernels.federated.files.run_folder import read_kept, read_model


@pytest.fixture
def linear_model(monkeypatch):
    monkeypatch.setattr("fedss_kernels.federated.clients.player._build_model", lambda config: tiny_model())


def test_shares_are_counts_of_the_nearest_of_the_clients_rows(linear_model):
    config, data = tiny_config(), tiny_data()
    net = Player(config, data).extractor.module.state_dict()
    weight = torch.randn(NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(5))
    found = confusion.measure(config, data, (net, weight), client=1)
    assert found.classes.tolist() == list(CLASSES_HELD[1])
    held, model = data.clients[1], tiny_model()
    with torch.no_grad():
        embeddings = normalize(model(data.images[held].float() / 255), dim=1)
    rows = normalize(weight[list(CLASSES_HELD[1])], dim=1)
    for i, label in enumerate(CLASSES_HELD[1]):
        nearest = (embeddings[data.labels[held] == label] @ rows.T).argmax(1)
        expected = torch.bincount(nearest, minlength=3) / len(nearest)
        torch.testing.assert_close(found.shares[i], expected.double())
    pairs = [(rows[i] @ rows[j]).item() for i in range(3) for j in range(3) if i != j]
    assert found.cosine == pytest.approx(sum(pairs) / 6, rel=1e-5)
    with pytest.raises(ValueError, match=r"client: expected one in \[0, 5\), got 5"):
        confusion.measure(config, data, (net, weight), client=5)


def test_a_linear_heads_scores_are_products_and_a_bias(linear_model):
    config, data = tiny_config(similarity="dot", scale=None), tiny_data()
    net = Player(config, data).extractor.module.state_dict()
    weight = torch.randn(NUM_CLASSES, DIM + 1, generator=torch.Generator().manual_seed(5))
    classes = list(CLASSES_HELD[1])
    weight[classes[1], -1] = 1e6  # the bias decides
    found = confusion.measure(config, data, (net, weight), client=1)
    assert found.shares[:, 1].tolist() == [1, 1, 1]
    directions = normalize(weight[classes, :-1], dim=1)
    pairs = [(directions[i] @ directions[j]).item() for i in range(3) for j in range(3) if i != j]
    assert found.cosine == pytest.approx(sum(pairs) / 6, rel=1e-5)


def test_rows_that_are_one_confuse_everything(linear_model):
    config, data = tiny_config(), tiny_data()
    net = Player(config, data).extractor.module.state_dict()
    found = confusion.measure(config, data, (net, torch.ones(NUM_CLASSES, DIM)), client=1)
    assert found.cosine == pytest.approx(1) and found.right == pytest.approx(1 / 3)


def test_the_cosine_of_long_rows_and_of_one_that_is_not_finite(linear_model):
    config, data = tiny_config(), tiny_data()
    net = Player(config, data).extractor.module.state_dict()
    weight = torch.randn(NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(5)).clamp(-1, 1)
    sound = confusion.measure(config, data, (net, weight), client=1)
    long = confusion.measure(config, data, (net, weight * 1e30), client=1)
    assert long.cosine == pytest.approx(sound.cosine, rel=1e-5) and torch.equal(long.shares, sound.shares)
    for bad in (torch.nan, torch.inf):
        weight[CLASSES_HELD[1][0], 0] = bad
        cosine = confusion.measure(config, data, (net, weight), client=1).cosine
        assert cosine != cosine  # NaN


def test_the_command_shows_runs_side_by_side(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "cache"))
    small = ["--glyph-classes=12", "--glyph-writers=4", "--cohort=2", "--embedding-dim=8", "--rounds=2"]
    runs = [str(tmp_path / method) for method in ("fedss", "neg_only")]
    for run in runs:
        assert cli.main(["run", *small, f"--method={run.rsplit('/')[-1]}", f"--out={run}"]) == 0
    capsys.readouterr()
    out = tmp_path / "out"
    assert cli.main(["confusion", *runs, "--client=2", f"--out={out}"]) == 0
    with (out / "confusion.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for name in ("0: FedSS", "1: NegOnly"):
        mine = [line for line in lines if line["run"] == name]
        classes = {line["class"] for line in mine}
        assert len(mine) == len(classes) ** 2
        assert sum(float(line["share"]) for line in mine) == pytest.approx(len(classes))
    assert (out / "confusion.md").read_text() in capsys.readouterr().out
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["confusion", str(tmp_path / "nowhere"), f"--out={out}"]) == 2


def test_a_client_with_rows_or_a_net_of_its_own_is_shown_by_these(linear_model):
    config, data = tiny_config(), tiny_data()
    player = Player(config, data)
    net, phi = player.extractor.module.state_dict(), player.extractor.flat.clone()
    first, second = torch.randn(2, NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(5))
    for kept, same in (((None, second), (net, second)), ((-phi, None), (net, -first))):
        found = confusion.measure(config, data, (net, first), 1, lambda k, kept=kept: kept)
        assert torch.equal(found.shares, confusion.measure(config, data, same, 1).shares)
        assert not torch.equal(found.shares, confusion.measure(config, data, (net, first), 1).shares)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["fedper", "local_only"])
def test_what_clients_keep_is_looked_at_and_where_it_is_in_a_store_nothing_is(
    method, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "cache"))
    run = ["run", "--glyph-classes=12", "--glyph-writers=4", "--partition=classes", "--classes-per-client=3"]
    run += ["--images-per-client=10", "--cohort=2", "--embedding-dim=8", "--rounds=2", f"--method={method}"]
    plain, stored, out = (tmp_path / name for name in ("plain", "stored", "out"))
    assert cli.main([*run, f"--out={plain}"]) == 0
    model = torch.load(plain / "model.pt", weights_only=True)
    client = model["clients"][0].item()
    assert cli.main(["confusion", str(plain), f"--client={client}", f"--out={out}"]) == 0
    shares = (out / "confusion.csv").read_text()
    torch.save({**model, "heads": -model["heads"]}, plain / "model.pt")
    assert cli.main(["confusion", str(plain), f"--client={client}", f"--out={out}"]) == 0
    assert (out / "confusion.csv").read_text() != shares
    assert cli.main([*run, f"--out={stored}", f"--class-store={tmp_path / 'rows'}"]) == 0
    capsys.readouterr()
    for command in ("confusion", "personalise"):
        assert cli.main([command, str(stored), f"--out={out}"]) == 2
        assert "has no class matrix: it is in a class store" in capsys.readouterr().err
    assert cli.main(["noise", f"--run={plain}", f"--out={out}"]) == 2
    assert f"expected a run with one model for all, got one of {method}" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_runs_of_one_method_are_told_apart_and_of_other_data_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "cache"))
    small = ["--glyph-classes=6", "--glyph-writers=4", "--cohort=2", "--embedding-dim=8", "--rounds=1"]
    runs = [str(tmp_path / name) for name in ("slow", "fast", "more/fast", "other")]
    for run, option in zip(runs, ("--client-lr=0.01", "--seed=1", "--seed=2", "--data-seed=1"), strict=True):
        assert cli.main(["run", *small, option, f"--out={run}"]) == 0
    out = f"--out={tmp_path / 'out'}"
    assert cli.main(["confusion", *runs[:2], out]) == 0
    assert "| FedSS (slow) |" in (text := capsys.readouterr().out) and "| FedSS (fast) |" in text
    assert cli.main(["confusion", *runs[1:3], out]) == 0
    assert all(f"| FedSS ({run}) |" in (tmp_path / "out/confusion.md").read_text() for run in runs[1:3])
    capsys.readouterr()
    assert cli.main(["confusion", runs[0], runs[3], out]) == 2
    assert capsys.readouterr().err == (
        f"fedss confusion: client 0 of {runs[3]} holds other images than that of {runs[0]}: expected runs on "
        "the same data\n"
    )


@pytest.mark.parametrize("method", ["fedper", "local_only"])
def test_a_client_with_a_model_of_its_own_is_judged_by_that(method, tmp_path, linear_model):
    config, data = tiny_config(method=method, cohort=5, client_lr=1.0, out=tmp_path / "run"), tiny_data()
    result = federated.run(config, data=data, model=tiny_model())
    net, rows = read_model(tmp_path / "run")
    found = confusion.measure(config, data, (net, rows), 1, read_kept(tmp_path / "run"))
    phi, own = result.homes.model(1)
    player = Player(config, data)
    player.extractor.flat.copy_(
        torch.cat([p.flatten() for p in result.extractor.parameters()]) if phi is None else phi
    )
    expected = confusion.measure(config, data, (player.extractor.module.state_dict(), own), 1)
    assert torch.equal(found.shares, expected.shares) and found.cosine == expected.cosine
    assert found.cosine != confusion.measure(config, data, (net, rows), 1).cosine


def test_a_centralized_runs_client_has_its_own_classes(linear_model):
    config, data = tiny_config(method="centralized"), tiny_data()
    net = Player(config, data).extractor.module.state_dict()
    found = confusion.measure(config, data, (net, torch.ones(NUM_CLASSES, DIM)), client=1)
    assert found.classes.tolist() == list(CLASSES_HELD[1]) and found.shares.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_taken_for_nothing(bad, linear_model, monkeypatch, tmp_path):
    """A class row that is not: no image is taken for it. An embedding that is not: it is taken for none."""
    config, data = tiny_config(), tiny_data()
    net = Player(config, data).extractor.module.state_dict()
    weight = torch.randn(NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(5))
    sound = confusion.measure(config, data, (net, weight), client=1)
    ruined = weight.clone()
    ruined[CLASSES_HELD[1][1], 2] = bad
    found = confusion.measure(config, data, (net, ruined), client=1)
    assert found.not_finite == 0 and found.shares[:, 1].sum() == 0
    torch.testing.assert_close(found.shares.sum(1), torch.ones(3, dtype=torch.float64))

    embed = Extractor.embed

    def first_bad(self, images):
        embeddings = embed(self, images)
        embeddings[0, 0] = bad
        return embeddings

    monkeypatch.setattr(Extractor, "embed", first_bad)
    found = confusion.measure(config, data, (net, weight), client=1)
    of_first = CLASSES_HELD[1].index(int(data.labels[data.clients[1][0]]))
    assert found.not_finite == 1 and found.shares[of_first].sum() == pytest.approx(1 / 2)  # of two images
    others = [i for i in range(3) if i != of_first]
    assert torch.equal(found.shares[others], sound.shares[others])
    assert "images not finite" in confusion.write(tmp_path, [found], 1)
    assert "images not finite" not in confusion.write(tmp_path, [sound], 1)
