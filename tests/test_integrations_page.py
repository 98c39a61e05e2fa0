"""The examples of docs/integrations.md run: with stand-ins for libraries, and in those installed."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

PAGE = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"\n## (.+?)\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGE, re.DOTALL))
LIBRARIES = {
    "pytorch-metric-learning": "pytorch_metric_learning.miners",
    "RePlay": "replay.nn.sequential",
    "RecTools": "rectools.models.nn.transformers.lightning",
    "Lightning": "lightning",
    "timm": "timm",
}


def module(monkeypatch, name: str, **names) -> None:
    """A stand-in for a module, and empty ones for the packages that it lies in."""
    packages = name.split(".")
    for depth in range(1, len(packages) + 1):
        full = ".".join(packages[:depth])
        monkeypatch.setitem(sys.modules, full, ModuleType(full))
    vars(sys.modules[name]).update(names)


class LightningModule(nn.Module):
    """Stands in for Lightning's: keeps what is logged."""

    def log(self, name, value):
        self.logged = {name: float(value)}


class Trainer:
    """Stands in for Lightning's: the loop of one epoch."""

    def __init__(self, max_epochs, **options):
        assert max_epochs == 1

    def fit(self, model, training, validation):
        optimizer = model.configure_optimizers()
        for number, batch in enumerate(training):
            optimizer.zero_grad()
            model.training_step(batch, number).backward()
            optimizer.step()
        model.eval()
        for number, batch in enumerate(validation):
            model.validation_step(batch, number)
        self.callback_metrics = model.logged


def test_every_library_has_an_example():
    assert EXAMPLES.keys() == LIBRARIES.keys() | {"insightface"}
    assert len(EXAMPLES) == PAGE.count("```python")


def test_pytorch_metric_learning():
    pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
    exec(EXAMPLES["pytorch-metric-learning"], names := {})
    assert names["loss"].isfinite() and names["loss_func"].criterion.weight.grad.is_sparse


def test_lightning_with_a_stand_in(monkeypatch):
    module(monkeypatch, "lightning", LightningModule=LightningModule, Trainer=Trainer)
    exec(EXAMPLES["Lightning"], names := {"__name__": "example"})
    assert 0 <= names["trainer"].callback_metrics["top1"] <= 1


def test_timm_with_a_stand_in(monkeypatch):
    def create_model(name, num_classes):
        assert (name, num_classes) == ("resnet18", 0)
        net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 16))
        net.num_features = 16
        return net

    module(monkeypatch, "timm", create_model=create_model)
    exec(EXAMPLES["timm"], names := {})
    assert names["loss"].isfinite()


ITEMS, D = 1000, 16


class TorchModel(nn.Module):
    """What RecTools' module holds, as far as the example reads it."""

    def __init__(self):
        super().__init__()
        self.item_model = nn.Embedding(ITEMS, D, padding_idx=0)
        self.item_model.get_all_embeddings = lambda: self.item_model.weight

    def encode_sessions(self, batch, items):
        return items[batch["x"]]


def rectools_module(base, names):
    made = names["SampledSoftmaxModule"].__new__(names["SampledSoftmaxModule"])
    nn.Module.__init__(made)
    made.torch_model = TorchModel()
    assert issubclass(type(made), base) and made.requires_negatives("fedss") is False
    return made


def check_rectools(base):
    exec(EXAMPLES["RecTools"], names := {"__name__": "example"})
    made = rectools_module(base, names)
    batch = {"x": torch.randint(1, ITEMS, (4, 7)), "y": torch.randint(1, ITEMS, (4, 7))}
    batch["y"][0] = 0
    loss = made._calc_custom_loss(batch, 0)
    loss.backward()
    assert loss.isfinite() and made._calc_custom_loss_outputs(batch, 0)["loss"].isfinite()
    batch["y"][1:] = 0
    assert made._calc_custom_loss(batch, 0) == 0, "padding counts for nothing"


def test_rectools_with_a_stand_in(monkeypatch):
    base = type("TransformerLightningModule", (nn.Module,), {})
    module(monkeypatch, LIBRARIES["RecTools"], TransformerLightningModule=base)
    check_rectools(base)


def test_insightface_with_a_stand_in():
    names = {
        "torch": torch,
        "cfg": SimpleNamespace(num_classes=1000, embedding_size=D, sample_rate=0.1, lr=0.1),
        "backbone": nn.Linear(8, D),
        "train_loader": [(torch.randn(4, 8), torch.randint(1000, (4,), dtype=torch.int32))],
    }
    exec(EXAMPLES["insightface"], names)
    assert names["loss"].isfinite() and names["module_partial_fc"].num_sampled == 100


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", LIBRARIES)
def test_in_the_library_itself(library):
    found = pytest.importorskip(LIBRARIES[library], reason=f"needs {library}, which is not installed")
    if library == "RecTools":
        check_rectools(found.TransformerLightningModule)
        return
    exec(EXAMPLES[library], names := {"__name__": "example"})
    if library == "Lightning":
        assert 0 <= names["trainer"].callback_metrics["top1"] <= 1
    elif library == "RePlay":
        assert names["negatives"]({})["negative_labels"].shape == (100,)
    else:
        assert names["loss"].isfinite()
