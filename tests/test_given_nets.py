"""A net that is handed over may be what torch.jit makes, or no net."""

import copy
import re

import pytest
import torch
from layered_net import layered_net
from tiny_federation import tiny_config, tiny_data, tiny_model
from torch import nn

from fedss_kernels.federated import ConfigError, load_net, run
from fedss_kernels.federated.clients.extractor import Extractor
from fedss_kernels.federated.models.copies import copied
from fedss_kernels.federated.probes.stage_costs import end_to_end
from fedss_kernels.federated.probes.tuned import fine_tuned


def loaded(net: nn.Module, folder) -> nn.Module:
    torch.jit.save(torch.jit.script(net), folder / "net.pt")
    return torch.jit.load(folder / "net.pt")


KINDS = {
    "script": lambda net, folder: torch.jit.script(net),
    "trace": lambda net, folder: torch.jit.trace(net, torch.rand(2, 1, 6, 6)),
    "load": loaded,
    "deepcopy": lambda net, folder: copy.deepcopy(torch.jit.script(net)),  # whose parameters are no leaves
    "part": lambda net, folder: nn.Sequential(torch.jit.script(net[0]), torch.jit.script(net[1])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_net_of_torch_jit_is_trained_as_the_module_that_it_was_made_of(kind, tmp_path):
    given = KINDS[kind](tiny_model(), tmp_path)
    before = [p.detach().clone() for p in given.parameters()]
    expected = run(tiny_config(), data=tiny_data(), model=tiny_model()).extractor
    result = run(tiny_config(out=tmp_path / "run"), data=tiny_data(), model=given)
    pairs = list(zip(expected.parameters(), result.extractor.parameters(), before, strict=True))
    for trained, found, begun in pairs:
        assert torch.allclose(found, trained, atol=1e-6) and not torch.equal(found, begun)
    assert all(map(torch.equal, given.parameters(), before))
    net, _ = load_net(tmp_path / "run", model=given)
    assert all(p.is_leaf and p.requires_grad for p in net.parameters())
    assert all(map(torch.equal, net.parameters(), result.extractor.parameters()))


@pytest.mark.parametrize(
    ("method", "options"), [("simclr", {}), ("fl_moco", {"queue_size": 8}), ("fedbabu", {}), ("fedper", {})]
)
def test_other_methods_train_it_too(method, options, tmp_path):
    config = tiny_config(method=method, **options)
    nets = tiny_model(), torch.jit.script(tiny_model())
    expected, found = (run(config, data=tiny_data(), model=net).extractor for net in nets)
    for ours, other in zip(expected.parameters(), found.parameters(), strict=True):
        assert torch.allclose(ours, other, atol=1e-5)


def test_what_it_has_frozen_stays():
    net = torch.jit.script(tiny_model())
    frozen = dict(net.named_parameters())["1.bias"].requires_grad_(False)
    before = frozen.clone()
    result = run(tiny_config(), data=tiny_data(), model=net)
    assert torch.equal(dict(result.extractor.named_parameters())["1.bias"], before)


def scripted() -> nn.Module:
    net = layered_net()
    net.layers = nn.ModuleList(map(torch.jit.script, net.layers))
    return net


@pytest.mark.exhaustive
def test_blocks_of_torch_jit_are_trained_block_by_block():
    config, nets = tiny_config(method="layerwise"), (layered_net(), scripted())
    expected, found = (run(config, data=tiny_data(), model=net).extractor for net in nets)
    for ours, other in zip(expected.parameters(), found.parameters(), strict=True):
        assert torch.allclose(ours, other, atol=1e-5)


def test_blocks_of_torch_jit_are_measured():
    data, images, nets = tiny_data(), torch.rand(2, 1, 6, 6), (layered_net(), scripted())
    assert len({end_to_end(net, images).trained for net in nets}) == 1
    asked = data.images, data.labels, data.test_images, data.test_labels
    assert len({fine_tuned(net, 1, *asked, epochs=2) for net in nets}) == 1


@pytest.mark.parametrize(
    ("model", "got"),
    [(lambda x: x, "a function"), (nn.Linear, "the class Linear"), ("conv4", "a str"), (len, "a builtin_")],
)
def test_what_is_no_net_is_refused_by_name(model, got, tmp_path):
    words = re.escape(f"model: expected a torch.nn.Module, got {got}")
    with pytest.raises(TypeError, match=words):
        run(tiny_config(), data=tiny_data(), model=model)
    with pytest.raises(TypeError, match=words):
        run(tiny_config(workers=2), data=tiny_data(), model=model)


def test_what_is_no_data_is_refused_by_name():
    with pytest.raises(TypeError, match="data: expected a FederatedData, got a list"):
        run(tiny_config(), data=[], model=tiny_model())


def test_a_net_that_cannot_be_copied_is_refused_in_words():
    net = tiny_model()
    net.kept = net[1].weight * 2  # as torch's former weight_norm keeps one
    words = r"model: expected a net that copy\.deepcopy copies, got RuntimeError"
    with pytest.raises(ValueError, match=words):
        run(tiny_config(), data=tiny_data(), model=net)


def test_a_net_that_cannot_be_sent_to_workers_is_refused_in_words():
    with pytest.raises(ConfigError, match="workers: a net of torch.jit cannot be sent.*: set workers to 1"):
        run(tiny_config(workers=2), data=tiny_data(), model=torch.jit.script(tiny_model()))


def test_parameters_that_are_no_leaves_are_refused():
    net = copy.deepcopy(torch.jit.script(tiny_model()))
    with pytest.raises(ValueError, match=r"model: expected parameters that are leaves, got '1\.weight'"):
        Extractor(net)


def test_a_copy_is_of_leaves_wherever_it_is_made():
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            made = copied(torch.jit.script(tiny_model()))
            assert all(p.is_leaf and p.requires_grad for p in made.parameters())


def test_a_net_of_lazy_layers_is_made_by_its_first_images_and_trained():
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    result = run(tiny_config(), data=tiny_data(), model=net)
    assert result.extractor[1].weight.shape == (4, 36) and nn.parameter.is_lazy(net[1].weight)


def test_a_copy_of_its_own_kind_is_refused_in_words():
    class Odd(nn.Linear):
        def __deepcopy__(self, memo):
            return nn.Linear(36, 4, bias=False)

    with pytest.raises(ValueError, match="model: expected a net that copy.deepcopy copies, got ValueError"):
        run(tiny_config(), data=tiny_data(), model=nn.Sequential(nn.Flatten(), Odd(36, 4)))
