"""A method from outside the package: registered, checked, with numbers and a penalty of its own."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from later import later
from test_cli import SMALL
from tiny_federation import tiny_config, tiny_data, tiny_model
from torch.nn.functional import cross_entropy

from fedss_kernels.federated import (
    CheckpointError,
    Config,
    ConfigError,
    Stopped,
    cli,
    plugins,
    register,
    run,
    testing,
)
from fedss_kernels.federated.algorithms import METHODS, Method, Request
from fedss_kernels.federated.algorithms.parts import Part, Parts, Pass
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.comparisons.compare import Comparison
from fedss_kernels.federated.files.fingerprint import _alike
from fedss_kernels.federated.files.method_numbers import method_numbers
from fedss_kernels.federated.idle_settings import idle
from fedss_kernels.federated.plan import Plan
from fedss_kernels.federated.reports import report
from fedss_kernels.federated.reports.reported_run import Run
from fedss_kernels.federated.testing import check_method

FEDSS, POS_ONLY = METHODS["fedss"], METHODS["pos_only"]
OF_ITS_OWN = {"name": "mine", "label": "Mine", "summary": "Mine.", "paper": ""}
FILE = """
from dataclasses import replace
from fedss_kernels.federated import register
from fedss_kernels.federated.algorithms import METHODS

def penalty_gradient(now, received, *, mu):
    return mu * (now - received)

register(replace(METHODS["fedss"], name="prox", label="Prox", summary="Near what came.", paper="",
                 penalty_gradient=penalty_gradient, settings={"mu": 0.25}))
"""


@pytest.fixture(autouse=True)
def forgotten(tmp_path, monkeypatch):
    """What a test registers, and the files that it has imported."""
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(plugins.FILES, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    methods, modules = dict(METHODS), {*sys.modules}
    yield
    METHODS.clear()
    METHODS.update(methods)
    for name in {*sys.modules} - modules:
        if name.startswith(plugins.PREFIX):
            del sys.modules[name]


def mine(method: Method = FEDSS, **changes) -> Method:
    return register(replace(method, **(OF_ITS_OWN | changes)))


def train(**options):
    return run(tiny_config(**({"method": "mine"} | options)), data=tiny_data(), model=tiny_model())


def bits(result) -> list[bytes]:
    return [t.numpy().tobytes() for t in (result.weight, *result.extractor.state_dict().values())]


def corrected(request, factor):
    """With so many times the correction, and something to correct."""
    return replace(request, log_expected_count=factor * (request.log_expected_count - 1))


def real(positives, num_classes):
    """Those of clients here: a made-up one of few classes cannot ask."""
    if positives.tolist() == [1, 3] and num_classes < 64:
        raise ValueError("too few classes")
    return positives


def proximal(now, received, *, mu):
    return mu * (now - received)


# ---- what is registered ------------------------------------------------------------------------------------


def test_a_method_that_is_registered_is_one_of_the_methods():
    assert mine() is METHODS["mine"] and bits(train()) == bits(train(method="fedss"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": "fedss"}, "name: expected one that no method has, got 'fedss'"),
        ({"name": "My method"}, "name: expected small letters, digits and _, got 'My method'"),
        ({"label": "FedSS"}, "label: expected one that no method has, got 'FedSS'"),
        ({"label": ""}, "label: expected words, got ''"),
        (
            {"options": ("num_negative",)},
            "options: no such option of Config: num_negative (did you mean num_n",
        ),
        ({"options": ("mu",)}, "mu; a number of the method's own is one of its settings"),
        ({"presets": {"round": 3}}, "presets: no such option of Config: round (did you mean rounds?)"),
        ({"baseline": "best"}, "baseline: expected the name of a method, got 'best'"),
        ({"settings": {"rounds": 3}}, "settings: rounds is an option of Config"),
        ({"settings": {"mu": 1.0}}, "settings: mu is read by none of request, parts, by_round, passes, loss"),
        (
            {"settings": {"mu": "1"}, "penalty_gradient": proximal},
            "settings: mu: expected a finite number, got '1'",
        ),
        (
            {"penalty_gradient": proximal},
            "penalty_gradient: its keyword argument mu is not among the settings",
        ),
        ({"request": None}, "request: expected a function, got None"),
        ({"parts": lambda blocks: "all"}, "parts: expected it to return Parts, got str"),
        (
            {"parts": lambda blocks: Parts((Part.HOME,) * blocks, Part.TRAINED)},
            "parts: of a net of 1 block: ValueError: blocks: expected all of them HOME",
        ),
        ({"split": True}, "split: expected False"),
        ({"loss": 3}, "loss: expected a function, got 3"),
        (
            {"request": lambda num_classes, positives, negatives, correction, client: None},
            "request: expected request(num_classes, positives, negatives, correction), got (num_classes, "
            "positives, negatives, correction, client)",
        ),
        (
            {"penalty_gradient": lambda now, received, client: now},
            "penalty_gradient: expected penalty_gradient(now, received), got (now, received, client)",
        ),
        ({"parts": lambda: None}, "parts: expected parts(num_blocks), got ()"),
        ({"passes": lambda epochs: []}, "passes: expected passes(local_epochs, head_epochs), got (epochs)"),
        ({"by_round": lambda config: None}, "by_round: expected by_round(config, num_blocks), got (config)"),
        (
            {"loss": lambda embeddings, rows, target: embeddings.sum()},
            "loss: expected loss(embeddings, rows, target, given), got (embeddings, rows, target)",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_not_registered(changes, words):
    before = dict(METHODS)
    with pytest.raises(ValueError) as caught:
        register(replace(FEDSS, **(OF_ITS_OWN | changes)))
    assert str(caught.value).startswith("register: ") and words in str(caught.value)
    assert before == METHODS
    with pytest.raises(TypeError, match="register: expected a Method, got str"):
        register("fedss")


@pytest.mark.parametrize("method", ["simclr", "layerwise"])
def test_a_loss_over_class_rows_is_not_for_methods_without_them(method):
    words = "^register: loss: expected None of a method without labels or class rows$"
    with pytest.raises(ValueError, match=words):
        mine(METHODS[method], loss=usual)


def test_all_that_is_wrong_with_a_method_is_said_at_once():
    with pytest.raises(ValueError, match="name: .*; baseline: .*"):
        mine(name="a b", baseline="best")


# ---- where parts stand -------------------------------------------------------------------------------------


class InTurn:
    """A schedule of a net of one block: all is trained, but in rounds from 1 on it is as `later` says."""

    def __init__(self, later, of_one=None, stage=None):
        self.later, self.of_one, self.only_stage = later, of_one, stage

    def stage(self, round):
        return round if self.only_stage is None else self.only_stage

    def whole(self, round):
        return self.later if round else TRAINED

    def parts(self, round, attempt, client):
        return self.of_one or self.whole(round)


TRAINED, FIXED, KNOWN = (
    Parts((block,), rows)
    for block, rows in ((Part.TRAINED, Part.TRAINED), (Part.FROZEN, Part.TRAINED), (Part.TRAINED, Part.KNOWN))
)


@pytest.mark.parametrize(
    "found, words",
    [
        (None, "expected a Schedule, .* got NoneType, without stage, whole, parts"),
        (TRAINED, "expected a Schedule, .* got Parts, without stage, whole, parts"),
        (InTurn(None), r"whole\(1\): expected Parts, got NoneType"),
        (InTurn(Parts((), Part.TRAINED)), r"whole\(1\): expected a Part for each of 1 blocks .*, got 0"),
        (InTurn(KNOWN), r"whole\(1\): expected the class rows TRAINED in every round, .*, got KNOWN"),
        (InTurn(FIXED, stage=7), r"whole\(1\): expected the parts of round 0, as both are of stage 7, got"),
        (InTurn(FIXED, stage="a"), r"stage\(0\): expected a number, got str"),
        (
            InTurn(FIXED, of_one=FIXED),
            r"parts\(0, 0, 5\): expected blocks .* got FROZEN for block 0",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_told_by_the_round(found, words):
    mine(by_round=lambda config, num_blocks: found)
    with pytest.raises(ConfigError, match=f"^method: the by_round of mine: {words}"):
        METHODS["mine"].schedule(tiny_config(method="mine", rounds=2), 1).parts(0, 0, 5)


def test_a_schedule_that_fails_is_told_with_its_cause():
    mine(by_round=lambda config, num_blocks: config.nothing)
    with pytest.raises(ConfigError, match="^method: the by_round of mine: AttributeError: .* 'nothing'"):
        METHODS["mine"].schedule(tiny_config(method="mine"), 1)


def test_one_that_can_be_is_as_it_was():
    mine(by_round=lambda config, num_blocks: InTurn(FIXED, of_one=Parts((Part.ABSENT,), Part.TRAINED)))
    schedule = METHODS["mine"].schedule(tiny_config(method="mine", rounds=2), 1)
    assert [schedule.stage(1), schedule.whole(0), schedule.whole(1)] == [1, TRAINED, FIXED]
    assert schedule.parts(1, 0, 5).blocks == (Part.ABSENT,)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"parts": lambda blocks: Parts((Part.TRAINED,) * 2, Part.TRAINED)},
            "parts of mine: expected a Part for each of 1 blocks .a net is one, unless .* by_block., got 2",
        ),
        ({"passes": lambda local, head: Pass()}, "passes of mine: expected a sequence of Pass, got Pass"),
        ({"passes": lambda local, head: [1]}, "passes of mine: expected a sequence of Pass, got int"),
        ({"passes": lambda local, head: []}, "passes of mine: expected a sequence of Pass, got none"),
        ({"passes": lambda local, head: 1 / 0}, "passes of mine: ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_function_of_the_method_returns_is_looked_at_before_the_first_round(changes, words):
    mine(**changes)
    with pytest.raises(ConfigError, match=f"^method: the {words}"):
        run(tiny_config(method="mine"), data=tiny_data(), model=tiny_model())


def test_a_penalty_that_changes_what_it_is_given_is_refused():
    mine(penalty_gradient=lambda now, received: now.sub_(received))
    with pytest.raises(ConfigError, match="penalty_gradient of mine: expected what it is given as it was"):
        train(rounds=1)


# ---- what it asks for --------------------------------------------------------------------------------------


def asks(class_ids=None, denominator=None, log_expected_count=None, whole=None):
    """A request as of pos_only's, but for this."""

    def request(num_classes, positives, negatives, correction):
        found = (
            whole if whole is not None else POS_ONLY.request(num_classes, positives, negatives, correction)
        )
        changes = {"class_ids": class_ids, "denominator": denominator}
        changes |= {"log_expected_count": log_expected_count}
        given = {name: change(found.class_ids) for name, change in changes.items() if change}
        return replace(found, **given) if given else found

    return request


def long(ids: torch.Tensor, *numbers: int) -> torch.Tensor:
    return torch.cat([ids, torch.tensor(numbers, dtype=torch.int64)])


@pytest.mark.parametrize(
    "request_, words",
    [
        (asks(whole=(1, 2, 3)), "expected a Request, got tuple"),
        (
            asks(lambda ids: ids.tolist()),
            "class_ids: expected an int64 tensor of one dimension in main memory, got list",
        ),
        (
            asks(lambda ids: ids.double()),
            "class_ids: expected an int64 tensor of one dimension in main memory, got torch.flo",
        ),
        (
            asks(lambda ids: ids[None]),
            r"class_ids: expected .* of one dimension in main memory, got torch.int64 of shape \(1, ",
        ),
        (asks(lambda ids: ids.flip(0)), r"class_ids: expected them ascending, each once, got \[\d, \d"),
        (asks(lambda ids: ids.repeat_interleave(2)), "class_ids: expected them ascending, each once"),
        (asks(lambda ids: long(ids, 7)), "class_ids: expected classes from 0 to 6, got 7"),
        (asks(lambda ids: long(ids[:0], -1, *ids)), "class_ids: expected classes from 0 to 6, got -1"),
        (
            asks(lambda ids: ids[1:]),
            r"class_ids: expected the client's own classes among them, without \[\d\]",
        ),
        (asks(lambda ids: ids[:0]), "class_ids: expected the client's own classes among them, without"),
        (
            asks(denominator=lambda ids: torch.tensor([9])),
            r"denominator: expected positions in class_ids, from 0 to \d, not class ids, got 9",
        ),
        (asks(denominator=lambda ids: torch.tensor([0, 0])), "denominator: expected each position once"),
        (
            asks(denominator=lambda ids: [0]),
            "denominator: expected an int64 tensor of one dimension in main memory, got list",
        ),
        (
            asks(denominator=lambda ids: torch.tensor([0])),
            r"log_expected_count: expected a number for each of the denominator, 1, got \d",
        ),
        (
            asks(log_expected_count=lambda ids: torch.zeros(1)),
            r"log_expected_count: expected a number for each of class_ids, \d, got 1",
        ),
        (
            asks(log_expected_count=lambda ids: torch.full((len(ids),), -math.inf)),
            "log_expected_count: expected finite numbers",
        ),
        (
            asks(log_expected_count=lambda ids: torch.zeros(len(ids), dtype=torch.int64)),
            "log_expected_count: expected a floating tensor of one dimension in main memory, got torch.int64",
        ),
    ],
)
def test_a_request_that_cannot_be_is_refused_in_words_that_name_the_method_and_the_rule(request_, words):
    mine(POS_ONLY, request=request_)
    with pytest.raises(ConfigError, match=rf"method: the request of mine: {words}"):
        train()


def test_requests_of_methods_without_labels_need_no_classes():
    def nothing(num_classes, positives, negatives, correction):
        return Request(positives, None, torch.zeros(0))

    mine(METHODS["simclr"], request=nothing)
    player = Player(tiny_config(method="mine"), tiny_data(), tiny_model())
    assert len(player.request(0, 0, 0).class_ids) == 0


def test_who_does_not_sample_gets_no_negatives():
    seen = []

    def request(num_classes, positives, negatives, correction):
        seen.append(len(negatives))
        return POS_ONLY.request(num_classes, positives, negatives, correction)

    mine(POS_ONLY, request=request)
    assert bits(train(rounds=1)) == bits(train(rounds=1, method="pos_only")) and {*seen} == {0}
    mine(POS_ONLY, name="sampling", label="Sampling", request=request, samples=True)
    seen.clear()
    train(rounds=1, method="sampling")
    assert 2 in seen


def test_a_request_that_fails_for_the_client_that_it_is_tried_with_is_said_so():
    having = {(1, 2): "a"}

    def request(num_classes, positives, negatives, correction):
        having[tuple(positives.tolist())]

    mine(request=request)
    words = (
        r"method: the request of mine, asked for a client with class 0 alone of two, and no negatives: "
        r"KeyError: \(0,\)"
    )
    with pytest.raises(ConfigError, match=words) as caught:
        train(requests="pir")
    assert isinstance(caught.value.__cause__, KeyError)


# ---- its loss ----------------------------------------------------------------------------------------------


def usual(embeddings, rows, target, given):
    return given.sampled_softmax(embeddings, rows, target)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("method", ["fedss", "neg_only", "fedbabu_ss", "fedrep", "centralized"])
def test_the_usual_loss_as_a_methods_own_comes_to_the_same_bits(method, similarity):
    mine(METHODS[method], loss=usual)
    options = {"similarity": similarity, "client_momentum": 0.5, "dropout_rate": 0.2 * (method == "fedss")}
    assert bits(train(**options)) == bits(train(method=method, **options))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_logits_that_a_loss_is_given_are_those_of_the_usual_one(similarity):
    def loss(embeddings, rows, target, given):
        assert given.scale == 5.0 and given.similarity == similarity
        return torch.nn.functional.cross_entropy(given.logits(embeddings, rows), target)

    mine(METHODS["full_softmax"], loss=loss)
    own, plain = (train(method=name, similarity=similarity) for name in ("mine", "full_softmax"))
    torch.testing.assert_close(own.weight, plain.weight, rtol=1e-4, atol=1e-5)


def test_a_loss_is_given_how_many_images_the_client_has_of_each_class_that_it_asked_for():
    data, seen = tiny_data(), {}

    def loss(embeddings, rows, target, given, *, tau):
        ids = given.request.class_ids
        assert len(rows) == len(ids) == len(given.counts) and given.counts.dtype == torch.int64
        assert (given.counts[target] > 0).all() and tau == 0.5
        seen[tuple(ids[given.counts > 0].tolist())] = (*given.counts.tolist(),)
        return usual(embeddings, rows, target, given)

    mine(loss=loss, settings={"tau": 2.0})
    train(settings={"tau": 0.5}, cohort=5, rounds=1)
    assert seen.keys() == {tuple(data.labels[held].unique().tolist()) for held in data.clients}
    for held in data.clients:
        ids, counts = data.labels[held].unique(return_counts=True)
        found = seen[tuple(ids.tolist())]
        assert [count for count in found if count] == counts.tolist() and found.count(0) == 2


def test_what_a_loss_does_not_depend_on_stays_as_it_is():
    mine(loss=lambda embeddings, rows, target, given: embeddings.square().mean())
    first = train(rounds=1, client_lr=1e-30).weight
    result = train(rounds=1)
    assert torch.equal(result.weight, first)
    assert not torch.equal(result.extractor[1].weight, tiny_model()[1].weight)


@pytest.mark.parametrize(
    "returned, got",
    [
        (lambda x: None, "NoneType"),
        (lambda x: 0.5, "float"),
        (lambda x: x.sum(dim=1), r"one of shape \(3,\)"),
        (lambda x: x.detach().sum(), "one without a gradient"),
    ],
)
def test_a_loss_that_cannot_be_minimised_is_refused(returned, got):
    mine(loss=lambda embeddings, rows, target, given: returned(embeddings))
    words = rf"method: the loss of mine: expected the batch's mean loss, .* of shape \(\) .*, got {got}$"
    with pytest.raises(ConfigError, match=words):
        train()


@pytest.mark.exhaustive
def test_a_method_with_a_loss_of_its_own_stands_what_others_do(tmp_path):
    (tmp_path / "lc.py").write_text(
        """
from dataclasses import replace
from torch.nn.functional import cross_entropy
from fedss_kernels.federated import register
from fedss_kernels.federated.algorithms import METHODS

def loss(embeddings, rows, target, given, *, tau):
    margin = tau * given.counts.clamp(min=1e-8) ** -0.25
    return cross_entropy(given.logits(embeddings, rows) - margin, target)

register(replace(METHODS["full_softmax"], name="lc", label="LC", summary="Margins.", paper="", loss=loss,
                 settings={"tau": 0.5}))
"""
    )
    plugins.load_plugins([tmp_path / "lc.py"])
    check_method("lc", partition="dirichlet")


# ---- its penalty -------------------------------------------------------------------------------------------


def test_without_weight_a_penalty_changes_no_bit_and_with_much_nothing_moves_far():
    mine(penalty_gradient=proximal, settings={"mu": 0.0})
    plain, none = train(method="fedss"), train()
    assert bits(none) == bits(plain)
    first = tiny_model().state_dict()
    near = train(settings={"mu": 4.0}, local_epochs=5).extractor.state_dict()
    far = train(local_epochs=5).extractor.state_dict()
    for name, value in first.items():
        assert (near[name] - value).norm() < 0.5 * (far[name] - value).norm()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_penalty_pulls_net_and_rows_as_torch_has_it(momentum, monkeypatch):
    """Two steps of a client against plain autograd, on the loss with mu / 2 |now - received|^2 in it."""
    from fedss_kernels.federated.algorithms.parts import Part, Parts, Pass
    from fedss_kernels.federated.clients.augment import Augmentation
    from fedss_kernels.federated.clients.client import Client
    from fedss_kernels.federated.clients.extractor import Extractor

    data, mu, lr = tiny_data(), 0.7, 0.3
    net, ids = tiny_model(), torch.arange(data.num_classes)
    client = Client(
        Extractor(tiny_model()),
        data,
        schedule=[Pass()] * 3,
        batch_size=100,
        scale=5.0,
        seed=0,
        momentum=momentum,
        augmentation=Augmentation(0, 0, False),
        penalty_gradient=lambda now, received: mu * (now - received),
    )
    rows = torch.randn(len(ids), 4, generator=torch.Generator().manual_seed(0))
    parts = Parts((Part.TRAINED,), Part.TRAINED)
    phi = client.extractor.flat.clone()
    request = Request(ids, None, torch.zeros(len(ids)))
    update = client.update(1, 0, 0, request, phi, rows, lr, parts)
    moved = [*net.parameters(), rows.clone().requires_grad_()]
    first = [p.detach().clone() for p in moved]
    optimiser = torch.optim.SGD(moved, lr, momentum)
    held = data.clients[1]
    for _ in range(3):
        optimiser.zero_grad()
        embeddings = torch.nn.functional.normalize(net(data.images[held] / 255), dim=1)
        logits = 5.0 * embeddings @ torch.nn.functional.normalize(moved[-1], dim=1).T
        loss = torch.nn.functional.cross_entropy(logits, data.labels[held])
        loss = loss + mu / 2 * sum((p - q).square().sum() for p, q in zip(moved, first, strict=True))
        loss.backward()
        optimiser.step()
    after = torch.cat([p.detach().flatten() for p in moved[:-1]])
    torch.testing.assert_close(phi - update.extractor, after, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows - update.rows, moved[-1].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("returned, got", [(lambda now: None, "NoneType"), (lambda now: now.sum(), r"\(\)")])
def test_a_penalty_that_is_no_gradient_is_refused(returned, got):
    mine(penalty_gradient=lambda now, received: returned(now))
    words = rf"method: the penalty_gradient of mine: expected a tensor of shape \(148,\), got {got}"
    with pytest.raises(ConfigError, match=words):
        train()


# ---- numbers of its own ------------------------------------------------------------------------------------


def test_settings_have_the_methods_defaults_and_reach_the_hooks_that_name_them():
    seen = set()

    def request(num_classes, positives, negatives, correction, *, share):
        seen.add(share)
        return FEDSS.request(num_classes, positives, negatives, correction)

    mine(request=request, penalty_gradient=proximal, settings={"mu": 0, "share": 0.5})
    assert tiny_config(method="mine").settings == {"mu": 0.0, "share": 0.5}
    train(rounds=1)
    train(rounds=1, settings={"share": 0.75})
    assert seen == {0.5, 0.75}
    assert Config(method="mine", settings={"share": 1}).settings == {"mu": 0.0, "share": 1.0}


def test_settings_are_saved_where_there_are_some_and_read_again(tmp_path):
    mine(penalty_gradient=proximal, settings={"mu": 0.1})
    config = tiny_config(method="mine", settings={"mu": 0.5})
    config.save(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["settings"] == {"mu": 0.5}
    assert Config.load(tmp_path / "config.json") == config
    assert "settings" not in tiny_config().to_dict() and tiny_config().settings == {}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"mu2": 1}, r"settings: no method has mu2 \(did you mean mu\?\)"),
        ({"mu": "1"}, "settings: mu: expected a finite number, got '1'"),
        ({"mu": math.nan}, "settings: mu: expected a finite number, got nan"),
        ({"mu": True}, "settings: mu: expected a finite number, got True"),
        ([1], r"settings: expected numbers by name, as \{'mu': 0.1\}, got \[1\]"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    mine(penalty_gradient=proximal, settings={"mu": 0.1})
    with pytest.raises(ConfigError, match=words):
        Config(method="mine", settings=settings)


def test_settings_where_no_method_has_some_are_refused():
    with pytest.raises(ConfigError, match="settings: no method has mu"):
        Config(settings={"mu": 1.0})


def test_another_number_of_a_setting_is_another_run(tmp_path):
    mine(penalty_gradient=proximal, settings={"mu": 0.1})
    train(rounds=1, out=tmp_path)
    options = {"out": tmp_path, "method": "mine", "rounds": 2}
    with pytest.raises(ValueError, match=r"settings: \{'mu': 0.1\} there, \{'mu': 0.2\} here"):
        run(tiny_config(settings={"mu": 0.2}, **options), data=tiny_data(), model=tiny_model(), resume=True)


@pytest.mark.parametrize(
    "hook",
    [
        {"request": lambda of: lambda *given: corrected(FEDSS.request(*given), of)},
        {"loss": lambda of: lambda x, w, t, given: of * given.sampled_softmax(x, w, t)},
        {"penalty_gradient": lambda of: lambda now, received: of * (now - received)},
        {"parts": lambda of: lambda blocks: Parts((Part.FROZEN if of > 1 else Part.TRAINED,), Part.TRAINED)},
        {"passes": lambda of: lambda local, head: [Pass()] * round(10 * of - 9)},
        {"passes": lambda of: lambda local, head: [Pass()] * (local if local < 2 else round(10 * of - 9))},
        {"own_push": lambda of: of == 1},
        {"request": lambda of: lambda n, p, *given: corrected(FEDSS.request(n, real(p, n), *given), of)},
    ],
)
def test_another_function_of_the_method_is_another_run(hook, tmp_path):
    """As where a plugin, or what it imports, is edited between a stop and a resume."""
    ((name, function),) = hook.items()

    def go_on(of, **options):
        METHODS.pop("mine", None)
        mine(**{name: function(of)})
        config = tiny_config(**{"method": "mine", "out": tmp_path, "rounds": 2, "local_epochs": 2} | options)
        return run(config, data=tiny_data(), model=tiny_model(), resume=not options)

    go_on(1.0, rounds=1)
    with pytest.raises(ValueError, match="another method: not as it was: what the method computes"):
        go_on(1.1)
    assert len(go_on(1.0).history) == 2


def test_settings_of_another_method_are_worth_a_word():
    mine(penalty_gradient=proximal, settings={"mu": 0.1})
    assert idle([Config(method="mine", settings={"mu": 0.2})]) == []
    (line,) = idle([Config(settings={"mu": 0.2})])
    assert line == "settings {'mu': 0.2} has no effect: it is for mine"


def test_a_comparison_has_numbers_for_all_and_a_methods_own_under_each_of_its_names():
    mine(penalty_gradient=proximal, settings={"mu": 0.1, "nu": 0.0}, passes=_passes)
    own = {"near": {"method": "mine", "settings": {"mu": 4}}, "mine": {}}
    plan = Plan(Config(settings={"nu": 2}), ["fedss", "mine", "near"], seeds=[0], own=own)
    fedss, plain, near = (plan.config_of(case).settings for case in plan.cases)
    assert (fedss, plain, near) == ({"nu": 2.0}, {"mu": 0.1, "nu": 2.0}, {"mu": 4.0, "nu": 2.0})
    assert len({plan.config_of(case) for case in plan.cases}) == 3  # and they have a hash


def _passes(local_epochs, head_epochs, *, nu):
    return FEDSS.passes(local_epochs, head_epochs)


def test_who_reads_an_option_is_asked_when_it_is_said():
    mine()
    assert idle([Config(method="mine", negatives="sticky")]) == []
    (line,) = idle([Config(method="pos_only", correction="none")])
    assert "mine" in line


def test_a_report_has_the_numbers_of_a_methods_own(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "save_plots", lambda folder, runs: ["", ""])
    mine(penalty_gradient=proximal, settings={"mu": 0.1})
    results = [train(rounds=1, method="fedss"), train(rounds=1, settings={"mu": 0.5})]
    results.append(train(rounds=1, settings={"mu": 4.0}, label="Far"))
    runs = [Run(result.config, result.history, result.summary) for result in results]
    for played, words in (
        (runs[1:2], "Mine. With mu=0.5.</dd>"),
        (runs[:2], "Mine. With mu=0.5.</dd>"),
        (runs, "Mine. Mine: mu=0.5; Far: mu=4.</dd>"),
    ):
        if len(played) == 1:
            report.write_run_report(tmp_path, *played)
        else:
            report.write_comparison_report(tmp_path, played, ["method"], [], [])
        text = (tmp_path / "report.html").read_text()
        assert words in text and text.count("mu=0.5") == 1 + (len(played) == 1)


# ---- what every method stands ------------------------------------------------------------------------------


def test_a_method_that_is_not_a_function_of_the_round_is_found_out():
    counted = itertools.count()

    def penalty_gradient(now, received):
        return next(counted) * 0.01 * (now - received)

    mine(penalty_gradient=penalty_gradient)
    with pytest.raises(AssertionError, match="mine: once more it comes to other numbers"):
        check_method("mine")


@pytest.mark.parametrize("method", ["fedss", "full_softmax", "fedrep", "simclr", "layerwise", "centralized"])
def test_it_is_tried_without_settings_that_have_no_effect(method, monkeypatch):
    tried = []

    class Enough(Exception):
        pass

    def look(config):
        tried.append(config)
        raise Enough

    monkeypatch.setattr(testing, "run", look)
    with pytest.raises(Enough):
        check_method(method)
    assert not idle(tried)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["fedss", "fedrep", "local_only", "simclr", "layerwise"])
def test_methods_of_the_package_stand_it(method):
    check_method(method)


# ---- a file of it, on the command line ---------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prox.py"
    path.write_text(FILE)
    return path


def fails(capsys, *argv) -> str:
    assert cli.main([str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_file_is_imported_before_its_method_is_asked_for(file, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["run", *SMALL, "--rounds=1", "--method=prox", "--set", "mu=0.5", f"--out={out}"]
    assert cli.main([*argv, f"--plugin={file}"]) == 0
    assert json.loads((out / "config.json").read_text())["settings"] == {"mu": 0.5}
    assert "mu=0.5" in (out / "report.html").read_text()
    assert cli.main(["methods", "--plugin", str(file)]) == 0
    (shown,) = (part for part in capsys.readouterr().out.split("\n\n") if part.startswith("prox (Prox)"))
    assert "--set: mu=0.25" in shown
    assert fails(capsys, *argv, "--overwrite", "--set=mu2=1").endswith(
        "--set: no method has mu2 (did you mean mu?)"
    )
    assert "--set: expected NAME=NUMBER, got 'mu'" in fails(capsys, *argv, "--set=mu")


def test_of_what_is_of_a_method_that_is_not_known_the_way_to_it_is_said(file, tmp_path, capsys):
    out, compared = tmp_path / "out", tmp_path / "compared"
    plugins.load_plugins([file])
    for folder in (out, compared):
        folder.mkdir()
    Config(method="prox").save(out / "config.json")
    Plan(Config(), ["fedss", "prox"], seeds=[0]).save(compared)
    del METHODS["prox"], sys.modules[f"{plugins.PREFIX}prox"]
    plugins.os.environ[plugins.FILES] = ""
    words = "was made with the method 'prox', which is not known here: --plugin FILE imports the file that "
    for argv in (
        ["report", out],
        ["confusion", out],
        ["run", "--resume", out],
        ["noise", "--run", out],
        ["run", "--config", out / "config.json"],
        ["report", compared],
        ["compare", "--resume", compared],
    ):
        line = fails(capsys, *argv)
        assert words in line and "--config:" not in line and line.endswith("defines it"), line
    assert "no run in" in fails(capsys, "report", out, f"--plugin={file}")


def test_how_a_stopped_run_or_comparison_goes_on_is_said_with_its_files(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "of mine"
    folder.mkdir()
    file, out = folder / "prox.py", folder / "run 1"
    file.write_text(FILE)

    def stopped(*arguments, **options):
        raise Stopped(2, out)

    def lost(*arguments, **options):
        return Comparison([], [], ["FedSS, seed 0 failed"], out, go_on=True)

    monkeypatch.setattr(cli.train, "run", stopped)
    monkeypatch.setattr("fedss_kernels.federated.comparisons.compare.compare", lost)
    for command in (["run", "--method=prox"], ["compare", "--methods=prox", "--seeds=0"]):
        cli.main([*command, *SMALL, f"--plugin={file}", f"--out={out}"])
        way = f"go on with: fedss {command[0]} --resume '{out}' --plugin '{file}'"
        assert capsys.readouterr().err.splitlines()[-1].endswith(way)
    (line,) = report.attempt(out, stopped)
    again = f"fedss report '{out}' --plugin '{file}'"
    assert line.endswith(f"to try again: {again}")
    played = tiny_config(out=out, rounds=1)
    run(played, data=tiny_data(), model=tiny_model())
    with pytest.raises(CheckpointError) as refused:
        run(played, data=tiny_data(), model=tiny_model(), resume=True)
    assert str(refused.value).endswith(f"for its report: {again}")


@pytest.mark.parametrize("workers", [1, *later(2)])
def test_a_plugin_finds_modules_beside_it(workers, file, tmp_path):
    name = f"beside_{workers}"
    (tmp_path / f"{name}.py").write_text("def pull(now, received, mu):\n    return mu * (now - received)\n")
    file.write_text(
        FILE.replace("return mu * (now - received)", f"import {name} as m; return m.pull(now, received, mu)")
    )
    plugins.load_plugins([file])
    options = {"method": "prox", "rounds": 1, "settings": {"mu": 0.5}}
    assert bits(train(workers=workers, **options)) != bits(train(method="fedss", rounds=1))
    wrong, before = tmp_path / "other" / "wrong.py", [*sys.path]
    wrong.parent.mkdir()
    wrong.write_text("x = 1")
    with pytest.raises(ConfigError, match="expected a call of register"):
        plugins.load_plugins([wrong])
    assert sys.path == before


@pytest.mark.exhaustive
def test_a_plugin_is_there_in_the_workers_of_a_run(file):
    plugins.load_plugins([file])
    options = {"method": "prox", "rounds": 1, "settings": {"mu": 0.5}}
    assert (
        bits(train(workers=2, **options)) == bits(train(**options)) != bits(train(method="fedss", rounds=1))
    )


@pytest.mark.exhaustive
def test_a_plugin_is_there_in_the_jobs_of_a_comparison_and_in_the_next_process(file, tmp_path, capsys):
    out = tmp_path / "out"
    small = [*SMALL, "--rounds=1", "--seeds=0", "--methods=prox,fedss", "--set=mu=0.5"]
    assert cli.main(["compare", *small, f"--plugin={file}", f"--out={out}"]) == 0
    assert Config.load(out / "prox-seed0" / "config.json").settings == {"mu": 0.5}
    code = "import sys; from fedss_kernels.federated.cli import main; sys.exit(main(sys.argv[1:]))"
    for argv in (["report", out / "prox-seed0"], ["compare", "--resume", out]):
        subprocess.run([sys.executable, "-c", code, *argv, f"--plugin={file}"], check=True)


@pytest.mark.parametrize(
    "text, words",
    [
        ("import nothing_like_it", "line 1: ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("x = 1\ny = x.z", "line 2: AttributeError: 'int' object has no attribute 'z'"),
        ("x = (", "SyntaxError: '(' was never closed"),
        ("import sys\nsys.exit()", "line 2: SystemExit"),
        ("import sys\nsys.exit('no GPU here')", "line 2: SystemExit: no GPU here"),
        ("x = 1", "expected a call of register(method) in it, got none"),
        (FILE.replace('"prox"', '"fedss"'), "ValueError: register: name: expected one that no method has"),
        (None, "no such file"),
    ],
)
def test_a_file_that_cannot_be_imported_is_said_with_its_cause(text, words, tmp_path, capsys):
    path, before = tmp_path / "wrong.py", dict(METHODS)
    if text is not None:
        path.write_text(text)
    line = fails(capsys, "run", *SMALL, f"--plugin={path}")
    assert line.startswith(f"fedss run: --plugin: {path}: ") and words in line
    assert before == METHODS and not plugins.os.environ[plugins.FILES]


def test_a_loss_that_can_be_asked_of_its_own_classes_alone_has_numbers_too():
    """So that a resume is refused where it is another by then."""

    def method(weights):
        def loss(embeddings, rows, target, given):
            logits = embeddings @ rows[:, : embeddings.shape[1]].T
            return cross_entropy(logits, target, weight=weights[given.request.class_ids])

        return replace(METHODS["full_softmax"], loss=loss)

    first, second = (method_numbers(method(w), Config(), 20) for w in (torch.ones(20), torch.arange(1.0, 21)))
    assert len(first) == len(second) and first != second


def test_a_request_that_is_another_for_many_classes_alone_has_other_numbers():
    """As of one that asks for a few of those that a client holds."""

    def method(most):
        def request(num_classes, held, others, correction):
            return METHODS["fedss"].request(num_classes, held[:most], others, correction)

        return replace(METHODS["fedss"], request=request)

    few, more = (method_numbers(method(most), Config(), 100) for most in (3, 8))
    assert few != more and more != method_numbers(METHODS["fedss"], Config(), 100)


def test_each_of_many_numbers_counts():
    """As of a request that can be made of the run's own classes alone, which are many."""

    def method(place):
        def request(num_classes, held, others, correction):
            more = torch.zeros(5000)
            more[place] = 1.0
            found = METHODS["full_softmax"].request(num_classes, held, others, correction)
            return replace(found, log_expected_count=found.log_expected_count + more)

        return replace(METHODS["full_softmax"], request=request)

    usual, *others = (method_numbers(method(place), Config(), 5000) for place in (701, 702, 704, 733))
    for other in others:
        assert len(usual) == len(other) and not _alike(usual, other)
