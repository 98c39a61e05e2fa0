"""Secure sums of a server and nodes, message by message: who drops out, who lies, and what is learned."""

import base64
import copy
from functools import cache

import numpy as np
import pytest
import torch
from later import later

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedss-kernels[flower]'")

from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from flwr.app import RecordDict
from flwr.supercore.primitives.asymmetric import generate_key_pairs

from fedss_kernels.federated import secure_sums
from fedss_kernels.federated.flower import masks, member, sums
from fedss_kernels.federated.flower.keys import CHANGES, CLASSES, Public, rebuilt
from fedss_kernels.federated.flower.member import Membership
from fedss_kernels.federated.flower.sums import SumLost, Sums
from fedss_kernels.federated.flower.wire import WORDS, message, number_of
from fedss_kernels.federated.messages import Silence

SIZE, THRESHOLD = 6, 3
CLIENTS = (1, 4, 5, 8, 9)
KINDS = ("query.keys", "query.shares", "query.union", "query.open", "train")


class Fleet:
    """Nodes that add up these vectors, in both sums."""

    def __init__(self, vectors: dict[int, np.ndarray]):
        self.vectors, self.states = vectors, {k: RecordDict() for k in vectors}
        self.gone: set[tuple[str, int]] = set()  # (kind, client): does not answer
        self.change = lambda kind, client, answer: answer
        self.said: list[tuple[str, int, dict]] = []

    def __call__(self, kind, contents):
        answers = {k: self.answer(kind, k, words) for k, (words, _) in contents.items()}
        silent = {k: Silence("dropped") for k in contents if answers[k] is None}
        return {k: answer for k, answer in answers.items() if answer is not None}, silent

    def answer(self, kind, client, words):
        if (kind, client) in self.gone:
            return None
        part = Membership(self.states[client], client, 0, 0)
        try:
            answer = message(*self.of(kind, part, client, words))
        except ValueError:  # as a node refuses
            return None
        self.said.append((kind, client, dict(answer[WORDS])))
        return self.change(kind, client, answer)

    def of(self, kind, part, client, words):
        if kind == "query.keys":
            return ({"keys": part.keys()},)
        if kind == "query.shares":
            return ({"shares": part.shares(words["clients"], words["keys"], words["threshold"])},)
        if kind == "query.open":
            return ({"shares": part.open(words["sum"], words["active"], words["dropped"])},)
        if kind == "query.union" and (unsound := part.join(words["from"], words["shares"])):
            return ({"unsound": unsound},)
        number = CLASSES if kind == "query.union" else CHANGES
        found = part.masked(number, self.vectors[client]).astype(np.uint32).view(np.int32)
        return {}, {"masked": torch.from_numpy(found)}


def fleet(clients=CLIENTS) -> Fleet:
    drawn = np.random.default_rng(0)
    return Fleet({k: drawn.integers(2**32, size=SIZE) for k in clients})


def classes(nodes: Fleet, made: Sums):
    return made.of(CLASSES, "query.union", {k: (made.joining(k), {}) for k in made.members}, SIZE)


@cache
def dealt() -> tuple[dict[int, RecordDict], Sums]:
    nodes = fleet()
    made = Sums(nodes, THRESHOLD)
    made.set_up(CLIENTS)
    return nodes.states, made


def set_up(nodes: Fleet) -> Sums:
    """As if they had just dealt their shares, which takes its time."""
    nodes.states, made = copy.deepcopy(dealt()[0]), copy.copy(dealt()[1])
    made.ask, made.silent, made.liars = nodes, {}, set()
    return made


def added(nodes: Fleet, made: Sums | None = None):
    """(the sums, who is in the first, it, who in the second, it)"""
    if made is None:
        made = Sums(nodes, THRESHOLD)
        made.set_up(CLIENTS)
    first = classes(nodes, made)
    return made, *first, *made.of(CHANGES, "train", dict.fromkeys(first[0], ({}, {})), SIZE)


def plain(nodes: Fleet, clients) -> list[int]:
    return (sum(nodes.vectors[k] for k in clients) % 2**32).tolist()


# ---- sums --------------------------------------------------------------------------------------------------


LOST = [("train", 0), ("train", 2)]
MORE_LOST = [(kind, lost) for kind in KINDS for lost in (1, 2) if (kind, lost) not in LOST]


@pytest.mark.parametrize("kind, lost", [*LOST, *later(*MORE_LOST)])
def test_sums_are_those_of_who_answers_whoever_drops_out(kind, lost):
    nodes = fleet()
    nodes.gone = {(kind, k) for k in CLIENTS[1 : 1 + lost]}
    made, holding, first, active, second = added(nodes)
    left = [k for k in CLIENTS if (kind, k) not in nodes.gone]
    there = list(CLIENTS) if kind == "query.open" else left  # who sent all, and then was gone
    assert holding == (list(CLIENTS) if kind == "train" else there) and active == there
    assert first.tolist() == plain(nodes, holding) and second.tolist() == plain(nodes, active)
    assert set(made.silent) == set(CLIENTS) - set(there)


@pytest.mark.parametrize(
    "kind", ["query.keys", "train", *later(*["query.shares", "query.union", "query.open"])]
)
def test_below_the_threshold_nothing_is_learned(kind):
    nodes = fleet()
    nodes.gone = {(kind, k) for k in CLIENTS[:3]}
    with pytest.raises(SumLost, match="2 clients are left, and 3 are needed"):
        added(nodes)
    if kind in ("query.keys", "query.shares", "query.union"):
        assert "query.open" not in {said for said, _, _ in nodes.said}


@pytest.mark.parametrize("lost", [*later(*[0, 1]), 2])
def test_a_mean_of_changes_is_the_plain_one_to_the_rounding(lost):
    drawn = torch.Generator().manual_seed(0)
    changes = {k: torch.randn(SIZE, generator=drawn) for k in CLIENTS}
    images = {k: 3 + 2 * k for k in CLIENTS}
    most = max(images.values())
    nodes = fleet()
    for k, u in changes.items():
        rounded = secure_sums.quantised(u, images[k] / most, np.random.default_rng(k))
        nodes.vectors[k] = secure_sums.integers(rounded, images[k] / most).numpy()
    nodes.gone = {("train", k) for k in CLIENTS[:lost]}
    *_, active, total = added(nodes, set_up(nodes))
    weight = sum(images[k] for k in active) / most
    found = secure_sums.mean(torch.from_numpy(total), len(active), weight)
    expected = sum(images[k] * changes[k].double() for k in active) / sum(images[k] for k in active)
    step = 2 * secure_sums.RANGE / secure_sums.LEVELS
    assert len(active) == 5 - lost
    assert (found - expected).abs().max() < len(active) * step / weight + 1e-6


def test_no_key_makes_two_masks(monkeypatch):
    """But for the one mask that two have in common. A key that the server comes to know is of one sum."""
    used = []

    def noted(key, size):
        used.append(key)
        return masks.stream(key, size)

    monkeypatch.setattr(member, "stream", noted)
    added(nodes := fleet(), set_up(nodes))
    times = sorted(used.count(key) for key in set(used))
    assert times == [1] * 10 + [2] * 20  # of 5 in two sums their own, and of 10 pairs in two sums


def test_what_a_server_comes_to_know_is_of_one_sum_alone(monkeypatch):
    """The key of one who drops out of the second, whose seed it had in the first, opens nothing there."""
    used = {"nodes": [], "server": []}
    for whose, module in (("nodes", member), ("server", sums)):
        monkeypatch.setattr(
            module,
            "stream",
            lambda key, size, whose=whose: used[whose].append(key) or masks.stream(key, size),
        )
    nodes = fleet()
    made = set_up(nodes)
    nodes.gone = {("train", 4)}
    holding, _ = classes(nodes, made)
    of_first = set(used["nodes"])
    del used["server"][:]
    made.of(CHANGES, "train", dict.fromkeys(holding, ({}, {})), SIZE)
    assert used["server"] and not of_first & set(used["server"])


def test_what_is_counted_is_what_moves():
    """But for a hash of each seed, which says whose shares are false."""
    sent = dict.fromkeys(CLIENTS, 0)
    got = dict.fromkeys(CLIENTS, 0)

    class Counted(Fleet):
        def __call__(self, kind, contents):
            answers, silent = super().__call__(kind, contents)
            for k, (words, _) in contents.items():
                got[k] += pieces(words)
            for k, answer in answers.items():
                sent[k] += pieces(answer[WORDS])
            return answers, silent

    def pieces(words):
        lists = [value for value in words.values() if isinstance(value, list)]
        return sum(len(piece) for value in lists for piece in value if isinstance(piece, bytes))

    added(Counted(fleet().vectors))
    expected = secure_sums.traffic(SIZE, 0, len(CLIENTS), 0, answers=True)
    own_keys = 2 * 2 * secure_sums.KEY_BYTES  # which a node is told among all
    assert set(got.values()) == {expected["down_shares"] + own_keys}
    assert set(sent.values()) == {expected["up_shares"] + 2 * 32}


# ---- lies --------------------------------------------------------------------------------------------------


def with_words(**words):
    def change(answer):
        for name, value in words.items():
            answer[WORDS][name] = value(answer[WORDS][name]) if callable(value) else value
        return answer

    return change


def put(place, piece):
    return lambda pieces: [*pieces[:place], piece, *pieces[place + 1 :]]


def numbers(tensor):
    return lambda answer: message({}, {"masked": tensor})


QUICK = ("a key that is none", "shares for too few", "numbers of another shape", "a complaint of nobody")
LIES = {
    "no keys": ("query.keys", lambda answer: message({}), "shares"),
    "too few keys": ("query.keys", with_words(keys=lambda keys: keys[1:]), "shares"),
    "a key that is none": ("query.keys", with_words(keys=put(0, b"key")), "shares"),
    "a key in words": ("query.keys", with_words(keys=["key"] * 6), "shares"),
    "a key of another curve": (
        "query.keys",
        with_words(
            keys=put(
                1,
                b"-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n"
                b"-----END PUBLIC KEY-----\n",
            )
        ),
        "shares",
    ),
    "one key twice": ("query.keys", with_words(keys=lambda keys: [keys[0], keys[0], *keys[2:]]), "shares"),
    "a hash that is none": ("query.keys", with_words(keys=put(2, b"short")), "shares"),
    "no shares": ("query.shares", lambda answer: message({}), "shares"),
    "shares for too few": ("query.shares", with_words(shares=lambda shares: shares[2:]), "shares"),
    "a share of another size": ("query.shares", with_words(shares=put(3, b"share")), "shares"),
    "numbers of another shape": ("train", numbers(torch.zeros(5, dtype=torch.int32)), "shape"),
    "numbers of another dtype": ("train", numbers(torch.zeros(SIZE)), "dtype"),
    "no numbers": ("query.union", lambda answer: message({}), "dtype"),
    "a complaint too late": ("train", lambda answer: message({"unsound": [1]}), "dtype"),
    "a complaint of nobody": ("query.union", lambda answer: message({"unsound": [77]}), "shares"),
    "a complaint of itself": ("query.union", lambda answer: message({"unsound": [4]}), "shares"),
    "a complaint in words": ("query.union", lambda answer: message({"unsound": "all"}), "shares"),
}


def lying(kind, lie, client=4) -> Fleet:
    nodes = fleet()
    nodes.change = lambda of, k, answer: lie(answer) if (of, k) == (kind, client) else answer
    return nodes


@pytest.mark.parametrize("name", [*QUICK, *later(*(name for name in LIES if name not in QUICK))])
def test_what_a_node_says_wrong_costs_its_part_alone(name):
    kind, lie, fault = LIES[name]
    nodes = lying(kind, lie)
    made, _, _, active, total = added(nodes, set_up(nodes) if kind in ("train", "query.union") else None)
    assert made.silent == {4: Silence("rejected", fault)} and not made.liars
    assert active == [1, 5, 8, 9] and total.tolist() == plain(nodes, active)


def falsified(share: bytes) -> bytes:
    return share[:-1] + bytes([share[-1] ^ 1])


AT_THE_END = {
    "too few": with_words(shares=lambda shares: shares[1:]),
    "of another size": with_words(shares=put(0, b"share")),
    "another's": with_words(shares=lambda shares: [bytes([9, 0, 0, 0]) + share[4:] for share in shares]),
    "false ones": with_words(shares=lambda shares: [falsified(share) for share in shares]),
}


ENDS = [(name, client) for name in AT_THE_END for client in (1, 5, 9)]


@pytest.mark.parametrize("name, client", [("false ones", 1), *later(*ENDS[:9]), *later(*ENDS[10:])])
def test_whoever_gives_false_shares_at_the_end_changes_nothing(name, client):
    nodes = lying("query.open", AT_THE_END[name], client)
    nodes.gone = {("train", 8)}  # so of a key too
    _, _, _, active, total = added(nodes, set_up(nodes))
    assert active == [1, 4, 5, 9] and total.tolist() == plain(nodes, active)


def of_another(nodes: Fleet, liar: int, to):
    """What the liar encrypts is of another attempt, for these others."""

    def change(kind, client, answer):
        if (kind, client) == ("query.shares", liar):
            shares = answer[WORDS]["shares"]
            others = [k for k in CLIENTS if k != liar]
            for place, k in enumerate(others):
                if k in to:
                    shares[place] = shares[place][::-1]
            answer[WORDS]["shares"] = shares
        return answer

    nodes.change = change


@pytest.mark.parametrize("to, blamed", [((5,), {5, 8}), *later(*[(CLIENTS, {8}), ((1, 5), {8})])])
def test_who_gives_others_what_they_cannot_use_is_found(to, blamed):
    """Of one who complains of one the server cannot know who lies."""
    nodes = fleet()
    of_another(nodes, 8, to)
    made = Sums(nodes, THRESHOLD)
    made.set_up(CLIENTS)
    with pytest.raises(SumLost, match=r"shares of clients \[8\] are not what others can use"):
        classes(nodes, made)
    assert made.liars == blamed


def test_who_complains_of_all_is_found():
    nodes = lying("query.union", lambda answer: message({"unsound": [1, 5, 8, 9]}))
    made = set_up(nodes)
    with pytest.raises(SumLost):
        classes(nodes, made)
    assert made.liars == {4}


def test_who_deals_shares_of_something_else_is_found(monkeypatch):
    nodes, real = fleet(), member.create_shares

    def dealt(secret, threshold, number):
        return real(secret if dealt.honest else secret[:-1] + bytes([secret[-1] ^ 1]), threshold, number)

    def of(kind, part, client, words):
        dealt.honest = client != 5
        return Fleet.of(nodes, kind, part, client, words)

    monkeypatch.setattr(member, "create_shares", dealt)
    nodes.of = of
    made = Sums(nodes, THRESHOLD)
    made.set_up(CLIENTS)
    with pytest.raises(SumLost, match=r"what clients \[5\] hide are not of one secret"):
        classes(nodes, made)
    assert made.liars == {5}


def test_two_who_show_one_key_are_both_out():
    nodes = fleet()
    shown = {}

    def copied(kind, client, answer):
        if kind == "query.keys":
            shown.setdefault("keys", answer[WORDS]["keys"])
            if client == 5:
                answer[WORDS]["keys"] = shown["keys"]
        return answer

    nodes.change = copied
    made, _, _, active, _ = added(nodes)
    assert active == [4, 8, 9] and set(made.silent) == {1, 5}


def test_a_key_of_any_other_kind_is_none():
    """None that a liar might make ends the server."""
    mask_key, share_key, seed_hash = Membership(RecordDict(), 1, 0, 0).keys()[:3]
    public = Public.read(mask_key, share_key, seed_hash)
    body = base64.b64decode(b"".join(mask_key.splitlines()[1:-1]))
    of_no_curve = base64.encodebytes(body.replace(bytes.fromhex("2b81040022"), bytes.fromhex("2b8104007f")))
    for key in (
        b"-----BEGIN PUBLIC KEY-----\n" + of_no_curve + b"-----END PUBLIC KEY-----\n",
        mask_key + b"\n",
    ):
        with pytest.raises(ValueError, match="a key: expected a public one of P-384"):
            Public.read(key, share_key, seed_hash)
    private, _ = generate_key_pairs()
    locked = BestAvailableEncryption(b"password")
    for secret in (b"", private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked)):
        assert not public.is_of_key(secret)


@pytest.mark.parametrize("false", range(4))
def test_one_false_share_of_four_where_three_are_enough(false):
    from flwr.common.secure_aggregation.crypto.shamir import create_shares

    shares = create_shares(bytes(range(32)), 3, 5)[:4]
    shares[false] = falsified(shares[false])
    assert rebuilt(shares, 3, bytes(range(32)).__eq__) == bytes(range(32))
    assert rebuilt(shares[:3], 3, bytes(range(32)).__eq__) == (bytes(range(32)) if false == 3 else None)


# ---- what a node refuses -----------------------------------------------------------------------------------


def joined(nodes: Fleet) -> Sums:
    made = set_up(nodes)
    for k in CLIENTS:
        part = Membership(nodes.states[k], k, 0, 0)
        words = made.joining(k)
        assert part.join(words["from"], words["shares"]) == []
    return made


def test_a_node_does_nothing_twice():
    nodes = fleet()
    joined(nodes)
    part = Membership(nodes.states[1], 1, 0, 0)
    part.masked(CLASSES, nodes.vectors[1])
    with pytest.raises(ValueError, match="a secure sum: expected what follows its stage"):
        part.masked(CLASSES, nodes.vectors[1])
    part.open(CLASSES, CLIENTS, [])
    with pytest.raises(ValueError, match="a secure sum"):
        part.open(CLASSES, CLIENTS[:4], CLIENTS[4:])


def test_a_node_opens_no_sum_that_it_has_no_part_in():
    nodes = fleet()
    joined(nodes)
    with pytest.raises(ValueError, match="a secure sum"):
        Membership(nodes.states[1], 1, 0, 0).open(CHANGES, CLIENTS, [])


@pytest.mark.parametrize(
    "active, dropped, words",
    [
        (CLIENTS, CLIENTS[1:2], "each of the sum's clients in one of them"),  # both of its secrets
        (CLIENTS[:4], (), "each of the sum's clients"),
        (CLIENTS[1:], CLIENTS[:1], "each of the sum's clients"),  # without itself
        (CLIENTS[:2], CLIENTS[2:], "active: expected at least 3 clients, got 2"),
    ],
)
def test_a_node_opens_a_sum_of_enough_alone(active, dropped, words):
    nodes = fleet()
    joined(nodes)
    part = Membership(nodes.states[1], 1, 0, 0)
    part.masked(CLASSES, nodes.vectors[1])
    with pytest.raises(ValueError, match=words):
        part.open(CLASSES, active, dropped)


@pytest.mark.parametrize("threshold", [0, 1, 4])
def test_a_node_takes_no_threshold_that_two_lists_of_clients_could_reach(threshold):
    part, keys = of_three()
    with pytest.raises(ValueError, match=r"threshold: expected more than half of 3 clients, and no more"):
        part.shares([1, 5, 9], keys, threshold)


def test_a_node_takes_no_keys_but_its_own_among_others():
    part, keys = of_three()
    with pytest.raises(ValueError, match=r"keys: expected 4 for each client, got 8 for 3"):
        part.shares([1, 5, 9], keys[:8], 2)
    for clients, given in (([5, 1, 9], keys), ([1, 5, 9], keys[:8] + keys[4:8])):
        with pytest.raises(ValueError, match=r"keys: expected this node's own among others, each once"):
            part.shares(clients, given, 2)


def of_three() -> tuple[Membership, list[bytes]]:
    """Of client 1, and the public keys of 1, 5 and 9."""
    parts = [Membership(RecordDict(), k, 0, 0) for k in (1, 5, 9)]
    shown = [part.keys() for part in parts]
    return parts[0], [key for each in shown for key in each[:2] + each[3:5]]


def test_a_node_that_was_started_again_has_no_keys():
    nodes = fleet()
    joined(nodes)
    for state, attempt in ((RecordDict(), 0), (nodes.states[1], 1)):
        with pytest.raises(ValueError, match="no keys of round 1, attempt .: was this node started again"):
            Membership(state, 1, 0, attempt).masked(CHANGES, nodes.vectors[1])


def test_what_a_node_sends_is_nothing_like_its_numbers():
    nodes = fleet()
    nodes.vectors = {k: np.zeros(2000, np.int64) for k in CLIENTS}
    joined(nodes)
    sent = [Membership(nodes.states[k], k, 0, 0).masked(CLASSES, nodes.vectors[k]) for k in CLIENTS]
    for vector in sent:
        assert abs(vector.mean() / 2**31 - 1) < 0.1 and len(set(vector.tolist())) == 2000
    content = message({}, {"masked": torch.from_numpy(sent[0].astype(np.uint32).view(np.int32))})
    assert number_of(content, "masked").dtype == torch.int32
