"""A federation over Flower's messages, without processes: its bits, and what nodes do wrong."""

import csv
import importlib
import json
from dataclasses import replace

import pytest
import torch
from tiny_federation import NUM_CLASSES, tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import ConfigError, TooFewClients, run
from fedss_kernels.federated.cli import main
from fedss_kernels.federated.files.checkpoint import CheckpointError

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedss-kernels[flower]'")

from flower_network import LocalGrid
from flwr.app import Array, ArrayRecord, Error

from fedss_kernels.federated import flower
from fedss_kernels.federated.algorithms import METHODS, Request
from fedss_kernels.federated.flower import client_app
from fedss_kernels.federated.flower.federate import Settings, federate
from fedss_kernels.federated.flower.network import Incomplete
from fedss_kernels.federated.flower.wire import NUMBERS, WORDS, message, packed, unpacked

DATA = tiny_data()
NODES = len(DATA.clients)


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch):
    monkeypatch.setattr("fedss_kernels.federated.flower.network.PAUSE", 0.001)


def node_data(node):
    held = DATA.clients[node["partition-id"]]
    return DATA.images[held].numpy(), DATA.labels[held].tolist()


def server_data():
    return DATA.test_images, DATA.test_labels


def grid_of(data=node_data, model=tiny_model) -> LocalGrid:
    """Flower's ids in another order than the clients'."""
    return LocalGrid(client_app(data, model), {900 - 7 * k: {"partition-id": k} for k in range(NODES)})


def run_config(out, **options):
    config = tiny_config(model="own", data="own", **options)
    changed = {n: v for n, v in config.to_dict().items() if v is not None and n != "out"}
    return {"nodes": NODES, "timeout": 0.2, "out": str(out), **changed}


def federated(tmp_path, grid=None, resume=False, **options):
    settings = run_config(tmp_path / "federated", **options) | {"resume": resume}
    return federate(grid or grid_of(), settings, NUM_CLASSES, server_data, tiny_model)


def simulated(tmp_path, **options):
    return run(tiny_config(out=tmp_path / "simulated", **options), data=tiny_data(), model=tiny_model())


def simulated_without(client, tmp_path):
    """One round of all clients, of whom this one drops out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fedss_kernels.federated.fedavg_round.absence",
            lambda config, round, attempt, k: "dropped" if k == client else None,
        )
        return simulated(tmp_path, cohort=NODES, rounds=1)


def model_of(result):
    numbers = [p.detach().numpy().tobytes() for p in result.extractor.parameters()]
    return numbers, None if result.weight is None else result.weight.numpy().tobytes()


def ledger(folder):
    with (folder / "ledger.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def outcomes(folder, client):
    return [(line["outcome"], line["fault"]) for line in ledger(folder) if line["client"] == str(client)]


# ---- the same bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"method": "fedss"},
        {"method": "fedss", "wire_dtype": "bfloat16", "dropout_rate": 0.3, "similarity": "dot"},
        {"method": "neg_only", "aggregation": "median", "client_momentum": 0.5},
        {"method": "full_softmax", "server_optimizer": "adagrad", "max_norm_ratio": 1.0},
        {"method": "fedavg"},
        {"method": "fedaws"},
        {"method": "fedbabu"},
        {"method": "fedbabu_ss"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_federation_has_the_bits_of_the_simulation(options, tmp_path):
    over_nodes, in_one_place = federated(tmp_path, **options), simulated(tmp_path, **options)
    assert model_of(over_nodes) == model_of(in_one_place)
    assert [m.loss for m in over_nodes.history] == [m.loss for m in in_one_place.history]
    assert over_nodes.summary.top1 == in_one_place.summary.top1
    if options["method"] != "fedbabu_ss":  # whose nodes say to nobody how many rows they use
        assert ledger(tmp_path / "federated") == ledger(tmp_path / "simulated")


def test_of_clients_images_the_server_says_nothing(tmp_path, caplog):
    federated(tmp_path, rounds=1)
    assert "no client" not in caplog.text


def test_a_node_sends_no_more_than_its_ids_its_update_and_two_numbers(tmp_path):
    grid, seen = grid_of(), {}

    def look(kind, reply):
        words, numbers = reply.content[WORDS], reply.content[NUMBERS]
        seen[kind] = dict(words), {name: (array.dtype, array.shape) for name, array in numbers.items()}
        return reply

    grid.spoil = dict.fromkeys(grid.nodes, look)
    federated(tmp_path, grid, rounds=1, num_negatives=2)
    assert set(seen) == {"query.roll", "query.rows", "train"}
    assert set(seen["query.roll"][0]) == {"client", "images"} and seen["query.roll"][1] == {}
    (rows,) = seen["query.rows"][1].values()
    assert set(seen["query.rows"][0]) == set() and rows[0] == "int64"
    words, numbers = seen["train"]
    assert set(words) == {"images", "loss"} and set(numbers) == {"rows", "net"}
    assert numbers["rows"] == ("float32", (*rows[1], 4)) and numbers["net"] == ("float32", (148,))


def test_a_method_of_ones_own_is_asked_for_clients_that_have_classes(tmp_path, monkeypatch):
    """So it may take the first of them."""

    def request(num_classes, positives, negatives, correction):
        ids = torch.arange(int(positives.min()), int(positives.max()) + 1)
        return Request(ids, None, torch.zeros(len(ids)))

    monkeypatch.setitem(METHODS, "span", replace(METHODS["pos_only"], name="span", request=request))
    assert model_of(federated(tmp_path, method="span")) == model_of(simulated(tmp_path, method="span"))
    assert ledger(tmp_path / "federated") == ledger(tmp_path / "simulated")


def test_where_all_clients_use_the_same_rows_none_is_asked(tmp_path):
    grid = grid_of()
    federated(tmp_path, grid, method="full_softmax", rounds=2)
    assert {kind for _, kind in grid.sent} == {"query.roll", "train"}


# ---- a run that goes on ------------------------------------------------------------------------------------


def test_a_federation_that_was_killed_goes_on_to_the_same_bits(tmp_path):
    class Killed(BaseException):
        pass

    grid = grid_of()

    def kill(kind, reply):
        if sum(kind == "train" for _, kind in grid.sent) > 7:
            raise Killed
        return reply

    grid.spoil = dict.fromkeys(grid.nodes, kill)
    with pytest.raises(Killed):
        federated(tmp_path, grid, rounds=4, checkpoint_every=1)
    gone_on = federated(tmp_path, grid_of(), resume=True, rounds=4, checkpoint_every=1)
    assert model_of(gone_on) == model_of(simulated(tmp_path, rounds=4))


def test_a_run_that_goes_on_does_so_without_a_node_that_is_gone(tmp_path):
    options = {"checkpoint_every": 1, "cohort": NODES, "lr_decay": "constant"}
    federated(tmp_path, rounds=1, **options)
    grid = grid_of()
    del grid.nodes[900]  # client 0
    federated(tmp_path, grid, resume=True, rounds=2, **options)
    assert outcomes(tmp_path / "federated", 0) == [("accepted", ""), ("dropped", "")]


@pytest.mark.parametrize("nodes", [NODES - 1, NODES + 1])
def test_a_run_does_not_go_on_with_another_number_of_nodes(nodes, tmp_path):
    """Nobody is asked, and with as many as before it goes on."""
    options, out = {"checkpoint_every": 1, "rounds": 2}, tmp_path / "federated"
    federated(tmp_path, **options | {"rounds": 1})
    roll, grid = (out / "roll.json").read_text(), grid_of()
    settings = run_config(out, **options) | {"resume": True, "nodes": nodes}
    words = rf"nodes: expected {NODES}, as the run in .*federated has, got {nodes}$"
    with pytest.raises(ConfigError, match=words):
        federate(grid, settings, NUM_CLASSES, server_data, tiny_model)
    assert not grid.sent and (out / "roll.json").read_text() == roll
    federated(tmp_path, resume=True, **options)


def test_without_a_federations_checkpoint_nothing_goes_on(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no federation's checkpoint in .*: there is no sound roll.json"
    ):
        federated(tmp_path, resume=True)


# ---- nodes that fail ---------------------------------------------------------------------------------------


def only(kind, change):
    """Of answers of one kind, what becomes of them."""
    return lambda of, reply: change(reply) if of == kind else reply


def with_numbers(**arrays):
    def change(reply):
        reply.content[NUMBERS] = ArrayRecord({**reply.content[NUMBERS], **arrays})
        return reply

    return change


def with_words(**words):
    def change(reply):
        for name, value in words.items():
            reply.content[WORDS][name] = value
        return reply

    return change


SPOILT = {
    "rows of another shape": ("train", with_numbers(rows=packed(torch.zeros(1, 4))), "shape"),
    "a net of another shape": ("train", with_numbers(net=packed(torch.zeros(147))), "shape"),
    "numbers of another dtype": (
        "train",
        with_numbers(net=packed(torch.zeros(148, dtype=torch.bfloat16))),
        "dtype",
    ),
    "ints": ("train", with_numbers(net=packed(torch.zeros(148, dtype=torch.int64))), "dtype"),
    "NaN": ("train", with_numbers(net=packed(torch.full((148,), torch.nan))), "not finite"),
    "huge numbers": ("train", with_numbers(net=packed(torch.full((148,), 1e30))), "norm"),
    "too few bytes": ("train", with_numbers(net=Array("float32", (148,), "raw", b"123")), "dtype"),
    "a file of numpy's": ("train", with_numbers(net=Array("float32", (148,), "numpy.ndarray", b"")), "dtype"),
    "a huge shape": ("train", with_numbers(net=Array("float32", (2**40, 2**40), "raw", b"")), "dtype"),
    "a negative shape": ("train", with_numbers(net=Array("float32", (-1, -148), "raw", bytes(592))), "dtype"),
    "a loss that is NaN": ("train", with_words(loss=float("nan")), "loss"),
    "a loss in words": ("train", with_words(loss="small"), "loss"),
    "images that no client has": ("train", with_words(images=10**9), "examples"),
    "images in words": ("train", with_words(images="10"), "examples"),
    "ids out of range": ("query.rows", with_numbers(ids=packed(torch.tensor([1, NUM_CLASSES]))), "ids"),
    "negative ids": ("query.rows", with_numbers(ids=packed(torch.tensor([-1, 2]))), "ids"),
    "an id twice": ("query.rows", with_numbers(ids=packed(torch.tensor([2, 2]))), "ids"),
    "ids out of order": ("query.rows", with_numbers(ids=packed(torch.tensor([3, 2]))), "ids"),
    "no ids": ("query.rows", with_numbers(ids=packed(torch.empty(0, dtype=torch.int64))), "ids"),
    "ids that are none": ("query.rows", with_numbers(ids=packed(torch.tensor([1.0, 2.0]))), "ids"),
}


@pytest.mark.parametrize("kind, change, fault", SPOILT.values(), ids=SPOILT)
def test_what_a_node_sends_wrong_is_left_out_by_name(kind, change, fault, tmp_path):
    """And costs that answer alone: the others' are averaged as if it had not been drawn."""
    grid = grid_of()
    grid.spoil[900] = only(kind, change)
    result = federated(tmp_path, grid, cohort=NODES, rounds=1)
    assert outcomes(tmp_path / "federated", 0) == [("rejected", fault)]
    assert result.summary.accepted == NODES - 1
    assert model_of(result) == model_of(simulated_without(0, tmp_path))


FAILING = {
    "an error": (lambda reply: Error(5, "Error: Node Unavailable"), "dropped"),
    "nothing": (lambda reply: None, "late"),
    "a refusal": (lambda reply: with_words(refused="no disk")(reply), "dropped"),
}


@pytest.mark.parametrize("kind", ["query.rows", "train"])
@pytest.mark.parametrize("change, outcome", FAILING.values(), ids=FAILING)
def test_a_node_that_fails_costs_its_answer_alone(kind, change, outcome, tmp_path, caplog):
    """The model is that of a simulation in which this client drops out."""
    grid = grid_of()
    grid.spoil[900 - 7 * 2] = only(kind, change)  # client 2
    result = federated(tmp_path, grid, cohort=NODES, rounds=1)
    assert outcomes(tmp_path / "federated", 2) == [(outcome, "")]
    assert result.summary.accepted == NODES - 1
    assert "client 2 does not answer" in caplog.text
    assert model_of(result) == model_of(simulated_without(2, tmp_path))


SILENT = {
    "an error": (lambda reply: Error(1, "out of memory"), {}, r"9 dropped out; out of memory \(9\)"),
    "a refusal": (with_words(refused="no disk"), {}, r"9 dropped out; it refused: no disk \(9\)"),
    "nothing": (lambda reply: None, {}, r"9 late, after timeout; nothing in 0.2 s \(9\)"),
    "nothing, and drawn delays": (lambda reply: None, {"deadline": 1e9}, "9 late, after timeout or --deadl"),
}


@pytest.mark.parametrize("change, options, words", SILENT.values(), ids=SILENT)
def test_a_round_that_nobody_answers_is_soon_given_up_with_the_reasons(change, options, words, tmp_path):
    grid = grid_of()
    grid.spoil = dict.fromkeys(grid.nodes, only("train", change))
    words = f"round 1: of 3 cohorts of 3 none had 1 answer that counted: {words}"
    with pytest.raises(TooFewClients, match=words):
        federated(tmp_path, grid, **options)


def failing_at(*attempts):
    """An answer of a node that fails in these of its trainings."""
    count = iter(range(100))
    return only("train", lambda reply: Error(1, "out of memory") if next(count) in attempts else reply)


def test_a_round_for_which_some_nodes_fail_at_times_is_tried_on(tmp_path):
    grid, every = grid_of(), {"cohort": NODES, "min_clients": NODES, "rounds": 1}
    grid.spoil = {900: failing_at(0, 1, 3), 900 - 7: failing_at(2)}
    result = federated(tmp_path, grid, **every)
    assert result.history[-1].attempts == 5
    grid.spoil = {900: failing_at(0, 1, 2)}
    with pytest.raises(TooFewClients, match=r"of 3 cohorts .*; 3 dropped out; out of memory \(3\)$"):
        federated(tmp_path / "again", grid, **every)


def test_nodes_with_another_net_are_why_a_round_is_given_up(tmp_path):
    def another():
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 4, bias=False))

    with pytest.raises(
        TooFewClients, match=r"9 dropped out; it refused: model: .* of 148 numbers, got one of 144 \(9\)$"
    ):
        federated(tmp_path, grid_of(model=another))


def test_nodes_that_refuse_a_run_that_goes_on_are_why_it_is_given_up(tmp_path):
    federated(tmp_path, rounds=1, checkpoint_every=1)
    grid = grid_of(lambda node: without_files({"partition-id": 0}))
    with pytest.raises(TooFewClients, match=r"it is not there \(9\); a node cannot take part: FileNotFound"):
        federated(tmp_path, grid, resume=True, rounds=2)


def without_files(node):
    if node["partition-id"] == 0:
        raise FileNotFoundError(2, "No such file or directory", "/srv/scans")
    return node_data(node)


def test_a_node_that_goes_as_it_is_sent_something_is_not_waited_for(tmp_path, caplog):
    grid = grid_of()

    def gone(kind, reply):
        if kind == "train":
            grid.nodes.pop(900 - 7, None)  # client 1, to whom the next message is
        return reply

    grid.spoil[900] = gone
    federated(tmp_path, grid, cohort=NODES, rounds=1)
    assert outcomes(tmp_path / "federated", 1) == [("dropped", "")]
    assert "client 1 does not answer: it is gone" in caplog.text


def test_a_node_that_is_started_again_has_another_id_and_goes_on(tmp_path, caplog):
    grid = grid_of()

    def replaced(kind, reply):
        if kind == "train" and 900 in grid.nodes:
            grid.nodes[1234] = grid.nodes.pop(900)
        return reply

    grid.spoil[900 - 7] = replaced  # in the first round that client 1 is in
    result = federated(tmp_path, grid, cohort=NODES, rounds=3)
    assert 1234 in {node for node, _ in grid.sent}
    assert "client 0: another node has its number" in caplog.text
    assert model_of(result) == model_of(simulated(tmp_path, cohort=NODES, rounds=3))


# ---- a federation that cannot begin ------------------------------------------------------------------------


def test_missing_nodes_are_named(tmp_path):
    grid = grid_of()
    del grid.nodes[900 - 7 * 3]
    with pytest.raises(Incomplete, match=r"of 5 nodes 4 are there: missing after 0.2 s: 3$"):
        federated(tmp_path, grid)


def test_a_node_whose_function_fails_says_so_at_once(tmp_path, caplog):
    grid = grid_of(without_files)
    with pytest.raises(
        Incomplete, match=r"FileNotFoundError: \[Errno 2\] No such file or directory: '/srv/sc"
    ):
        federated(tmp_path, grid)
    assert grid.sent.count((900, "query.roll")) == 1
    assert "in without_files" in caplog.text  # on the node, where


def test_why_nobody_knows_who_a_node_is_is_said_once_it_is_missing(tmp_path, caplog):
    """It is asked again, as it may be there later."""
    grid = grid_of()
    grid.spoil[900] = lambda kind, reply: Error(2, "no module named federation")
    with pytest.raises(Incomplete, match=r"missing after 0.2 s: 0; no module named federation$"):
        federated(tmp_path, grid)
    assert grid.sent.count((900, "query.roll")) > 1
    assert caplog.text.count("a node does not say who it is: no module named federation") == 1


@pytest.mark.parametrize(
    "made, words",
    [
        (
            lambda images, labels: (images[:, :, :5], labels),
            r"images: expected \(n, 1, 6, 6\).*got \(6, 1, 5, 6\)",
        ),
        (
            lambda images, labels: (images, [NUM_CLASSES] * len(labels)),
            r"labels: expected classes in \[0, 7\)",
        ),
        (lambda images, labels: (images / 255, labels), "images: expected a non-empty .* uint8"),
        (lambda images, labels: (images, labels[1:]), r"labels: expected \(6,\) int64"),
    ],
)
def test_a_node_whose_data_do_not_fit_says_so(made, words, tmp_path):
    def data(node):
        images, labels = node_data(node)
        return made(images, labels) if node["partition-id"] == 0 else (images, labels)

    with pytest.raises(Incomplete, match=words):
        federated(tmp_path, grid_of(data))


def test_a_node_without_its_number_is_told_how_to_get_one(tmp_path):
    grid = grid_of()
    grid.nodes[900] = {}
    with pytest.raises(
        Incomplete, match="partition-id: expected a number in .*--node-config 'partition-id=0'"
    ):
        federated(tmp_path, grid)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"method": "fedper"}, "each client of fedper has a model of its own"),
        ({"method": "centralized"}, "centralized has no clients"),
        (
            {"method": "layerwise"},
            "layerwise learns is measured with training images, and the server has none",
        ),
        ({"method": "mocosfl"}, "clients and server of mocosfl step together"),
        ({"cohort": 3}, "cohort: expected at most 2, the nodes, got 3"),
        ({"workers": 2}, "workers: expected 1 over a network"),
        ({"poison-rate": 0.5}, "poison_rate: expected 0 over a network"),
        (
            {"negatives": "shared"},
            "min_clients: expected at least 2, more than half of the cohort, with shared",
        ),
        ({"requests": "pir"}, "requests: expected plain over a network, where there is one server"),
        (
            {"method": "fedbabu", "noise-multiplier": 1.0, "clip-norm": 1.0},
            "noise_multiplier: expected 0 over a network",
        ),
        (
            {"method": "fedbabu", "personalise-epochs": 1},
            "personalise_epochs: expected 0 over a network, where the server has no client's images",
        ),
        ({"nodes": 0}, "nodes: expected an integer of at least 1, got 0"),
        ({"timeout": "soon"}, "timeout: expected seconds greater than 0, got 'soon'"),
        ({"resume": 1}, "resume: expected true or false, got 1"),
        ({"num-negative": 1}, r"num_negative: no such option \(did you mean num_negatives\?\)"),
        ({"rounds": 0}, "rounds: expected an integer of at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_sent(changed, words):
    with pytest.raises(ConfigError, match=words):
        Settings.of({"nodes": 2, "out": "runs/mine", **changed})


def test_a_folder_in_use_is_said_before_anybody_is_waited_for(tmp_path):
    (tmp_path / "federated").mkdir()
    (tmp_path / "federated" / "mine.txt").touch()
    grid = grid_of()
    with pytest.raises(FileExistsError, match="is not empty"):
        federated(tmp_path, grid)
    assert not grid.sent


def test_options_have_dashes_or_underscores():
    settings, config = Settings.of({"nodes": 3, "out": "runs/mine", "num-negatives": 5, "client_lr": 0.25})
    assert config.cohort == 3  # all, where nothing is said
    assert (settings.nodes, settings.resume, config.num_negatives, config.client_lr) == (3, False, 5, 0.25)


# ---- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(3, 2), (0, 4), (5,)])
def test_numbers_come_back_as_they_went(dtype, shape):
    numbers = torch.arange(-3, 27)[: torch.Size(shape).numel()].view(shape).to(dtype)
    found = unpacked(packed(numbers.t().contiguous().t() if len(shape) == 2 else numbers))
    assert found.dtype == dtype and torch.equal(found, numbers)


def test_one_number_and_none_are_packed_whatever_their_strides():
    """As of classes that are drawn where none are left, and of one of few clients."""
    for numbers in (torch.empty_strided((0,), (0,), dtype=torch.int64), torch.arange(7)[3::4]):
        found = unpacked(packed(numbers))
        assert torch.equal(found, numbers) and found.dtype == torch.int64


def test_what_is_packed_has_no_more_bytes_than_its_numbers():
    assert len(packed(torch.zeros(7, 3, dtype=torch.bfloat16)).data) == 42


def test_a_message_is_two_records():
    content = message({"round": 1, "config": json.dumps({})}, {"ids": torch.arange(3)})
    assert set(content) == {WORDS, NUMBERS} and content[WORDS]["round"] == 1


# ---- the app that is written -------------------------------------------------------------------------------


@pytest.fixture
def app(tmp_path, capsys):
    assert main(["flower", "new", str(tmp_path / "My hospital")]) == 0
    return tmp_path / "My hospital"


def test_the_app_that_is_written_is_one_that_flower_takes(app):
    from flwr.cli.config_utils import load_and_validate

    config, warnings = load_and_validate(app / "pyproject.toml", check_module=True)
    assert config["project"]["name"] == "my-hospital" and not warnings
    settings, options = Settings.of(config["tool"]["flwr"]["app"]["config"])
    assert (settings.nodes, options.cohort, options.method) == (4, 4, "fedss")


def test_the_app_that_is_written_trains(app, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(app))
    client, data = importlib.import_module("federation.client"), importlib.import_module("federation.data")
    drawn = replace(tiny_data(), clients=tiny_data().clients[:4], client_names=tuple("abcd"), test_clients=())
    monkeypatch.setattr(data, "glyphs", lambda: drawn)
    grid = LocalGrid(client.app, {k: {"partition-id": k} for k in range(4)})
    run_config = {"nodes": 4, "out": str(tmp_path / "out"), "rounds": 1, "cohort": 4}
    run_config |= {"model": "isotropic:depth=1,patch=3", "embedding-dim": 32}
    federate(grid, run_config, NUM_CLASSES, data.of_server)
    assert (tmp_path / "out" / "roll.json").exists()


def test_the_readme_of_the_app_is_short(app):
    assert (app / "README.md").read_text().count("\n") <= 14


def test_nothing_is_written_over(app, capsys):
    (app / "federation" / "data.py").write_text("mine")
    assert main(["flower", "new", str(app)]) == 2
    assert capsys.readouterr().err == f"fedss flower: expected a new or an empty folder, got {app}\n"
    assert (app / "federation" / "data.py").read_text() == "mine"


def test_the_functions_are_there_when_their_apps_are_made():
    client, server = flower.client_app(node_data), flower.server_app(NUM_CLASSES, server_data)
    assert callable(flower.client_app) and callable(flower.server_app) and client and server
