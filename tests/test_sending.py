"""Nets of one's own: those that no worker could read, and those that return no embeddings."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_federation import tiny_config, tiny_data, tiny_model
from torch import nn

from fedss_kernels.federated import ConfigError, run

NOTEBOOK = """
import sys
sys.path.insert(0, {tests!r})
from tiny_federation import nn, tiny_config, tiny_data
from fedss_kernels.federated import ConfigError, run

class Net(nn.Sequential):
    pass

try:
    run(tiny_config(workers=2, out={out!r}), data=tiny_data(), model=Net(nn.Flatten(), nn.Linear(36, 4)))
except ConfigError as error:
    print(error)
"""


@pytest.mark.exhaustive
def test_a_net_of_a_notebook_is_refused_with_the_reason_and_the_way(tmp_path):
    """A notebook's __main__, as a prompt's, is no file that another process could read."""
    code = NOTEBOOK.format(tests=str(Path(__file__).parent), out=str(tmp_path / "out"))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == (
        "workers: the net cannot be sent to another process: Net is defined in a notebook or at a prompt; "
        "define it in a module, import it from there, or set workers to 1\n"
    )
    assert done.stderr == "" and not (tmp_path / "out").exists()


def test_so_is_one_that_cannot_be_pickled():
    model = tiny_model()
    model.register_forward_hook(lambda *arguments: None)
    with pytest.raises(ConfigError, match="workers: the net cannot be sent to another process: .*lambda"):
        run(tiny_config(workers=2), data=tiny_data(), model=model)
    run(tiny_config(rounds=1), data=tiny_data(), model=model)


class Returns(nn.Module):
    """What `wrap` makes of embeddings, in training or in all."""

    def __init__(self, wrap, in_training_alone=False):
        super().__init__()
        self.net, self.wrap, self.alone = tiny_model(), wrap, in_training_alone

    def forward(self, images):
        embeddings = self.net(images)
        return embeddings if self.alone and not self.training else self.wrap(embeddings)


def raises(embeddings):
    raise KeyError("logits")


@pytest.mark.parametrize(
    "wrap, message",
    [
        (lambda e: (e, e), r"model: expected embeddings, one tensor \(B, D\), got a tuple of Tensor, Tensor"),
        (lambda e: {"logits": e}, r"got a dict of 'logits' \(Tensor\)"),
        (lambda e: None, "got NoneType"),
        (lambda e: e[0], r"model: expected floating embeddings of shape \(2, 4\) for 2 images .*got \(4,\)"),
        (lambda e: e.long(), r"model: expected floating embeddings .* got \(2, 4\) torch.int64"),
        (raises, "model: own can't take images of 1x6x6 .*KeyError: 'logits'$"),
    ],
)
def test_a_net_that_returns_no_embeddings_is_told_what_it_returns(wrap, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_config(), data=tiny_data(), model=Returns(wrap))


def test_so_is_one_that_returns_more_in_training_alone():
    with pytest.raises(ValueError, match="model: expected embeddings.* got a tuple of Tensor, Tensor"):
        run(tiny_config(), data=tiny_data(), model=Returns(lambda e: (e, e), in_training_alone=True))
    assert torch.is_tensor(run(tiny_config(rounds=1), data=tiny_data(), model=Returns(lambda e: e)).weight)
