"""torchvision's nets with GroupNorm: shapes, sizes, checkpoints. They are imported by nothing else."""

import argparse
import subprocess
import sys

import pytest
import torch
from tiny_federation import tiny_config, tiny_data
from torch import nn

from fedss_kernels.federated import run
from fedss_kernels.federated.models import build_model
from fedss_kernels.federated.models.vision import load_checkpoint

# of torchvision's own: parameters without the layers after the pooled features
BACKBONE = {"mobilenet_v3_small": 927_008, "mobilenet_v3_large": 2_971_952, "resnet18": 11_176_512}
FEATURES = {"mobilenet_v3_small": 576, "mobilenet_v3_large": 960, "resnet18": 512}


@pytest.mark.parametrize("name", BACKBONE)
def test_they_map_images_to_embeddings_and_have_no_running_statistics(name, torchvision):
    model = build_model(name, 10, seed=0).eval()
    with torch.no_grad():
        grey, coloured = torch.rand(2, 1, 64, 64), torch.rand(3, 3, 40, 48)
        assert model(grey).shape == (2, 10) and model(coloured).shape == (3, 10)
        torch.testing.assert_close(model(grey), model(grey.expand(-1, 3, -1, -1)))
        torch.testing.assert_close(model(coloured)[1:2], model(coloured[1:2]), rtol=1e-4, atol=1e-4)
    assert not list(model.buffers())
    count = sum(p.numel() for p in model.parameters())
    assert count == BACKBONE[name] + 10 * (FEATURES[name] + 1)


def test_a_federation_trains_one(torchvision):
    config = tiny_config(model="mobilenet_v3_small", rounds=2, cohort=2)
    first, second = (run(config, data=tiny_data()) for _ in range(2))
    assert torch.equal(first.weight, second.weight) and first.summary.num_parameters == 929_316


@pytest.mark.exhaustive
def test_parameters_come_from_a_checkpoint_but_for_a_head_of_another_size(torchvision, tmp_path):
    """Of this model, of a run's model.pt, and of torchvision's names."""
    theirs = build_model("resnet18", 32, seed=1)
    states = {
        "ours": theirs.state_dict(),
        "a run's": {"extractor": theirs.state_dict(), "weight": torch.zeros(3, 32)},
        "torchvision's": theirs[1].state_dict() | {"bn1.running_mean": torch.zeros(64)},
    }
    for name, state in states.items():
        torch.save(state, tmp_path / name)
        model = load_checkpoint(build_model("resnet18", 10, seed=0), tmp_path / name)
        assert torch.equal(model[1].layer3[0].conv1.weight, theirs[1].layer3[0].conv1.weight)
        assert torch.equal(model[1].fc.weight, build_model("resnet18", 10, seed=0)[1].fc.weight)


def test_names_of_wrappers_and_nested_state_dicts_are_understood(tmp_path, caplog):
    theirs = nn.Linear(3, 2)
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
        state = {prefix + name: value for name, value in theirs.state_dict().items()}
        torch.save({"state_dict": state, "epoch": torch.tensor(3)}, tmp_path / "nested")
        assert torch.equal(load_checkpoint(nn.Linear(3, 2), tmp_path / "nested").weight, theirs.weight)
    assert not caplog.records


def test_what_a_checkpoint_does_not_have_is_named(tmp_path, caplog):
    torch.save({"weight": torch.zeros(2, 3), "bias": torch.zeros(5)}, tmp_path / "other head")
    load_checkpoint(nn.Linear(3, 2), tmp_path / "other head")
    assert caplog.messages == [
        f"{tmp_path / 'other head'}: without, or in another shape: bias; the net's own stay"
    ]


def test_whole_numbers_are_no_parameters(tmp_path):
    torch.save({"weight": torch.zeros(2, 3, dtype=torch.int64), "bias": torch.zeros(2)}, tmp_path / "whole")
    with pytest.raises(ValueError, match="whole: expected torch.float32 in weight, got torch.int64$"):
        load_checkpoint(nn.Linear(3, 2), tmp_path / "whole")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    model = nn.Linear(3, 2)
    torch.save({"other": torch.zeros(2)}, tmp_path / "other")
    torch.save(model, tmp_path / "module")
    (tmp_path / "text").write_text("parameters")
    with pytest.raises(ValueError, match=".*other holds no parameter of this model"):
        load_checkpoint(model, tmp_path / "other")
    with pytest.raises(ValueError, match=".*module holds more than tensors"):
        load_checkpoint(model, tmp_path / "module")
    for name in ("text", "nothing"):
        with pytest.raises(ValueError, match=f".*{name}"):
            load_checkpoint(model, tmp_path / name)


def test_parameters_that_are_not_finite_are_refused_by_name(tmp_path):
    state = {"weight": torch.zeros(2, 3), "bias": torch.tensor([0.0, torch.nan])}
    torch.save(state, tmp_path / "nan")
    with pytest.raises(ValueError, match="nan holds numbers that are not finite, in bias$"):
        load_checkpoint(nn.Linear(3, 2), tmp_path / "nan")


def test_what_is_no_checkpoint_is_named_as_what_it_is_in_a_line(tmp_path):
    model = nn.Linear(30, 200)
    torch.save(model.state_dict(), tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:9000])
    (tmp_path / "text").write_text("root:x:0:0:root\n")
    torch.save({"options": argparse.Namespace(a=1)}, tmp_path / "options")
    torch.save(model.state_dict(), tmp_path / "old", _use_new_zipfile_serialization=False)
    load_checkpoint(model, tmp_path / "old")
    expected = r": expected a file as torch.save\(net.state_dict\(\), FILE\) writes$"
    for name, words in (
        ("cut", f"^[^\n]*cut is damaged, or not of torch.save{expected}"),
        ("text", f"^[^\n]*text is no file of torch.save{expected}"),
        ("options", rf"^[^\n]*options holds more than tensors \(argparse.Namespace\){expected}"),
        ("nothing", r"^cannot read [^\n]*nothing: No such file or directory$"),
        (".", r"^cannot read [^\n]*: Is a directory$"),
    ):
        with pytest.raises(ValueError, match=words):
            load_checkpoint(model, tmp_path / name)


@pytest.mark.exhaustive
def test_without_torchvision_the_message_says_what_to_install():
    code = """
        import sys
        sys.modules["torchvision"] = None
        from fedss_kernels.federated.models import build_model
        build_model("conv4", 8, 0)
        build_model("resnet18", 8, 0)
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    failed = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert "needs torchvision" in failed.stderr and 'pip install "fedss-kernels[vision]"' in failed.stderr
